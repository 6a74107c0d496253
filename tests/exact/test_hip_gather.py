"""HiP's pooled heads, its cache in a slower tier, and SelfExtend's positions: against loops, masks and the plain method."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer.attention.hip_attention import HipAttention, attention, search
from gossamer.attention.hip_gather import TokenBank, extended_attention
from gossamer.errors import InputError, ModelError, OutputError
from gossamer.hf.rotary import Rotary, turn
from gossamer.models import tiny_model
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, Stream

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
SMALL: dict[str, Any] = {"budget": 16, "block_q": 8, "block_k": 2, "window": 12, "sink": 3}
STEP: dict[str, Any] = {"tokens": 8, "window": 6, "sink": 2, "dense_layers": (), "block_q": 8}


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(**settings: Any) -> Case:
    return Case(
        "hip-attention", {"tokens": 8, "window": 6, "sink": 2, "phases": "decode", **settings}, exact_count=False
    )


class TestHipGather(AttentionContract):
    cases: ClassVar[list[Case]] = [
        case(refresh=1, head_group=2),
        case(refresh=1, offload="file", bank=20),
    ]


# -- pooled heads -----------------------------------------------------------------------------------------------------


def pooled_search(query: Tensor, key: Tensor, blocks: int, nodes: int, group: int, block_k: int) -> list[list[int]]:
    """One query block: `query` ``[heads, rows, d]``, `key` the searched keys of each head ``[heads, T, d]``."""
    chosen: list[list[int]] = []
    edges = [blocks * i // nodes for i in range(nodes + 1)]
    for pool in range(0, len(query), group):
        segments = [(h, a, b - a) for h in range(pool, pool + group) for a, b in itertools.pairwise(edges)]
        while max(size for _, _, size in segments) > 1:
            halves = []
            for h, start, size in segments:
                halves += [(h, start, size // 2), (h, start + size // 2, size - size // 2)]

            def score(segment: tuple[int, int, int]) -> float:
                h, start, size = segment
                rep = start + size // 2
                keys = key[h, rep * block_k : (rep + 1) * block_k]
                return float((query[h, ::2] @ keys.T).max()) if size else -math.inf

            segments = sorted(halves, key=lambda s: -score(s))[: nodes * group]
        chosen += [sorted(s for o, s, size in segments if o == h and size) for h in range(pool, pool + group)]
    return chosen


@pytest.mark.parametrize("group", [2, 4])
def test_pooled_heads_compete_for_their_blocks(group: int) -> None:
    key, value = normal(2, 2, 2, 90, 8, seed=1)
    query = normal(2, 4, 90, 8) * torch.tensor([4.0, 1.0, 2.0, 0.5])[:, None, None]
    index = search(query, key, **SMALL, head_group=group)
    counts = index.counts.unflatten(1, (-1, group))
    for block in range(12):
        end = min(8 * block + 8, 90)
        total = max(0, end - 12 - 3)
        blocks = -(-total // 2)
        assert bool((counts[:, :, :, block].sum(2) == group * min(8, blocks)).all())
        rows = query[:, :, 8 * block : end]
        if end % 8:
            rows = torch.cat([rows, rows[:, :, :1].expand(-1, -1, 8 - end % 8, -1)], 2)
        for b in range(2):
            keys = key[b].repeat_interleave(2, 0)[:, 3 : 3 + total]
            want = pooled_search(rows[b], keys, blocks, 8, group, 2)
            got = [index.blocks[b, h, block, : int(index.counts[b, h, block])].tolist() for h in range(4)]
            assert got == want
    assert bool((index.counts[:, 0] > index.counts[:, 1]).any()), "loud heads get more"
    alone = search(query, key, **SMALL)
    assert torch.equal(index.evaluations, alone.evaluations)
    mask = index.to_mask()
    group_key, group_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    weights = ((query @ group_key.transpose(2, 3)) * 8**-0.5).masked_fill(~mask, -math.inf).softmax(-1)
    torch.testing.assert_close(attention(query, key, value, index), weights @ group_value, **CLOSE)


def test_bad_groups_are_one_line() -> None:
    with pytest.raises(InputError, match="no whole groups of 3"):
        HipAttention(head_group=3).attach(tiny_model("qwen2"))
    x = torch.zeros(1, 4, 40, 8)
    with pytest.raises(InputError, match="no whole groups"):
        search(x, x, head_group=3)
    for settings in (
        {"head_group": 2, "ensemble": 2},
        {"self_extend": 4, "phases": "decode"},
        {"self_extend": 4, "ensemble": 2},
        {"offload": "file", "phases": "prefill"},
        {"offload": "host", "head_group": 2},
    ):
        with pytest.raises(
            InputError, match=r"head_group works alone|self_extend changes|offload is for decode"
        ) as caught:
            make("hip-attention", **settings)
        assert "\n" not in str(caught.value)


# -- the slower tier --------------------------------------------------------------------------------------------------


def test_a_bank_gives_the_rows_and_keeps_the_latest_used() -> None:
    slow = normal(2, 2, 30, 4), normal(2, 2, 30, 4, seed=1)
    bank, generator = TokenBank(9), torch.Generator().manual_seed(0)
    recent: list[list[list[int]]] = [[] for _ in range(4)]  # rows of each line, by use
    hits = misses = 0
    for _ in range(40):
        ids = torch.randint(0, 30, (2, 4, 4), generator=generator)
        valid = torch.rand(2, 4, 4, generator=generator) < 0.8
        got = bank.rows(slow, ids, torch.device("cpu"), valid)
        for x, y in zip(got, slow, strict=True):
            want = y.repeat_interleave(2, 1).gather(2, ids[..., None].expand(-1, -1, -1, 4))
            torch.testing.assert_close(x[valid], want[valid], rtol=0, atol=0)
        for line in range(4):
            b, kv = divmod(line, 2)
            asked = set(ids[b, 2 * kv : 2 * kv + 2][valid[b, 2 * kv : 2 * kv + 2]].tolist())
            known = set(itertools.chain(*recent[line]))
            hits, misses = hits + len(asked & known), misses + len(asked - known)
            recent[line] = [[r for r in group if r not in asked] for group in recent[line]] + [sorted(asked)]
            while sum(map(len, recent[line])) > 9:  # the oldest go; of one call's any may
                oldest = next(g for g in recent[line] if g)
                here = [r for r in oldest if int(bank._table[line, r]) < 0]
                assert here, "something newer was thrown out"
                oldest.remove(here[0])
    assert (bank.hits, bank.misses) == (hits, misses)


def test_a_bank_makes_room_for_one_call() -> None:
    slow = (normal(1, 1, 30, 4),)
    bank = TokenBank(2)
    ids = torch.arange(11)[None, None]
    assert torch.equal(bank.rows(slow, ids, torch.device("cpu"))[0], slow[0][:, :, :11])


@pytest.mark.parametrize("offload", ["file", "host"])
@pytest.mark.parametrize("refresh", [1, 4])
def test_an_offloaded_cache_gives_the_same_outputs(offload: str, refresh: int) -> None:
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :16] = False
    for padding in (None, mask):
        outs = []
        for where in ("none", offload):
            with HipAttention(**STEP, refresh=refresh, offload=where, bank=20).attach(tiny_model("qwen2")) as handle:
                outs.append(Stream().feed(handle, 40, *[1] * 24, mask=padding))
        torch.testing.assert_close(*outs, **CLOSE)


def test_what_crosses_between_the_tiers_is_what_was_missed() -> None:
    with HipAttention(**STEP, offload="file", bank=64).attach(tiny_model("qwen2")) as handle:
        stream = Stream(batch=1)
        stream.feed(handle, 40)
        assert "score_hits" in handle.report()
        with handle.runtime.recording() as trace:
            stream.feed(handle, *[1] * 16)
        policy: Any = handle.runtime.decode
        report, slow_bytes = handle.report(), handle.runtime.stats.slow_bytes
    read: dict[tuple[int, int], set[int]] = {}
    asked = 0
    for layer, _, rows, counts in trace:
        for kv in range(2):
            wanted = {int(r) for h in (2 * kv, 2 * kv + 1) for r in rows[0, h, : int(counts[0, h])]}
            asked += len(wanted)
            read.setdefault((layer, kv), set()).update(wanted)
    first_times = sum(map(len, read.values()))  # nothing leaves a bank with room for all rows
    assert policy.found["attention"] == [asked - first_times, first_times]
    assert slow_bytes == first_times * 2 * 16 * 4 + policy.found["score"][1] * 16 * 4
    assert report["attention_hits"] == pytest.approx(1 - first_times / asked)
    assert report["attention_hits"] > 0.7


@pytest.mark.parametrize("phases", ["both", "decode"])
def test_banks_are_emptied_when_rows_change(phases: Any) -> None:
    outs = []
    for where in ("none", "file"):
        stream = Stream(batch=1)
        with HipAttention(**STEP, refresh=1, offload=where, phases=phases).attach(tiny_model("qwen2")) as handle:
            stream.feed(handle, 40, *[1] * 6)
            stream.cache.crop(-4)
            stream.key[:, :, :, 42:] += 1.0
            parts = [stream.feed(handle, *[1] * 5)]
            stream.cache.crop(-1)  # as many rows again, of other tokens
            stream.value[:, :, :, 46:] += 1.0
            parts.append(stream.feed(handle, 1, 1))
            stream.cache.crop(-3)
            stream.value[:, :, :, 44:] -= 2.0
            parts.append(stream.feed(handle, 6, 1, 1))
            outs.append(torch.cat(parts, 3))
    torch.testing.assert_close(*outs, **CLOSE)


def test_dense_layers_stay_near_and_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    with HipAttention(**{**STEP, "dense_layers": (0,)}, offload="file").attach(tiny_model("qwen2")) as handle:
        places = handle.runtime.decode.places  # type: ignore[union-attr]
        assert places is not None
        assert places[0] is not places[1] is places[2]
    folder = str(tmp_path / "missing")
    with (
        HipAttention(**STEP, offload="file", offload_folder=folder).attach(tiny_model("qwen2")) as handle,
        pytest.raises(OutputError, match="cannot keep the cache"),
    ):
        Stream().feed(handle, 8)


# -- SelfExtend -------------------------------------------------------------------------------------------------------

EXTEND: dict[str, Any] = {**STEP, "window": 10, "self_extend": 4, "phases": "both"}


def at_positions(stream: Stream, layer: int, rotary: Rotary, window: int, group: int) -> Tensor:
    """Scores of a stream whose states count as rotated for their rows, by SelfExtend's distances pair by pair."""
    length = stream.query.shape[3]
    rows = torch.arange(length)
    plain = [rotary.undo(x[layer], layer, rows) for x in (stream.query, stream.key)]
    scores = torch.empty(*stream.query.shape[1:4], length)
    for i in range(length):
        for j in range(i + 1):
            near = i - j < window
            at = i if near else i // group + window - window // group
            of = j if near else j // group
            q = turn(plain[0][:, :, i], *rotary.tables(layer, torch.tensor(at)))
            k = turn(plain[1][:, :, j], *rotary.tables(layer, torch.tensor(of))).repeat_interleave(2, 1)
            scores[:, :, i, j] = (q * k).sum(-1) * 0.25
    return scores


