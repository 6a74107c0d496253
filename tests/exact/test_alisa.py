"""The properties that ALISA's card lists: sparse window attention (checks 1 to 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.attention.alisa import Alisa
from gossamer.attention.alisa_formulas import attend_packed, choose, gather_rows, half_budget
from gossamer.attention.alisa_history import History, dense_rows, on_grid
from gossamer.errors import InputError, RecipeError
from gossamer.hf import AttentionRuntime, CachePolicy, LayerView
from gossamer.models import tiny_model
from gossamer.testing import AttentionContract, Case, Stream


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def _case(**settings: object) -> Case:
    return Case("alisa", {"ratio": 0.2, **settings}, full={"ratio": 1.0}, exact_count=False, forgetful=False)


class TestAlisa(AttentionContract):
    cases = (
        _case(),
        _case(history_rows=2),
        _case(prompt_rows="stored"),
        _case(head_reduce=False),
        _case(ratio=0.4, dense_layers=(0,)),
    )


# -- a second, naive implementation: whole rows, summed anew at each step ---------------------------------------------


class Naive:
    """One layer and one sequence of a stream; ``rows[i]`` is the attention row of token i, summed over heads."""

    def __init__(self, stream: Stream, layer: int, sequence: int, ratio: float, history: int | None = None) -> None:
        self.query, self.key, self.value = (
            x[layer, sequence].double() for x in (stream.query, stream.key, stream.value)
        )
        self.ratio, self.history = ratio, history
        self.rows: list[Tensor] = []
        self.sets: list[list[int]] = []

    def attend(self, kept: list[int]) -> tuple[Tensor, Tensor]:
        n = len(self.rows)
        group, out = self.query.shape[0] // self.key.shape[0], []
        row = torch.zeros(self.query.shape[1], dtype=torch.float64)
        for h in range(self.query.shape[0]):
            weights = (self.key[h // group, kept] @ self.query[h, n] * 0.25).softmax(0)
            row[kept] += weights
            out.append(weights @ self.value[h // group, kept])
        return torch.stack(out), row

    def dense(self) -> Tensor:
        out, row = self.attend(list(range(len(self.rows) + 1)))
        self.rows.append(row)
        return out

    def step(self) -> Tensor:
        n = len(self.rows)
        k = int(n * self.ratio / 2 + 0.5)
        if k == 0 or 2 * k >= n:
            kept = list(range(n + 1))
        else:
            window = self.rows[max(0, n - (self.history or k)) : n]
            score = torch.stack(window).sum(0)[: n - k].float()
            best = sorted(range(n - k), key=lambda j: (-float(score[j]), j))[:k]
            kept = sorted(best) + list(range(n - k, n + 1))
        out, row = self.attend(kept)
        self.rows.append(row)
        self.sets.append(kept)
        return out


def compared(ratio: float, blocks: list[tuple[str, int]], history: int | None = None, seed: int = 0) -> None:
    """Feed blocks ("dense" or "step", tokens) and compare sets and outputs with the naive implementation."""
    total = sum(size for _, size in blocks)
    stream = Stream(batch=1, length=total, seed=seed)
    naive = [Naive(stream, layer, 0, ratio, history) for layer in range(3)]
    with Alisa(ratio=ratio, history_rows=history).attach(tiny_model("qwen2")) as handle:
        for kind, size in blocks:
            if kind == "dense":
                got = stream.feed(handle, size)
                want = torch.stack([torch.stack([n.dense() for _ in range(size)], 1) for n in naive])
            else:
                with handle.runtime.recording() as trace:
                    got = stream.feed(handle, *[1] * size)
                want = torch.stack([torch.stack([n.step() for _ in range(size)], 1) for n in naive])
                for layer, length, ids, counts in trace:
                    kept = naive[layer].sets[length - 1 - len(naive[layer].rows)]
                    for line, count in zip(ids[0], counts[0], strict=True):
                        assert line[: int(count)].tolist() == kept, (layer, length)
            torch.testing.assert_close(got[:, 0].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.7, 0.95])
def test_sets_and_outputs_are_those_of_whole_rows_summed_anew(ratio: float) -> None:
    compared(ratio, [("dense", 30), ("step", 60)])


def test_the_prompts_rows_leave_the_window_one_by_one() -> None:
    """With 0.2 the last row of a prompt of 100 leaves when 111 tokens are there; blocks of rows are 32 long."""
    compared(0.5, [("dense", 100), ("step", 60)])


def test_several_prompts_and_turns() -> None:
    compared(0.3, [("dense", 20), ("dense", 17), ("step", 9), ("dense", 30), ("step", 20), ("dense", 2), ("step", 9)])


def test_no_prompt_at_all() -> None:
    compared(0.2, [("step", 50)])


@pytest.mark.parametrize("history", [1, 3, 25])
def test_another_number_of_history_rows(history: int) -> None:
    compared(0.2, [("dense", 30), ("step", 30)], history)


def test_a_long_run_stays_exact() -> None:
    """The ring turns over many times, and running sums equal those of the rows in the window to the last bit."""
    history, generator = History(2, torch.device("cpu")), torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    for n in range(1500):
        k = half_budget(0.05, n)
        history.window([n - k] * 2)
        want = torch.zeros(2, max(n, 1), dtype=torch.float64)
        for ids, weights in kept[n - k : n] if n % 50 == 0 else ():
            want.scatter_add_(1, ids.long(), on_grid(weights).double())
        if n % 50 == 0 and n:
            assert torch.equal(history.sums[:, :n], want)
        ids = torch.stack([torch.randperm(n + 1, generator=generator)[: 2 * k + 1] for _ in range(2)]).int()
        kept.append((ids, torch.rand(ids.shape, generator=generator)))
        history.record(*kept[-1], rows=k + 64)
    assert history.ids.shape[1] < 180


@given(st.lists(st.sampled_from([-30, -3, -1, 1, 2, 5, 40]), min_size=1, max_size=12), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_going_back_and_forth_leaves_no_trace(moves: list[int], seed: int) -> None:
    """Rolling back (assisted generation) gives the sums of a history that never went further."""
    generator = torch.Generator().manual_seed(seed)
    entries = [
        (torch.randperm(n + 1, generator=generator)[None, :7].int(), torch.rand(1, min(7, n + 1), generator=generator))
        for n in range(600)
    ]
    history, end = History(1, torch.device("cpu")), 0
    for move in moves:
        if move < 0:
            end = max(0, end + move)
            history.rewind(end)
        for _ in range(max(move, 0)):
            history.window([end - half_budget(0.3, end)])
            history.record(*entries[end], rows=200)
            end += 1
    k = half_budget(0.3, end)
    history.window([end - k])
    want = torch.zeros(1, history.sums.shape[1], dtype=torch.float64)
    for ids, weights in entries[end - k : end]:
        want.scatter_add_(1, ids.long(), on_grid(weights).double())
    assert torch.equal(history.sums, want)


def test_stored_prompt_rows_choose_what_recomputed_ones_choose() -> None:
    """But for what half precision blurs; what was rounded in is rounded out, so nothing is left when they are gone."""
    sets = []
    for how in ("recomputed", "stored"):
        with (
            Alisa(ratio=0.5, prompt_rows=how).attach(tiny_model("qwen2")) as handle,
            handle.runtime.recording() as trace,
        ):
            stream = Stream(batch=1, length=160)
            stream.feed(handle, 100, *[1] * 60)
            history = stream.cache.layers[0].views[handle.runtime].state.history
        sets.append([set(ids[0, 0].tolist()) for *_, ids, _ in trace])
    assert min(history.low) > 100
    total = torch.zeros_like(history.sums)
    for row in range(history.low[0], history.end):
        slot = row % history.ids.shape[1]
        total.scatter_add_(1, history.ids[:, slot].long(), history.weights[:, slot].double())
    assert torch.equal(total, history.sums)
    overlap = [len(a & b) / len(a) for a, b in zip(*sets, strict=True)]
    assert sum(overlap) / len(overlap) > 0.97


# -- 1: what equals dense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen3", "gemma3"])
def test_ratio_one_is_dense(family: str) -> None:
    model: Any = tiny_model(family)
    ids = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    want = model(ids).logits
    with Alisa(ratio=1.0).attach(model):
        cache = model(ids[:, :20], use_cache=True).past_key_values
        logits = [model(token, past_key_values=cache).logits for token in ids[:, 20:].split(1, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), want[:, 20:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ratio", "cached"), [(1.0, 5), (1.0, 6), (0.9, 4), (0.2, 4), (0.2, 1)])
def test_halves_that_cover_everything_take_everything(ratio: float, cached: int) -> None:
    got = choose(torch.rand(2, cached), half_budget(ratio, cached), 0, cached)
    assert got.tolist() == [list(range(cached + 1))] * 2


# -- 2, 3: the set ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.floats(0.01, 1.0), st.integers(0, 20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_halves_are_disjoint_and_as_large_as_promised(cached: int, ratio: float, first: int, seed: int) -> None:
    n, k = cached, half_budget(ratio, cached)
    scores = torch.rand(1, first + n, generator=torch.Generator().manual_seed(seed))
    ids = choose(scores, k, first, first + n)[0].tolist()
    assert ids == sorted(set(ids))
    assert len(ids) == 1 + (min(n, 2 * k) if k else n)
    assert set(range(first + n - k, first + n + 1)) <= set(ids)
    assert min(ids) >= first
    if k and 2 * k < n:
        others = sorted(range(first, first + n - k), key=lambda j: (-float(scores[0, j]), j))[:k]
        assert set(ids) - set(range(first + n - k, first + n + 1)) == set(others)


def test_all_heads_of_a_layer_read_the_same_rows() -> None:
    with Alisa().attach(tiny_model("qwen2")) as handle, handle.runtime.recording() as trace:
        Stream().feed(handle, 40, *[1] * 10)
    assert all(torch.equal(ids, ids[:, :1].expand_as(ids)) for *_, ids, _ in trace)


def test_heads_alone_read_rows_of_their_own() -> None:
    with Alisa(head_reduce=False).attach(tiny_model("qwen2")) as handle, handle.runtime.recording() as trace:
        Stream().feed(handle, 40, *[1] * 10)
    assert any(not torch.equal(ids, ids[:, :1].expand_as(ids)) for *_, ids, _ in trace)


def test_a_padded_sequence_has_the_budget_of_its_own_length() -> None:
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :34] = False
    with Alisa(ratio=0.4).attach(tiny_model("qwen2")) as handle, handle.runtime.recording() as trace:
        Stream().feed(handle, 63, 1, mask=mask)
    for _, _, _, counts in trace:
        assert counts.tolist() == [[2 * 13 + 1] * 2, [2 * 6 + 1] * 2]  # of 63 and of 29 cached tokens


def test_a_planted_key_stays_while_it_is_looked_at_and_leaves_k_rows_later() -> None:
    stream = Stream(batch=1, length=160)
    needle = torch.zeros(16)
    needle[0] = 12.0
    stream.query[:, :, :, :100] = needle  # until token 100 all queries look at the key of token 7
    stream.key[..., 0] = 0.0
    stream.key[:, :, :, 7] = needle
    stream.query[:, :, :, 100:, 0] = -6.0
    with Alisa().attach(tiny_model("qwen2")) as handle, handle.runtime.recording() as trace:
        stream.feed(handle, 80, *[1] * 80)
    for _, length, ids, _ in trace:
        n = length - 1
        if n <= 101:
            assert 7 in ids[0, 0]
        if n - half_budget(0.2, n) >= 100:  # no row of before is in the window
            assert 7 not in ids[0, 0]


# -- 4: packed rows and masks -----------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.sampled_from([(4, 2), (4, 4), (3, 1)]), st.booleans(), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_packed_attention_is_masked_dense_attention(
    batch: int, heads: tuple[int, int], per_head: bool, seed: int
) -> None:
    h, kv = heads
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, h, 16, generator=generator)
    key, value = torch.randn(2, batch, kv, 40, 16, generator=generator)
    lines = batch * h if per_head else batch
    ids = torch.stack([torch.randperm(40, generator=generator)[:9].sort().values for _ in range(lines)]).int()
    valid = torch.rand(lines, 9, generator=generator) < 0.7
    valid[:, 0] = True
    out, weights = attend_packed(query, gather_rows(key, ids), gather_rows(value, ids), valid, 0.25, per_head)
    mask = torch.zeros(lines, 40, dtype=torch.bool).scatter_(1, ids.long(), valid).view(batch, -1, 1, 40)
    k, v = (x.repeat_interleave(h // kv, 1) for x in (key, value))
    logits = (query[:, :, None] @ k.transpose(2, 3) * 0.25).masked_fill(~mask, float("-inf"))
    want = logits.softmax(-1)
    torch.testing.assert_close(out, (want @ v)[:, :, 0], atol=1e-6, rtol=1e-6)
    row = want[:, :, 0].flatten(0, 1) if per_head else want[:, :, 0].sum(1)
    torch.testing.assert_close(weights.masked_fill(~valid, 0), row.gather(1, ids.long()) * valid, atol=1e-6, rtol=1e-6)


def test_dense_rows_by_hand() -> None:
    query = torch.tensor([[[[0.0], [1.0]], [[0.0], [0.0]]]])  # two heads, two queries at positions 1 and 2
    key = torch.tensor([[[[0.0], [0.0], [1.0]]]])
    e = torch.tensor([1.0, 1.0, torch.e])
    want = torch.tensor([[1.0, 1.0, 0.0], (e / e.sum() + 1 / 3).tolist()])
    torch.testing.assert_close(dense_rows(query, key, 1, 1.0)[0], want)


# -- manners ----------------------------------------------------------------------------------------------------------


class Halving(CachePolicy):
    def update(self, layer: LayerView, query: Tensor) -> None:
        if layer.kv.length > 20:
            layer.keep(torch.arange(10).expand(*layer.kv.keys.shape[:2], -1))


def test_a_cache_that_drops_rows_is_refused() -> None:
    model: Any = tiny_model("llama")
    runtime = AttentionRuntime(model, decode=Alisa().decode_policy(model, None), cache=Halving())
    try:
        cache = model(torch.ones(1, 30, dtype=torch.long), use_cache=True).past_key_values
        with pytest.raises(RecipeError, match="drops rows") as error:
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        assert "\n" not in str(error.value)
    finally:
        runtime.detach()


def test_a_cache_filled_by_others_is_said_and_works() -> None:
    model: Any = tiny_model("llama")
    cache = model(torch.randint(1, 256, (1, 30)), use_cache=True).past_key_values
    with Alisa().attach(model) as handle:
        out = model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        assert any("has not seen" in remark for remark in handle.runtime.said.values())
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("wrong", [{"ratio": 0}, {"ratio": 1.2}, {"ratio": float("nan")}, {"history_rows": 0}])
def test_bad_settings_are_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        Alisa(**wrong)
    assert "\n" not in str(error.value)
    assert next(iter(wrong)) in str(error.value)


def test_half_precision_runs() -> None:
    model: Any = tiny_model("llama").to(torch.bfloat16)
    with Alisa().attach(model):
        out = model.generate(torch.ones(1, 30, dtype=torch.long), max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 50)
