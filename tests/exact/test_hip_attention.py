"""HiP: the tree search against its pseudo-code, the union attention against a dense mask, decode against prefill."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer.attention import hip_attention as hip
from gossamer.attention.hip_attention import HipAttention, attention, search
from gossamer.errors import InputError
from gossamer.hf import model_shape
from gossamer.hf.attention import dense_attention
from gossamer.models import tiny_model
from gossamer.patterns.hierarchy import Found, HipIndex, Representative, descend, initial_segments, levels, vote
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, PrefillCase, PrefillContract, Stream

SMALL: dict[str, Any] = {"budget": 16, "block_q": 8, "block_k": 2, "window": 12, "sink": 3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(new: int = 90, length: int = 90, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two KV heads."""
    key, value = normal(2, batch, 2, length, 8, seed=seed + 1)
    return 2 * normal(batch, 4, new, 8, seed=seed), key, value


def masked_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query.double() @ key.double().transpose(2, 3)) * query.shape[3] ** -0.5
    out: Tensor = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.double()
    return out.to(query.dtype)


def pseudo_code(scores: Tensor, k: int) -> list[int]:
    """The paper's search for one query over the keys with these `scores`, 1-based as printed; rounding is half up."""
    total = len(scores)

    def round_up(x: float) -> int:
        return math.floor(x + 0.5)

    segments = [(round_up((j - 1) * total / k) + 1, round_up(j * total / k)) for j in range(1, k + 1)]
    for _ in range(math.ceil(math.log2(total))):
        branches = []
        for f, last in segments:
            m = round_up((f + last) / 2)
            branches += [(f, m - 1), (m, last)]
        branches = [b for b in branches if b[0] <= b[1]]
        best = sorted(branches, key=lambda b: -float(scores[round_up((b[0] + b[1]) / 2) - 1]))
        segments = best[:k]
    return sorted(f - 1 for f, _ in segments)


