"""SparQ: channels by the query, rows by those channels, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import ops
from gossamer.attention.sparq import KeyColumns, SparQ, SparQPolicy, channel_scores, top_channels
from gossamer.errors import InputError
from gossamer.hf import ModelShape, model_shape
from gossamer.models import tiny_model
from gossamer.testing import AttentionContract, Case

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 1, length: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


class TestSparQ(AttentionContract):
    cases = (
        Case("sparq", {"tokens": 12}),
        Case("sparq", {"tokens": 12, "channels": 1}),
        Case("sparq", {"tokens": 12, "channels": 1.0, "select_per": "kv_head"}),
        Case("sparq", {"tokens": 5, "channels": 6, "select_per": "kv_head", "dense_layers": (-1,)}),
    )


def test_by_hand() -> None:
    query = torch.tensor([[[1.0, -5.0, 2.0, 0.0], [3.0, 1.0, -4.0, 0.0]]])  # two heads on one KV head
    channels = top_channels(query, 1, 2).sort(-1).values
    assert channels.tolist() == [[[1, 2]]]  # 4, 6, 6, 0
    columns = torch.tensor([[[[9.0] * 4, [1.0, 0.0, 2.0, 9.0], [0.0, 1.0, 1.0, 9.0], [9.0] * 4]]])
    scores, tau = channel_scores(query, channels, columns, 3)
    assert scores.tolist() == [[[-5.0, 2.0, -8.0], [1.0, -4.0, -2.0]]]
    torch.testing.assert_close(tau[0, :, 0], torch.tensor([4 * 7 / 8, 4 * 5 / 8]).sqrt())


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("select_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("r", [1, 4, 1.0])
def test_rows_are_the_definitions(family: str, select_per: Any, r: int | float) -> None:
    """Each step's rows equal those of the formulas, written with repeated keys and masked channels."""
    model, seen = tiny_model(family), []
    shape = model_shape(model)
    dim, group = shape.head_dim, shape.group
    count = dim if r == 1.0 and isinstance(r, float) else int(r)
    select = SparQPolicy.select

    def spying(self: Any, layer: Any, query: Tensor, length: int) -> Any:
        key = layer.rows(length)[0].repeat_interleave(group, 1)
        grouped = query.unflatten(1, (shape.kv_heads, group))
        mass = grouped.abs().sum(2)
        kept = (mass >= mass.sort(-1, descending=True).values[..., count - 1 : count]).repeat_interleave(group, 1)
        part = query * kept
        scores = torch.einsum("bhd,bhsd->bhs", part, key)
        if select_per == "kv_head":
            tau = (dim * part.abs().sum(-1) / query.abs().sum(-1)).sqrt()[..., None]
            scores = (scores / tau * layer.scale * dim**0.5).softmax(-1).unflatten(1, (-1, group)).sum(2)
        seen.append(scores.topk(7).indices.sort(-1).values)
        return select(self, layer, query, length)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparQPolicy, "select", spying)
        handle = SparQ(tokens=7, channels=r, select_per=select_per, dense_layers=()).attach(model)
        with handle, handle.runtime.recording() as trace:
            out = model(ids(2))
            for token in ids(2, 4, seed=1).split(1, 1):
                out = model(token, past_key_values=out.past_key_values)
    assert len(trace) == len(seen) == 4 * shape.layers
    for (_, _, got, counts), want in zip(trace, seen, strict=True):
        assert torch.equal(got.long(), want)
        assert bool((counts == 7).all())


def test_all_channels_are_the_true_top_k() -> None:
    query, key = normal(2, 4, 16), normal(2, 2, 9000, 16, seed=1)
    got, tau = channel_scores(query, top_channels(query, 2, 16), key.transpose(2, 3).contiguous(), 9000)
    want = torch.einsum("bkgd,bksd->bkgs", query.unflatten(1, (2, 2)), key).flatten(1, 2)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(tau, torch.full_like(tau, 4.0))  # √d: ordinary attention
    assert torch.equal(ops.select_topk(got, 9)[0], ops.select_topk(want, 9)[0])


def test_columns_follow_the_keys() -> None:
    key, state = normal(1, 2, 600, 4), KeyColumns()
    for length, capacity in ((5, 256), (17, 256), (300, 512), (600, 768)):
        assert torch.equal(state.extend(key[:, :, :length], capacity)[..., :length], key[:, :, :length].transpose(2, 3))
    state.rows, key[:, :, 90:] = 90, normal(1, 2, 510, 4, seed=2)  # what the layer does on a crop, then new rows
    assert torch.equal(state.extend(key[:, :, :200], 768)[..., :200], key[:, :, :200].transpose(2, 3))


def test_a_zero_query_is_finite() -> None:
    scores, tau = channel_scores(torch.zeros(1, 2, 4), torch.tensor([[[0, 1]]]), normal(1, 1, 4, 9), 9)
    assert bool(scores.isfinite().all())
    assert bool((scores / tau == 0).all())


def test_bfloat16_runs() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    for select_per in ("query_head", "kv_head"):
        with torch.no_grad(), SparQ(tokens=8, select_per=select_per, dense_layers=()).attach(model) as handle:
            model.generate(ids(2), attention_mask=torch.ones(2, 30).long(), max_new_tokens=4, do_sample=False)
            assert handle.runtime.stats.rows < handle.runtime.stats.dense_rows


def test_bytes_by_hand() -> None:
    shape = ModelShape(2, 8, 2, 64)
    assert SparQ(tokens=64, channels=16).io_bytes(1000, shape, 2) == {
        "rows": 64 * 8 * 2 * 64 * 2,
        "scores": 1000 * 16 * 2 * 2,
    }
    assert SparQ(tokens=64, select_per="kv_head").io_bytes(32, shape, 2)["rows"] == 32 * 2 * 2 * 64 * 2


@pytest.mark.parametrize("bad", [{"channels": 0}, {"channels": 1.5}, {"select_per": "layer"}, {"r": 3}], ids=str)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        SparQ(**bad)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"sparq: {next(iter(bad))}")
