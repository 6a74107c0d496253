"""Quest: bounds hold, the best pages are read whole, and the open page always."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gossamer.attention.quest import PageBounds, Quest, page_bounds, page_scores
from gossamer.errors import InputError
from gossamer.hf import ModelShape
from gossamer.models import tiny_model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_bounds_by_hand() -> None:
    key = torch.tensor([[1.0, -2.0], [3.0, 5.0], [-1.0, 0.0], [2.0, 2.0]]).view(1, 1, 4, 2)
    low, high = page_bounds(key, 2)
    assert low.tolist() == [[[[1.0, -2.0], [-1.0, 0.0]]]]
    assert high.tolist() == [[[[3.0, 5.0], [2.0, 2.0]]]]
    query = torch.tensor([[[1.0, -1.0]]])
    assert page_scores(query, low, high).tolist() == [[[5.0, 2.0]]]  # 3 − (−2), 2 − 0


@pytest.mark.parametrize("page", [1, 4, 16])
def test_scores_bound_every_key_of_the_page(page: int) -> None:
    query, key = normal(2, 4, 8), normal(2, 2, 48, 8, seed=1)
    bound = page_scores(query, *page_bounds(key, page))
    true = (
        torch.einsum("bkgd,bksd->bkgs", query.unflatten(1, (2, 2)), key).flatten(1, 2).unflatten(2, (-1, page)).amax(-1)
    )
    assert bool((bound >= true - 1e-5).all())
    if page == 1:
        torch.testing.assert_close(bound, true)


def test_bounds_extend_page_by_page_and_after_a_crop() -> None:
    key, state = normal(1, 2, 2000, 4), PageBounds()
    for length in (5, 16, 17, 40, 41, 1300, 2000):
        got = state.extend(key[:, :, :length], 16)
        want = page_bounds(key[:, :, : length // 16 * 16], 16)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    state.rows, key[:, :, 990:] = 990, normal(1, 2, 1010, 4, seed=2)  # what the layer does on a crop, then new rows
    got, want = state.extend(key, 16), page_bounds(key, 16)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("tokens", [8, 12, 13, 1 / 4])
def test_whole_pages_the_best_ones_and_the_open_one(tokens: int | float) -> None:
    model, size = tiny_model("qwen2"), 4
    with torch.no_grad(), Quest(tokens=tokens, page_size=size, dense_layers=()).attach(model) as handle:
        policy = handle.runtime.decode
        queries: list[Tensor] = []
        select = policy.select

        def spying(layer: object, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
            queries.append(query)
            return select(layer, query, length)

        policy.select = spying
        with handle.runtime.recording() as trace:
            out = model(ids(2, 30))
            for step in ids(2, 7, seed=1).T:
                out = model(step[:, None], past_key_values=out.past_key_values)
    assert len(trace) == len(queries) == 21
    for (layer, length, rows, counts), query in zip(trace, queries, strict=True):
        whole = (length - 1) // size
        key = out.past_key_values.layers[layer].keys[:, :, : whole * size]
        scores = page_scores(query, *page_bounds(key, size))
        keep = policy.budget(length) // size - 1
        best = scores.topk(keep).indices
        for b, h in itertools.product(range(2), range(4)):
            got = set(rows[b, h, : int(counts[b, h])].tolist())
            want = {int(p) * size + i for p in best[b, h] for i in range(size)} | set(range(whole * size, length))
            assert got == want


def test_budget_is_whole_pages_and_at_least_two() -> None:
    def budget(tokens: int | float, length: int, page: int = 16) -> int:
        from gossamer.attention.quest import QuestPolicy

        return QuestPolicy(Quest(tokens=tokens, page_size=page)).budget(length)

    assert budget(256, 4096) == 256
    assert budget(250, 4096) == 256
    assert budget(1, 4096) == 32
    assert budget(1 / 16, 4096) == 256
    assert budget(1 / 16, 100) == 32
    assert budget(3, 100, page=1) == 3


def test_bytes_by_hand() -> None:
    shape = ModelShape(2, 8, 2, 64)
    got = Quest(tokens=64).io_bytes(1000, shape, 2)  # 62 whole pages, 8 rows in the open one
    assert got == {"rows": (3 * 16 + 8) * 8 * 2 * 64 * 2, "scores": 2 * 62 * 2 * 64 * 2}
    assert Quest(tokens=64).io_bytes(1008, shape, 2)["rows"] == 4 * 16 * 8 * 2 * 64 * 2


@pytest.mark.parametrize("bad", [{"page_size": 0}, {"page_size": 1025}, {"tokens": 0}, {"pages": 3}])
def test_bad_settings(bad: dict[str, int]) -> None:
    with pytest.raises(InputError) as caught:
        Quest(**bad)
    assert "\n" not in str(caught.value)