def block_search(query: Tensor, key: Tensor, blocks: int, nodes: int, settings: dict[str, Any]) -> list[int]:
    """The card's block search for one head and one query block: `query` ``[rows, d]``, `key` the searched keys ``[T, d]``."""
    size_k, which = settings["block_k"], settings.get("representative", "center")
    edges = [blocks * i // nodes for i in range(nodes + 1)]
    segments = [(a, b - a) for a, b in itertools.pairwise(edges)]
    while max(size for _, size in segments) > 1:
        halves = []
        for start, size in segments:
            halves += [(start, size // 2), (start + size // 2, size - size // 2)]

        def score(segment: tuple[int, int]) -> float:
            start, size = segment
            if size < 1:
                return -math.inf
            rep = {"center": start + size // 2, "first": start, "last": start + size - 1}[which]
            keys = key[rep * size_k : (rep + 1) * size_k][:: settings.get("stride_k", 1)]
            return float((query[:: settings.get("stride_q", 2)] @ keys.T).max())

        segments = sorted(halves, key=lambda s: -score(s))[:nodes]
    return sorted(start for start, size in segments if size)


def chosen(index: HipIndex, *line: int) -> list[int]:
    return index.blocks[line][: int(index.counts[line])].tolist()


# -- 1: a full budget is dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [90, 33, 1])
@pytest.mark.parametrize("change", [{"budget": 90}, {"window": 90}, {"budget": 76, "block_k": 1}])
def test_a_budget_or_window_over_everything_is_dense(change: dict[str, int], new: int) -> None:
    query, key, value = qkv(new)
    for starts in (None, torch.tensor([0, 21], dtype=torch.int32)):
        index = search(query, key, **{**SMALL, **change}, starts=starts)
        want = dense_attention(query, key, value, 8**-0.5, starts=starts)
        torch.testing.assert_close(attention(query, key, value, index), want, atol=1e-5, rtol=1e-5)
        assert int(index.evaluations.sum()) == 0


def test_without_causality_everything_is_searched() -> None:
    query, key, value = qkv(90)
    index = search(query, key, **{**SMALL, "budget": 90}, causal=False)
    want = masked_dense(query, key, value, torch.ones(90, 90, dtype=torch.bool))
    torch.testing.assert_close(attention(query, key, value, index), want, atol=1e-5, rtol=1e-5)
    index = search(query, key, **SMALL, causal=False)
    assert bool((index.counts == 8).all())
    assert int(index.to_mask().sum(-1).unique()) == 16
    want = masked_dense(query, key, value, index.to_mask())
    torch.testing.assert_close(attention(query, key, value, index), want, atol=1e-5, rtol=1e-5)


# -- 2: what is selected ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_k", [1, 2, 3])
@pytest.mark.parametrize("new", [200, 50])
def test_selected_blocks_are_distinct_in_range_and_causal(block_k: int, new: int) -> None:
    query, key, _ = qkv(new, 200)
    starts = torch.tensor([0, 40])
    settings = {**SMALL, "block_k": block_k}
    index = search(query, key, **settings, starts=starts)
    nodes = -(-16 // block_k)
    for b in range(2):
        for block in range(-(-new // 8)):
            last = min(200 - new + (block + 1) * 8, 200) - 1
            total = max(0, last + 1 - 12 - 3 - int(starts[b]))
            blocks = -(-total // block_k)
            for h in range(4):
                ids = chosen(index, b, h, block)
                assert ids == sorted(set(ids))
                assert len(ids) == min(nodes, blocks)
                assert all(0 <= i < blocks for i in ids)
    rows, valid = index.rows()
    limit = index.layout.region(query.device)[1][:, None, :, None]
    assert bool((rows < limit)[valid].all())


# -- 3, 5: the tree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "nodes"), [(64, 8), (65, 8), (100, 7), (7, 8), (1000, 3), (1, 1), (0, 4), (37, 1)])
def test_segments_stay_whole_and_scores_are_counted(blocks: int, nodes: int) -> None:
    parents: list[tuple[int, int]] = []
    calls = 0
    generator = torch.Generator().manual_seed(blocks)
    last: list[Tensor] = []

    def score(starts: Tensor, sizes: Tensor) -> Tensor:
        nonlocal calls, parents
        calls += 1
        halves = list(zip(starts[0].tolist(), sizes[0].tolist(), strict=True))
        pairs = list(zip(halves[:nodes], halves[nodes:], strict=True))
        merged = [(a[0], a[1] + b[1]) for a, b in pairs]
        assert all(b[0] == a[0] + a[1] for a, b in pairs), "the right half follows the left"
        if parents:
            assert {m for m in merged if m[1]} <= set(parents), "halves make up what was kept"
        else:
            assert sum(size for _, size in merged) == blocks
        covered = [i for start, size in halves for i in range(start, start + size)]
        assert len(covered) == len(set(covered)), "segments overlap"
        assert all(0 <= i < blocks for i in covered)
        parents = [h for h in halves if h[1]]
        last[:] = [sizes]
        return torch.rand(starts.shape, generator=generator)

    found = descend(torch.tensor([blocks]), nodes, score)
    first = initial_segments(torch.tensor([blocks]), nodes)[1]
    assert int(first.sum()) == blocks
    largest = int(first.max())
    depth = math.ceil(math.log2(largest)) if largest else 0
    assert calls == depth == int(levels(torch.tensor(blocks), nodes))
    assert int(found.evaluations) == 2 * nodes * depth
    assert int(found.counts) == min(nodes, blocks)
    assert not last or int(last[0].max()) <= 1
    assert found.blocks[0, : int(found.counts)].unique().numel() == int(found.counts)


def test_score_evaluations_of_a_prompt_and_their_growth() -> None:
    query, key, _ = qkv(512, 512, batch=1)
    index = search(query, key, **SMALL)
    for block in range(64):
        total = max(0, (block + 1) * 8 - 15)
        largest = math.ceil(math.ceil(total / 2) / 8)
        want = 2 * 8 * math.ceil(math.log2(largest)) if largest else 0
        assert index.evaluations[0, :, block].tolist() == [want] * 4


# -- 4, 6, 8: what the search finds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [8, 13, 32, 50])
def test_a_peak_is_found_where_centres_agree(total: int) -> None:
    found_some = 0
    for peak in range(total):
        scores = -(torch.arange(total) - peak).abs().float()
        agree = True

        def score(
            starts: Tensor, sizes: Tensor, scores: Tensor = scores, peak: int = peak, total: int = total
        ) -> Tensor:
            nonlocal agree
            values = scores[(starts + sizes // 2).clamp_max(total - 1)]
            holds = (starts <= peak) & (peak < starts + sizes)
            if agree:
                others = ~holds & (sizes > 0)
                agree = not bool(others.any()) or bool(values[holds] > values[others].max())
            return values

        found = descend(torch.tensor([total]), 1, score).blocks.item()
        if agree:
            assert found == peak
            found_some += 1
    assert found_some >= total // 2


def test_an_oracle_representative_gives_the_exact_top_blocks() -> None:
    values = torch.stack([torch.randperm(97, generator=torch.Generator().manual_seed(s)) for s in range(6)]).float()

    def score(starts: Tensor, sizes: Tensor) -> Tensor:
        block = torch.arange(97)
        inside = (block >= starts[..., None]) & (block < (starts + sizes)[..., None])
        return values[:, None].masked_fill(~inside, -math.inf).amax(-1)

    found = descend(torch.full((6,), 97), 10, score)
    assert torch.equal(found.blocks, values.topk(10).indices.sort().values.int())


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("times", [1, 3, 7, 16])
def test_single_query_search_is_the_papers_pseudo_code(k: int, times: int) -> None:
    query, key, _ = qkv(1, k * times, batch=1, seed=times)
    index = search(query, key, budget=k, block_q=1, block_k=1, sink=0, window=1, causal=False)
    for h in range(4):
        assert chosen(index, 0, h, 0) == pseudo_code(key[0, h // 2] @ query[0, h, 0], k)


@pytest.mark.parametrize("representative", ["center", "first", "last"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (3, 2)])
def test_block_search_is_the_cards_pseudo_code(representative: Representative, strides: tuple[int, int]) -> None:
    query, key, _ = qkv(75, 131)
    starts = torch.tensor([0, 17])
    settings = {**SMALL, "block_k": 3, "stride_q": strides[0], "stride_k": strides[1], "representative": representative}
    index = search(query, key, **settings, starts=starts)
    for b in range(2):
        for h in range(4):
            for block in range(10):
                rows = query[b, h, block * 8 : (block + 1) * 8]
                end = min(131 - 75 + (block + 1) * 8, 131) - 12
                keys = key[b, h // 2, int(starts[b]) + 3 : end]
                assert chosen(index, b, h, block) == block_search(rows, keys, -(-len(keys) // 3), 6, settings)


# -- 7: the union, each key once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [90, 41, 1])
@pytest.mark.parametrize("change", [{}, {"window": 1}, {"window": 5, "sink": 0}, {"block_q": 1}, {"sink": 30}])
def test_attention_is_the_masked_softmax_over_the_union(
    change: dict[str, int], new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = qkv(new)
    settings = {**SMALL, **change}
    for starts in (None, torch.tensor([0, 21], dtype=torch.int32)):
        index = search(query, key, **settings, starts=starts)
        got = attention(query, key, value, index)
        mask = torch.zeros(2, 4, new, 90, dtype=torch.bool)  # the union by its definition
        for b in range(2):
            start = int(starts[b]) if starts is not None else 0
            for t in range(new):
                i = 90 - new + t
                for h in range(4):
                    row = mask[b, h, t]
                    row[start : start + settings["sink"]] = True
                    for block in chosen(index, b, h, t // settings["block_q"]):
                        at = start + settings["sink"] + block * 2
                        last = 90 - new + min((t // settings["block_q"] + 1) * settings["block_q"], new) - 1
                        row[at : min(at + 2, last + 1 - settings["window"])] = True
                    row[max(start, i + 1 - settings["window"]) : i + 1] = True
                    row[i + 1 :] = False
                    row[i] = True
        assert torch.equal(index.to_mask(), mask)
        torch.testing.assert_close(got, masked_dense(query, key, value, mask), atol=1e-5, rtol=1e-5)
        with monkeypatch.context() as patch:  # any number of query blocks at a time
            patch.setattr(hip, "_CHUNK", 1)
            again = search(query, key, **settings, starts=starts)
            assert torch.equal(again.blocks, index.blocks)
            torch.testing.assert_close(attention(query, key, value, again), got, atol=1e-6, rtol=1e-6)


def test_views_of_a_larger_cache_and_bfloat16() -> None:
    query, key, value = qkv(90)
    storage = torch.full((2, 2, 2, 128, 8), math.nan)
    storage[0, :, :, :90], storage[1, :, :, :90] = key, value
    index = search(query, storage[0, :, :, :90], **SMALL)
    assert torch.equal(index.blocks, search(query, key, **SMALL).blocks)
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    for k, v in ((storage[0, :, :, :90], storage[1, :, :, :90]), tuple(turned)):
        assert torch.equal(attention(query, k, v, index), attention(query, key, value, index))
    q, k, v = (x.bfloat16() for x in (query, key, value))
    index = search(q, k, **SMALL)
    got = attention(q, k, v, index)
    assert got.dtype is torch.bfloat16
    want = attention(q.float(), k.float(), v.float(), index)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


# -- 9: decode and the policy -----------------------------------------------------------------------------------------

DECODE: dict[str, Any] = {"tokens": 10, "window": 6, "sink": 2, "refresh": 1, "dense_layers": (), "phases": "decode"}


def attached(**settings: Any) -> Any:
    return HipAttention(**{**DECODE, **settings}).attach(tiny_model("qwen2"))


@pytest.mark.parametrize("block_k", [1, 2])
def test_a_decode_step_is_the_last_row_of_prefill_with_single_query_blocks(block_k: int) -> None:
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :20] = False
    for padding in (None, mask):
        steps, prompt = Stream(), Stream()
        with torch.no_grad(), attached(block_k=block_k) as handle:
            want = steps.feed(handle, 40, *[1] * 24, mask=padding)[:, :, :, 40:]
        with torch.no_grad(), attached(block_k=block_k, phases="prefill", block_q=1) as handle:
            got = prompt.feed(handle, 64, mask=padding)[:, :, :, 40:]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_between_searches_tokens_that_leave_the_window_stay() -> None:
    with torch.no_grad(), attached(refresh=5, block_k=1) as handle:
        stream = Stream()
        stream.feed(handle, 40)
        with handle.runtime.recording() as trace:
            stream.feed(handle, *[1] * 12)
    kept: list[set[int]] = []
    for layer, length, ids, counts in trace:
        if layer:
            continue
        rows = set(ids[0, 0, : int(counts[0, 0])].tolist())
        assert len(rows) == int(counts[0, 0])
        assert set(range(length - 6, length)) | {0, 1} <= rows
        if length > 41 and length % 5:
            assert rows == kept[-1] | {length - 1}, "only the new token is added"
        else:
            assert len(rows) == 18
        kept.append(rows)
    assert len(kept) == 12


def test_a_new_prompt_block_and_a_rollback_search_again() -> None:
    policy: Any
    with torch.no_grad(), attached(refresh=12) as handle:
        policy, stream = handle.runtime.decode, Stream(batch=1)
        searched = []
        for action in (40, 1, 1, 3, 1, 1, -2, 1):
            if action == 3:
                handle.runtime.prefill = policy  # as with phases="both"
            if action < 0:
                stream.cache.crop(action)
            else:
                stream.feed(handle, action)
            handle.runtime.prefill = None
            searched.append(policy.evaluations)
    steps = [b > a for a, b in itertools.pairwise(searched)]
    assert steps == [True, False, True, True, False, False, True]


def test_prefill_ignores_padding_and_neighbours_and_takes_chunks() -> None:
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :16] = False
    settings = {"phases": "both", "block_q": 8, "block_k": 2}
    stream = Stream()
    long, short = stream.pick(torch.tensor([0])), stream.pick(torch.tensor([1]), start=16)
    chunks = stream.pick(torch.tensor([0]))
    with torch.no_grad(), attached(**settings) as handle:
        together = stream.feed(handle, 56, *[1] * 8, mask=mask)
        alone = long.feed(handle, 56, *[1] * 8), short.feed(handle, 40, *[1] * 8)
        parts = chunks.feed(handle, 24, 32, *[1] * 8)
    torch.testing.assert_close(together[:, :1], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:, 1:, :, 16:], alone[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts, alone[0], atol=1e-5, rtol=1e-5)
    assert bool((together[:, :1, :, :56] - stream.dense(0)[:, :1, :, :56]).abs().max() > 1e-2)


def test_later_query_blocks_change_nothing_before_them() -> None:
    results = []
    for later in (1.0, math.nan):
        query, key, value = qkv(64)[0], *qkv(64, 64)[1:]
        for x in (query, key, value):
            x[:, :, 48:] *= later
        index = search(query, key, **SMALL)
        results.append(attention(query, key, value, index)[:, :, :48])
    assert torch.equal(*results)
    assert bool(results[0].isfinite().all())


def test_dense_layers_and_short_prompts_are_exact() -> None:
    with torch.no_grad(), attached(phases="both", dense_layers=(0, -1), block_q=8) as handle:
        stream = Stream()
        got = stream.feed(handle, 60)
        want = stream.dense(0)[:, :, :, :60]
        for layer, exact in ((0, True), (1, False), (2, True)):
            assert torch.allclose(got[layer], want[layer], atol=1e-5) is exact
        short = Stream(length=18)
        torch.testing.assert_close(short.feed(handle, 18), short.dense(0), atol=1e-5, rtol=1e-5)


def test_generate_with_both_phases_and_a_wide_window_is_the_model() -> None:
    model = tiny_model("llama")
    ids = torch.randint(1, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    run: Callable[[], Tensor] = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)  # noqa: E731
    want = run()
    with HipAttention(tokens=40, window=16, sink=2, dense_layers=(), block_q=8).attach(model):
        assert torch.equal(run(), want)  # the keys beside sinks and window never exceed 40
    with HipAttention(tokens=8, window=4, sink=2, dense_layers=(), block_q=8).attach(model) as handle:
        assert run().shape == want.shape
        assert handle.report()["rows_kept"] < 0.8


def test_works_on_a_model_with_local_layers() -> None:
    model = tiny_model("gemma3")
    ids = torch.randint(1, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), HipAttention(tokens=8, window=8, sink=2, dense_layers=()).attach(model) as handle:
        cache = DynamicCache(config=model.config)
        assert bool(model(ids, past_key_values=cache).logits.isfinite().all())
        policy: Any = handle.runtime.prefill
        assert policy.evaluations > 0


# -- the ensemble -----------------------------------------------------------------------------------------------------


def test_an_ensembles_union_holds_each_member_and_votes_narrow_it() -> None:
    query, key, value = qkv(90)
    generator = torch.Generator().manual_seed(3)
    members = [search(query, key, **SMALL, jitter=5, generator=generator) for _ in range(3)]
    assert not torch.equal(members[0].blocks, members[1].blocks)
    found = [Found(m.blocks, m.counts, m.evaluations) for m in members]
    for threshold in (1, 2, 3):
        result = HipIndex(members[0].layout, *vote(found, threshold))
        for line in ((0, 0, 5), (1, 3, 9), (1, 2, 11)):
            ids = [i for m in members for i in chosen(m, *line)]
            assert chosen(result, *line) == sorted(i for i in set(ids) if ids.count(i) >= threshold)
        want = masked_dense(query, key, value, result.to_mask())
        torch.testing.assert_close(attention(query, key, value, result), want, atol=1e-5, rtol=1e-5)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"budget": 0}, {"block_q": 0}, {"block_k": 0}, {"window": 0}, {"sink": -1}, {"stride_q": 0}, {"stride_k": 0}],
)
def test_bad_search_settings_are_one_line(settings: dict[str, Any]) -> None:
    query, key, _ = qkv(8)
    with pytest.raises(InputError) as caught:
        search(query, key, **settings)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit_are_one_line() -> None:
    query, key, value = qkv(90)
    index = search(query, key, **SMALL)
    bad: list[Callable[[], Any]] = [
        lambda: search(query[:, :3], key),
        lambda: search(query, key[:1]),
        lambda: search(query, key[:, :, :50]),
        lambda: search(query[:, :, :0], key),
        lambda: search(query[0], key),
        lambda: search(query[..., :4], key),
        lambda: attention(query[:, :, :50], key, value, index),
        lambda: attention(query, key, value[:, :, :50], index),
    ]
    for run in bad:
        with pytest.raises(InputError) as caught:
            run()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"window": 0}, "window"),
        ({"representative": "random"}, "representative"),
        ({"votes": 2}, "votes"),
        ({"phases": "all"}, "phases"),
        ({"refresh": 0}, "refresh"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        make("hip-attention", **settings)
    assert "\n" not in str(caught.value)


def test_promised_bytes_by_hand() -> None:
    shape = model_shape(tiny_model("qwen2"))  # 4 heads of 16
    method = HipAttention(tokens=8, window=6, sink=2, refresh=4)
    got = method.io_bytes(64, shape, 4)  # 28 blocks in 4 segments of 7: 3 levels of 8 halves, 2 keys each
    assert got == {"rows": (8 + 6 + 2 + 1) * 4 * 2 * 64, "scores": 8 * 3 * 2 * 4 * 64 // 4}


def _case(**settings: Any) -> Case:
    exact = settings.pop("exact_count", False)
    fixed, row_wise = settings.pop("fixed_bytes", False), settings.pop("row_wise", True)
    small = {"tokens": 8, "window": 6, "sink": 2, "phases": "decode"}
    return Case("hip-attention", {**small, **settings}, exact_count=exact, fixed_bytes=fixed, row_wise=row_wise)


class TestHipContract(AttentionContract):
    cases: ClassVar[list[Case]] = [
        _case(refresh=1, fixed_bytes=True),
        _case(refresh=1, block_k=1, sink=0, exact_count=True, fixed_bytes=True),
        _case(refresh=1, tokens=2, window=1, representative="last", dense_layers=(-1,)),
        # Not row-wise: beam search drops a layer's state, so the next search comes earlier.
        _case(refresh=4, row_wise=False),
        _case(refresh=1, ensemble=2, row_wise=False),
    ]


# -- how much a prompt computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("new", "length", "window"), [(200, 200, 12), (50, 200, 12), (90, 90, 40), (33, 90, 90)])
def test_the_area_is_what_blocks_of_queries_compute(new: int, length: int, window: int) -> None:
    query, key, _ = qkv(new, length)
    index = search(query, key, **{**SMALL, "window": window})
    got = hip.computed_area(index)
    pairs = 0.0
    rows, valid = index.rows()
    for block in range(-(-new // 8)):
        positions = range(length - new + block * 8, min(length - new + block * 8 + 8, length))
        for b in range(2):
            keys = set(rows[b, 0, block][valid[b, 0, block]].tolist())
            keys |= set(range(3)) | set(range(max(0, positions[0] - window + 1), positions[-1] + 1))
            pairs += sum(j <= i for i in positions for j in keys) / 2
    assert float(got[0]) == pytest.approx(pairs / (sum(range(length - new + 1, length + 1))))


def test_the_report_tells_the_area_of_a_prompt() -> None:
    settings: dict[str, Any] = {"tokens": 8, "block_q": 8, "window": 12, "sink": 2}
    for dense, want in (((0, 1, 2), 1.0), ((), None)):
        with make("hip-attention", **settings, dense_layers=dense).attach(tiny_model("qwen2")) as handle:  # type: ignore[attr-defined]
            Stream(length=96).feed(handle, 96)
            area = handle.report()["prefill_area"]
        assert area == want if want else 0.2 < area < 0.6


class TestHipPrefill(PrefillContract):
    cases: ClassVar[list[PrefillCase]] = [
        PrefillCase(
            "hip-attention",
            {"tokens": 8, "block_q": 8, "window": 12, "sink": 2, "dense_layers": (), "phases": "prefill"},
            full={"window": 96},
        )
    ]
