"""TokenSelect: the vote, the set, the two kinds of positions, the Selection Cache, and prefill in chunks, by the card."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer import ops
from gossamer.attention import attach
from gossamer.attention.tokenselect import (
    TokenSelect,
    TokenSelectPolicy,
    assemble,
    head_logits,
    head_vote,
    max_pool,
)
from gossamer.errors import InputError, ModelError, RecipeError
from gossamer.hf import GossamerCache, ModelShape, SelectingPolicy, model_shape
from gossamer.hf.rotary import Rotary
from gossamer.models import tiny_model
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, Stream

MODEL = tiny_model("qwen2")  # what Stream feeds: 3 layers, 4 query heads on 2 KV heads
SMALL: dict[str, Any] = {"n_init": 2, "k": 6, "n_local": 4}
PACKED: dict[str, Any] = {**SMALL, "positions": "packed"}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


class TestTokenSelect(AttentionContract):
    cases: ClassVar[list[Case]] = [
        Case("tokenselect", SMALL),
        Case("tokenselect", {**SMALL, "theta": 1.1, "vote": "raw", "gqa_map": "mod"}),
        Case("tokenselect", {"tokens": 12, "vote": "hard", "pool": 3, "dense_layers": (0,)}),
        Case("tokenselect", {"tokens": 1, "n_init": 0}),
    ]


class TestTokenSelectPacked(AttentionContract):
    """All but exactness at the stored positions, which packing gives up."""

    cases: ClassVar[list[Case]] = [Case("tokenselect", PACKED)]
    test_attention_is_exact_on_what_was_selected = None  # see test_against_the_formulas


# -- the paper's formulas, in plain loops -------------------------------------------------------------------------------


def rotated(x: Tensor, at: int, rotary: Rotary, layer: int) -> Tensor:
    """One vector ``[d]`` turned to position `at`, channel pair by channel pair."""
    cos, sin = rotary.tables(layer, torch.tensor([at]))
    half, out = len(x) // 2, x.clone()
    for c in range(half):
        out[c] = x[c] * cos[0, c] - x[c + half] * sin[0, c]
        out[c + half] = x[c + half] * cos[0, c] + x[c] * sin[0, c]
    return out


def chosen(score_q: Tensor, score_k: Tensor, length: int, method: TokenSelect, n_local: int) -> list[int]:
    """I for mean queries ``[H, d]`` and keys ``[Hkv, N, d]``, of which the first `length` are seen."""
    heads, kv_heads = score_q.shape[0], score_k.shape[0]
    if length <= method.n_init + method.k + n_local:
        return list(range(length))
    candidates = list(range(method.n_init, length - n_local))
    votes = torch.zeros(len(candidates))
    for h in range(heads):
        kv = h // (heads // kv_heads) if method.gqa_map == "contiguous" else h % kv_heads
        votes += (score_k[kv, candidates] @ score_q[h]).softmax(0)
    best = votes.topk(method.k).indices.tolist()
    return [*range(method.n_init), *sorted(candidates[i] for i in best), *range(length - n_local, length)]


def by_hand(stream: Stream, method: TokenSelect, sizes: list[int], layer: int, b: int = 0) -> Tensor:
    """Outputs ``[H, tokens, d]`` of one sequence fed in chunks of these sizes, every chunk with its own I."""
    q, k, v = (x[layer, b] for x in (stream.query, stream.key, stream.value))
    rotary, group, out = Rotary(MODEL), q.shape[0] // k.shape[0], torch.zeros_like(q)
    packed, end = method.positions == "packed", 0

    def plain(x: Tensor, at: int) -> Tensor:
        return rotated(x, -at, rotary, layer)

    for size in sizes:
        begin, end = end, end + size
        n_local = max(method.n_local, size)
        score_q, score_k = q[:, begin:end], k
        if packed:
            score_k = torch.stack([torch.stack([plain(k[h, j], j) for j in range(end)]) for h in range(k.shape[0])])
            score_q = torch.stack(
                [
                    torch.stack(
                        [rotated(plain(q[h, t], t), n_local + t - begin, rotary, layer) for t in range(begin, end)]
                    )
                    for h in range(q.shape[0])
                ]
            )
        rows = chosen(score_q.mean(1), score_k, end, method, n_local)
        for h in range(q.shape[0]):
            for t in range(begin, end):
                seen = [j for j in rows if j <= t]
                keys, query = k[h // group, seen], q[h, t]
                if packed:
                    keys = torch.stack(
                        [rotated(plain(k[h // group, j], j), i, rotary, layer) for i, j in enumerate(seen)]
                    )
                    query = rotated(plain(query, t), len(rows) - end + t, rotary, layer)
                out[h, t] = (keys @ query * 0.25).softmax(0) @ v[h // group, seen]
    return out


@pytest.mark.parametrize("positions", ["original", "packed"])
@pytest.mark.parametrize("gqa_map", ["contiguous", "mod"])
def test_against_the_formulas(positions: str, gqa_map: str) -> None:
    method = TokenSelect(**SMALL, theta=2.0, chunk=5, positions=positions, gqa_map=gqa_map)
    stream = Stream(batch=1, length=27)
    with method.attach(MODEL) as handle:
        got = stream.feed(handle, 13, 8, *[1] * 6)
    want = by_hand(stream, method, [5, 5, 3, 5, 3, *[1] * 6], layer=2)
    torch.testing.assert_close(got[2, 0], want, **CLOSE)


def test_vote_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 0.0, 1.0], [30.0, 0.0, 0.0, 20.0]]])
    torch.testing.assert_close(head_vote(logits, "soft", 2), logits.softmax(2).sum(1))
    assert head_vote(logits, "raw", 2).tolist() == [[30.0, 2.0, 0.0, 21.0]]
    assert head_vote(logits, "hard", 2).tolist() == [[1.0, 1.0, 0.0, 2.0]]
    starts = torch.tensor([1], dtype=torch.int32)
    assert head_vote(logits, "hard", 2, starts).tolist() == [[0.0, 2.0, 0.0, 2.0]]
    torch.testing.assert_close(head_vote(logits, "soft", 2, starts)[:, 1:], logits[..., 1:].softmax(2).sum(1))
    assert head_vote(logits, "soft", 2, torch.tensor([4])).tolist() == [[0.0] * 4]


def test_gqa_maps() -> None:
    query, key = normal(2, 6, 8), normal(2, 3, 10, 8, seed=1)
    for h in range(6):
        for name, kv in (("contiguous", h // 2), ("mod", h % 3)):
            want = torch.einsum("bd,bnd->bn", query[:, h], key[:, kv])
            torch.testing.assert_close(head_logits(query, key, name)[:, h], want)


# -- 1: within the budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_within_the_budget_it_is_dense(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = TokenSelect(n_init=4, k=50, n_local=10, chunk=8, positions=positions)
    for detour in (True, False):
        if not detour:
            monkeypatch.setattr(SelectingPolicy, "is_dense", lambda *a: False)
        stream = Stream()
        with method.attach(MODEL) as handle:
            got = stream.feed(handle, 40, *[1] * 24)
        torch.testing.assert_close(got, stream.dense(0), **CLOSE)


# -- 2: the set ----------------------------------------------------------------------------------------------------------


def test_the_set_is_sorted_unique_and_shared_by_heads() -> None:
    with TokenSelect(**SMALL, chunk=7).attach(MODEL) as handle, handle.runtime.recording() as trace:
        stream = Stream()
        stream.feed(handle, 30)
        policy: Any = handle.runtime.decode
        prefill, counts = policy.last_selection(1)  # the last chunk has 2 tokens, so n_local stands
        assert prefill.shape == (2, 12)
        assert counts.tolist() == [12, 12]
        stream.feed(handle, *[1] * 34)
    assert len(trace) == 3 * 34
    for _, length, rows, counts in trace:
        assert rows.shape == (2, 2, 12)
        assert torch.equal(rows[:, 0], rows[:, 1])
        assert bool((rows.diff(dim=2) > 0).all())
        assert bool((counts == 12).all())
        assert rows[0, 0, :2].tolist() == [0, 1]
        assert rows[0, 0, -4:].tolist() == list(range(length - 4, length))


def test_assemble_with_padding() -> None:
    selected = torch.tensor([[5, 8], [9, 11], [0, 0]], dtype=torch.int32)
    rows, counts = assemble(selected, torch.tensor([0, 6, 17]), 20, (2, 2, 2))
    assert rows[:2].tolist() == [[0, 1, 5, 8, 18, 19], [6, 7, 9, 11, 18, 19]]
    assert rows[2, :3].tolist() == [17, 18, 19]
    assert counts.tolist() == [6, 6, 3]


def test_parts_of_a_budget() -> None:
    assert TokenSelect().parts(10) == (128, 2048, 512)
    for total in (*range(1, 40), 256, 1000):
        parts = TokenSelect(tokens=total).parts(4096)
        assert sum(parts) == total
        assert min(parts) >= 0
        assert parts[2] >= 1
    assert sum(TokenSelect(tokens="1/16").parts(4096)) == 256


# -- 3, 4, 5: the vote ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 7.0, "1/sqrt(d)"])
@pytest.mark.parametrize("vote", ["soft", "raw", "hard"])
def test_with_one_head_it_is_plain_top_k(scale: float | str, vote: str) -> None:
    model = tiny_model("llama", num_attention_heads=1, num_key_value_heads=1, hidden_size=16)
    method = TokenSelect(**SMALL, theta=2.0, vote=vote, vote_scale=scale)
    query = 0.1 * normal(2, 1, 1, 16)  # small, so that no vote is rounded to zero
    key, value = normal(2, 2, 1, 40, 16, seed=1)
    with method.attach(model) as handle, handle.runtime.recording() as trace:
        runtime, cache = handle.runtime, GossamerCache()
        runtime._before_forward(model, (), {"past_key_values": cache})
        k, v = cache.update(key, value, 0)
        runtime.attention(runtime.views[0].module, query, k, v, None, 0.25, None, None, 0.0)
    best = (query @ key.transpose(2, 3))[:, 0, 0, 2:36].topk(6).indices + 2
    for b in range(2):
        want = {0, 1, *best[b].tolist(), *range(36, 40)}
        assert set(trace[0][2][b, 0].tolist()) == want


def test_a_loud_head_does_not_rule_the_soft_vote() -> None:
    logits = normal(1, 4, 50)
    loud = logits.clone()
    loud[:, 0] *= 100.0
    assert set(head_vote(loud, "raw", 5).topk(5).indices[0].tolist()) == set(loud[0, 0].topk(5).indices.tolist())
    for x in (logits, loud):
        torch.testing.assert_close(head_vote(x, "soft", 5).sum(1), torch.tensor([4.0]))
    quiet = head_vote(loud[:, 1:], "soft", 5)
    torch.testing.assert_close(head_vote(loud, "soft", 5) - quiet, loud[:, 0].softmax(1))  # one voice of four


def test_soft_vote_ignores_a_constant_per_head() -> None:
    logits, shift = normal(3, 4, 60), 10 * normal(3, 4, 1, seed=1)
    want, got = (head_vote(x, "soft", 5).topk(5).indices for x in (logits, logits + shift))
    assert torch.equal(want, got)
    assert not torch.equal(*(head_vote(x, "hard", 5).topk(5).indices for x in (logits, 2 * normal(3, 4, 60, seed=2))))


# -- 6: packed positions -------------------------------------------------------------------------------------------------


def test_packed_is_blind_to_what_is_not_selected() -> None:
    method, rotary = TokenSelect(**PACKED), Rotary(MODEL)
    stream = Stream(batch=1)
    with method.attach(MODEL) as handle:
        got = stream.feed(handle, 63, 1)[:, :, :, -1]
        policy: Any = handle.runtime.decode
        for layer in range(3):
            kept = policy.last_selection(layer)[0][0].long()
            at, new = kept, torch.arange(12)
            short = Stream(batch=1)
            for name in ("key", "value", "query"):
                setattr(short, name, getattr(stream, name)[:, :, :, kept])
            short.key = rotary.move(short.key, layer, at, new)
            short.query = rotary.move(short.query, layer, at, new)
            short.cache = GossamerCache()
            dense = short.feed(handle, 11, 1)[layer, :, :, -1]
            torch.testing.assert_close(got[layer], dense, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_rotary_is_the_models_own(family: str) -> None:
    model, captured = tiny_model(family), {}
    rotary = Rotary(model)
    layer = model.config.num_hidden_layers - 1
    view = TokenSelect().attach(model)
    attention = view.runtime.views[layer]
    hook = attention.k_source.register_forward_hook(lambda m, a, out: captured.update(key=out))
    cache = GossamerCache()
    model(ids(1, 50), past_key_values=cache)
    hook.remove()
    view.detach()
    key = captured["key"].reshape(1, 50, -1, cache.layers[layer].keys.shape[3]).transpose(1, 2)
    if family == "qwen3" or family == "gemma3":
        key = captured["key"] if captured["key"].shape[1] != 50 else captured["key"].transpose(1, 2)
    at = torch.arange(50)
    torch.testing.assert_close(rotary.undo(cache.layers[layer].keys, layer, at), key, atol=1e-4, rtol=1e-4)
    moved = rotary.move(cache.layers[layer].keys, layer, at, at + 1000)
    torch.testing.assert_close(rotary.undo(moved, layer, at + 1000), key, atol=1e-4, rtol=1e-4)


def test_packing_needs_a_rotary_that_can_be_undone() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for model in (tiny_model("gpt2"), tiny_model("llama", rope_parameters=dynamic)):
        with pytest.raises(ModelError, match="use positions='original'") as caught:
            TokenSelect(positions="packed").attach(model)
        assert "\n" not in str(caught.value)
        with TokenSelect(**SMALL).attach(model):
            model.generate(ids(1, 30), max_new_tokens=3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gemma3"])
def test_generate_packed(family: str) -> None:
    model, mask = tiny_model(family), torch.ones(2, 40, dtype=torch.long)
    mask[1, :15] = 0
    with TokenSelect(**PACKED, chunk=16).attach(model):
        out = model.generate(ids(2, 40), attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert out.shape == (2, 48)


@pytest.mark.parametrize("dropped", [0, 9])
def test_packed_after_rows_were_dropped(dropped: int) -> None:
    """A cache that evicts keeps each row's rotation; packing undoes it at the row's true position."""
    method, stream, results = TokenSelect(**PACKED, theta=2.0), Stream(batch=1), []
    keep = torch.arange(dropped, 40)[None, None].expand(1, 2, -1)
    for evict in (True, False):  # dropping first rows, or never having had them: relative positions are the same
        part = stream.pick(torch.tensor([0]), start=0 if evict else dropped)
        with method.attach(MODEL) as handle:
            part.feed(handle, 40 if evict else 40 - dropped)
            if evict:
                for layer in part.cache.layers:
                    layer.keep(keep)
                # what Stream feeds next starts at the tokens seen
            results.append(part.feed(handle, *[1] * 5))
    torch.testing.assert_close(*results, **CLOSE)


# -- 7: the Selection Cache ----------------------------------------------------------------------------------------------


def run(theta: float, stream: Stream, mask: Tensor | None = None) -> tuple[Tensor, Any, list[Any]]:
    with TokenSelect(**SMALL, theta=theta).attach(MODEL) as handle, handle.runtime.recording() as trace:
        out = stream.feed(handle, 40, *[1] * 24, mask=mask)[:, :, :, 40:]
        return out, handle, trace


def test_theta_above_one_is_no_cache_and_minus_one_selects_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    choose = TokenSelectPolicy._choose
    monkeypatch.setattr(TokenSelectPolicy, "_choose", lambda self, *a: calls.append(a[3]) or choose(self, *a))
    want, handle, _ = run(1.5, Stream())
    assert len(calls) == 3 * 24
    assert handle.runtime.decode.cache_hit_rate() == 0.0
    never, _, _ = run(0.9, Stream())  # unlike queries never hit
    assert torch.equal(never, want)
    calls.clear()
    _, handle, trace = run(-1.0, Stream())
    assert calls == [41] * 3
    assert handle.runtime.decode.cache_hit_rate() == pytest.approx(23 / 24)
    first = {layer: rows[:, 0, 2:8] for layer, length, rows, _ in trace if length == 41}
    for layer, length, rows, _ in trace:
        assert torch.equal(rows[:, 0, 2:8], first[layer])
        assert rows[0, 0, -4:].tolist() == list(range(length - 4, length))
    stats = handle.runtime.stats
    assert stats.score_bytes == 3 * 2 * (41 - 2 - 4) * 2 * 16 * 4  # read once per layer, for both sequences


def test_a_miss_changes_the_query_and_a_hit_does_not() -> None:
    """A query that drifts: each step is close to the last one, but in the end far from the first."""
    stream, angle = Stream(batch=1), torch.linspace(0, 1.5, 24)
    a, b = normal(2, 3, 1, 4 * 16, seed=5)
    a = a / a.norm(dim=2, keepdim=True)
    b = b - (a * b).sum(2, keepdim=True) * a
    b = b / b.norm(dim=2, keepdim=True)
    drift = 8 * (a[..., None] * angle.cos() + b[..., None] * angle.sin())
    stream.query[:, :, :, 40:] = drift.unflatten(2, (4, 16)).transpose(3, 4)
    _, handle, trace = run(0.9, stream)
    misses, last = 1, 0.0
    for x in angle[1:].tolist():
        if torch.tensor(x - last).cos() < 0.9:
            misses, last = misses + 1, x
    assert 1 < misses < 8
    assert handle.runtime.decode.cache_hit_rate() == pytest.approx(1 - misses / 24)
    assert len(trace) == 72


def test_each_sequence_has_its_own_cache() -> None:
    stream = Stream()
    stream.query[:, 0, :, 40:] = stream.query[:, 0, :, 40:41]  # the first sequence asks the same again and again
    together, handle, _ = run(0.9, stream)
    assert handle.runtime.decode.cache_hit_rate() == pytest.approx(23 / 48)
    for b in range(2):
        alone, _, _ = run(0.9, stream.pick(torch.tensor([b])))
        torch.testing.assert_close(together[:, b : b + 1], alone, **CLOSE)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :33] = False  # shorter than the budget at first: read whole, and not remembered
    padded, _, _ = run(0.9, stream.pick(torch.tensor([0, 1])), mask)
    torch.testing.assert_close(padded[:, :1], together[:, :1], **CLOSE)
    with TokenSelect(**SMALL, theta=0.9).attach(MODEL) as handle:
        short = stream.pick(torch.tensor([1]), start=33)
        want = short.feed(handle, 7, *[1] * 24)[:, :, :, 7:]
    torch.testing.assert_close(padded[:, 1:], want, **CLOSE)


def test_new_prefill_and_crops_forget_the_selection() -> None:
    stream = Stream(batch=1)
    with TokenSelect(**SMALL, theta=-1.0).attach(MODEL) as handle:
        policy: Any = handle.runtime.decode
        stream.feed(handle, 40, 1, 1)
        assert (policy.lookups, policy.hits) == (6, 3)
        stream.cache.crop(-1)  # behind the miss at 41: what it chose is still there
        stream.feed(handle, 1)
        assert (policy.lookups, policy.hits) == (9, 6)
        stream.cache.crop(-2)
        stream.feed(handle, 1)
        assert (policy.lookups, policy.hits) == (12, 6)
        stream.feed(handle, 5, 1)
        assert (policy.lookups, policy.hits) == (15, 6)


# -- 8: prefill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_chunks_of_one_are_decode_steps(positions: str) -> None:
    method = TokenSelect(**SMALL, theta=2.0, chunk=1, positions=positions)
    one, many = Stream(), Stream()
    with method.attach(MODEL) as handle:
        want = one.feed(handle, *[1] * 64)
        got = many.feed(handle, 20, 44)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_a_later_token_of_the_chunk_changes_nothing_before_it(positions: str) -> None:
    results = []
    for change in (False, True):
        stream = Stream()
        if change:  # keys and values only: the queries, and so I, stay
            stream.key[:, :, :, 60:] += 3.0
            stream.value[:, :, :, 60:] += 3.0
        with TokenSelect(**SMALL, chunk=16, positions=positions).attach(MODEL) as handle:
            results.append(stream.feed(handle, 64))
    torch.testing.assert_close(results[0][:, :, :, :60], results[1][:, :, :, :60], atol=0, rtol=0)
    assert bool((results[0][:, :, :, 60:] - results[1][:, :, :, 60:]).abs().max() > 0.1)


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_prefill_of_a_padded_batch(positions: str) -> None:
    """Padding of whole chunks changes nothing for the tokens behind it, and nothing is NaN."""
    method, mask, stream = TokenSelect(**SMALL, chunk=8, positions=positions), torch.ones(2, 64).bool(), Stream()
    mask[1, :24] = False
    with method.attach(MODEL) as handle:
        both = stream.feed(handle, 64, mask=mask)
        first = stream.pick(torch.tensor([0])).feed(handle, 64)
        second = stream.pick(torch.tensor([1]), start=24).feed(handle, 40)
        mask[1, :27] = False  # within a chunk: the mean query is that of the real tokens
        assert stream.pick(torch.tensor([0, 1])).feed(handle, 64, mask=mask).isfinite().all()
    assert both.isfinite().all()
    torch.testing.assert_close(both[:, :1], first, **CLOSE)
    torch.testing.assert_close(both[:, 1:, :, 24:], second, **CLOSE)


def test_phases() -> None:
    for phases, has in (("both", (True, True)), ("prefill", (False, True)), ("decode", (True, False))):
        with TokenSelect(**SMALL, chunk=8, phases=phases).attach(MODEL) as handle:
            runtime = handle.runtime
            assert (runtime.decode is not None, runtime.prefill is not None) == has
            stream = Stream()
            prefill, steps = stream.feed(handle, 40), stream.feed(handle, *[1] * 24)
        if phases == "both":
            assert runtime.decode is runtime.prefill
        whole = stream.dense(0)
        assert bool((prefill - whole[:, :, :, :40]).abs().max() > 1e-2) is has[1]
        assert bool((steps - whole[:, :, :, 40:]).abs().max() > 1e-2) is has[0]


def test_chunked_prefill_on_a_model_with_windows() -> None:
    model = tiny_model("gemma3")
    with TokenSelect(**SMALL, chunk=8).attach(model) as handle:
        assert model(ids(2, 60), use_cache=True).logits.isfinite().all()
        policy: Any = handle.runtime.prefill
        assert list(policy.last) == [3]  # the layers with a window read it densely


# -- 9: paging -----------------------------------------------------------------------------------------------------------


def test_a_scrambled_pool_is_the_same_bit_for_bit() -> None:
    query, (key, value) = normal(1, 4, 16), normal(2, 1, 2, 90, 16, seed=1)
    place = torch.randperm(90, generator=torch.Generator().manual_seed(2))  # row j lies at place[j]
    pool_k, pool_v = torch.empty_like(key), torch.empty_like(value)
    pool_k[:, :, place], pool_v[:, :, place] = key, value
    assert torch.equal(pool_k[:, :, place], key)
    assert torch.equal(head_logits(query, pool_k[:, :, place]), head_logits(query, key))
    rows = torch.tensor([0, 1, 7, 30, 55, 88, 89])
    want = ops.decode_attention(query, key, value, indices=rows.int().expand(1, 2, -1).contiguous())
    got = ops.decode_attention(query, pool_k, pool_v, indices=place[rows].int().expand(1, 2, -1).contiguous())
    assert torch.equal(want, got)


# -- pooling, cost, settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7, 100])
def test_max_pool_widens_and_keeps_the_size(kernel: int) -> None:
    votes = normal(2, 30)
    got = max_pool(votes, kernel)
    for j in range(30):
        low, high = max(0, j - (kernel - 1) // 2), min(30, j + kernel // 2 + 1)
        assert torch.equal(got[:, j], votes[:, low:high].amax(1))
    with TokenSelect(**SMALL, pool=kernel).attach(MODEL) as handle, handle.runtime.recording() as trace:
        Stream().feed(handle, 60, 1)
    assert all(rows[0, 0].unique().numel() == 12 for _, _, rows, _ in trace)


def test_bytes_by_hand() -> None:
    shape = ModelShape(2, 8, 2, 64)
    got = TokenSelect(n_init=4, k=20, n_local=8).io_bytes(1000, shape, 2)
    assert got == {"rows": 32 * 2 * 2 * 64 * 2, "scores": (1000 - 12) * 2 * 64 * 2}
    assert TokenSelect().io_bytes(1000, shape, 2) == {"rows": 1000 * 2 * 2 * 64 * 2, "scores": 0}
    assert model_shape(MODEL).kv_heads == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 0},
        {"n_local": 0},
        {"n_init": -1},
        {"chunk": 0},
        {"theta": -2},
        {"vote": "loud"},
        {"vote_scale": 0},
        {"vote_scale": "sqrt"},
        {"pool": -1},
        {"positions": "none"},
        {"gqa_map": "head"},
        {"phases": "train"},
        {"tokens": 0},
        {"pages": 3},
    ],
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        TokenSelect(**bad)
    assert "\n" not in str(caught.value)
    assert next(iter(bad)) in str(caught.value)


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_bfloat16(positions: str) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    method = TokenSelect(**SMALL, chunk=8, positions=positions)
    with method.attach(model) as handle:
        out = model(ids(2, 40), use_cache=True)
        step = model(ids(2, 1), past_key_values=out.past_key_values)
        assert handle.report()["rows_kept"] == pytest.approx(12 / 41)
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.isfinite().all()
    assert step.logits.isfinite().all()


def test_it_stacks_with_other_phases_and_refuses_the_same() -> None:
    stream = Stream()
    both = [(TokenSelect(**SMALL, chunk=8, phases="prefill"), None), (make("quest", tokens=16), None)]
    with attach(MODEL, both) as handle:
        stream.feed(handle, 40, 1, 1)
        assert handle.runtime.stats.steps == 6
    with pytest.raises(RecipeError, match="both claim attention in decode"):
        attach(MODEL, [(TokenSelect(**SMALL), None), both[1]])