def test_dense_layers_read_at_extended_positions() -> None:
    """Prefill in a block, and decode: the pair-by-pair definition."""
    model = tiny_model("qwen2")
    settings = {**EXTEND, "dense_layers": (0, 1, 2)}
    stream = Stream(batch=1, length=40)
    with HipAttention(**settings).attach(model) as handle:
        got = stream.feed(handle, 34, *[1] * 6)
    scores = at_positions(stream, 1, Rotary(model), 10, 4)
    later = torch.ones(40, 40, dtype=torch.bool).triu(1)
    want = scores.masked_fill(later, -math.inf).softmax(-1) @ stream.value[1].repeat_interleave(2, 1)
    torch.testing.assert_close(got[1], want, atol=1e-4, rtol=1e-4)
    assert float((got - stream.dense(0)).abs().max()) > 1e-2


def test_sparse_layers_read_what_they_chose_at_extended_positions() -> None:
    model = tiny_model("qwen2")
    stream = Stream(batch=1, length=48)
    with HipAttention(**EXTEND, refresh=1).attach(model) as handle:
        prompt = stream.feed(handle, 40)
        with handle.runtime.recording() as trace:
            steps = stream.feed(handle, *[1] * 8)
        policy: Any = handle.runtime.prefill
        layer = stream.cache.layers[1].views[handle.runtime]
        rows = torch.arange(40)
        q = policy.far_queries(layer, stream.query[1][:, :, :40], rows)
        index = policy.find(layer, q, policy.far_keys(layer, stream.key[1][:, :, :40], rows), 8)
    scores = at_positions(stream, 1, Rotary(model), 10, 4)
    value = stream.value[1].repeat_interleave(2, 1)
    weights = scores[:, :, :40, :40].masked_fill(~index.to_mask(), -math.inf).softmax(-1)
    torch.testing.assert_close(prompt[1], weights @ value[:, :, :40], atol=1e-4, rtol=1e-4)
    for at, length, ids, counts in trace:
        if at != 1:
            continue
        for h in range(4):
            kept = ids[0, h, : int(counts[0, h])].long()
            weights = scores[0, h, length - 1, kept].softmax(0)
            torch.testing.assert_close(steps[1, 0, h, length - 41], weights @ value[0, h, kept], atol=1e-4, rtol=1e-4)


def test_a_group_of_one_changes_nothing_and_within_the_window_neither() -> None:
    x = normal(1, 2, 30, 8)
    key = normal(1, 1, 30, 8, seed=1)
    model = tiny_model("qwen2")
    stream = Stream(length=20)
    with HipAttention(**{**EXTEND, "window": 20}).attach(model) as handle:
        torch.testing.assert_close(stream.feed(handle, 16, *[1] * 4), stream.dense(0), **CLOSE)
    one = extended_attention(x, x, key, key, key, 5, 0.3)
    torch.testing.assert_close(one, extended_attention(x, 9 * x, key, -key, key, 30, 0.3), **CLOSE)


def test_extended_positions_of_padded_sequences_and_offloaded_ones() -> None:
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :16] = False
    stream = Stream()
    with HipAttention(**EXTEND).attach(tiny_model("qwen2")) as handle:
        together = stream.feed(handle, 56, *[1] * 8, mask=mask)
        short = stream.pick(torch.tensor([1]), start=16).feed(handle, 40, *[1] * 8)
    assert bool(together.isfinite().all())
    # A multiple of the group later, all distances are the same.
    torch.testing.assert_close(together[:, 1:, :, 16:], short, **CLOSE)
    with HipAttention(**EXTEND, offload="file").attach(tiny_model("qwen2")) as handle:
        torch.testing.assert_close(Stream().feed(handle, 56, *[1] * 8, mask=mask), together, **CLOSE)


def test_extension_reads_beyond_the_trained_length_in_generate() -> None:
    model = tiny_model("llama")
    ids = torch.randint(1, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    with HipAttention(**EXTEND).attach(model):
        assert model.generate(ids, max_new_tokens=6, do_sample=False).shape == (1, 66)


def test_layers_with_a_window_of_their_own_stay_as_they_are() -> None:
    model = tiny_model("mistral", sliding_window=14)
    ids = torch.randint(1, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    want = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with HipAttention(**EXTEND).attach(model):
        got = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for x, y in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    mixed = tiny_model("gemma3")
    with HipAttention(**EXTEND).attach(mixed):
        assert mixed.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 54)


def test_models_without_rotary_positions_are_refused() -> None:
    with pytest.raises(ModelError, match="use self_extend=1"):
        HipAttention(**EXTEND).attach(tiny_model("gpt2"))
