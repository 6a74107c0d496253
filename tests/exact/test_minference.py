"""MInference: patterns against loops and masks, the index against its pseudo-code, the search, and the run on a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import ops
from gossamer.attention import attach
from gossamer.attention import minference_patterns as P
from gossamer.attention import minference_run as R
from gossamer.attention import minference_search as S
from gossamer.attention.minference import MInference
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, OutputError
from gossamer.hf import GossamerCache
from gossamer.hf.attention import dense_attention
from gossamer.measure.compare import calibration_tokens
from gossamer.models import LoadedModel, fingerprint, tiny_model
from gossamer.patterns import causal_pairs
from gossamer.registry import make
from gossamer.testing import AttentionContract, Case, PrefillCase, PrefillContract, Stream

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
SMALL = R.Online(last_q=16, sinks=2, local=8, block_size=16)
MIXED = R.Heads(torch.tensor([0, 1, 1, 2]), torch.tensor([3, 6, 20, 2]), torch.tensor([20, 12, 5, 1]))
TINY: dict[str, Any] = {"last_q": 16, "sinks": 2, "local": 4, "block_size": 8}
MODEL = tiny_model("qwen2")  # what Stream feeds: 3 layers, 4 query heads on 2 KV heads


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(length: int = 96, batch: int = 1, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two KV heads."""
    key, value = normal(2, batch, 2, length, dim, seed=seed + 1)
    return 2 * normal(batch, 4, length, dim, seed=seed), key, value


def masked_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query.double() @ key.double().transpose(2, 3)) * scale
    out: Tensor = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.double()
    return out.to(query.dtype)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(
    heads: R.Heads, query: Tensor, key: Tensor, value: Tensor, online: R.Online = SMALL, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, R.Scores]:
    scores = R.estimate(query, key, heads.kind, online, 0.3, starts)
    return *R.attend(query, key, value, heads, scores, online, 0.3, starts), scores


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


class TestMInference(AttentionContract):
    """Decode is dense. The suite's prompts are one block long, so that prefill is exact, as it wants."""

    cases: ClassVar[list[Case]] = [Case("minference", {}, full={}, sparse=False)]


class TestMInferencePrefill(PrefillContract):
    cases: ClassVar[list[PrefillCase]] = [
        PrefillCase("minference", {**TINY, "pattern": "vertical-slash", "k_v": 6, "k_s": 8}),
        PrefillCase("minference", {**TINY, "pattern": "a-shape", "n_init": 3, "n_local": 12}),
        PrefillCase("minference", {**TINY, "pattern": "block-sparse", "k_b": 3}),
        PrefillCase("minference", {**TINY, "area": 0.4}),
    ]


# -- 1: budgets that cover everything are dense -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [96, 90, 17])
@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (R.VERTICAL_SLASH, 96, 1),
        (R.VERTICAL_SLASH, 1, 96),
        (R.BLOCK_SPARSE, 6, 1),
        (R.A_SHAPE, 1, 96),
    ],
)
def test_a_covering_budget_is_dense(kind: int, first: int, second: int, length: int) -> None:
    query, key, value = qkv(length, batch=2)
    heads = R.Heads.uniform(kind, first, second, 4)
    assert bool(heads.cover(length, 16).all())
    for starts in (None, torch.tensor([0, 5], dtype=torch.int32)):
        out, area, _ = run(heads, query, key, value, starts=starts)
        want = dense_attention(query, key, value, 0.3, starts=starts)
        real = slice(5, None) if starts is not None else slice(None)
        torch.testing.assert_close(out[:, :, real], want[:, :, real], **CLOSE)
        assert starts is not None or area.tolist() == [1.0] * 4


# -- 2: masks ---------------------------------------------------------------------------------------------------------


def test_token_level_masks_equal_a_double_loop() -> None:
    length, verticals, slashes = 96, [3, 40, 95], [70, 5, 0]
    got = P.vertical_slash_mask(torch.tensor(verticals), torch.tensor(slashes), length)
    a_shape = P.a_shape_mask(length, 4, 10)
    for i in range(length):
        for j in range(length):
            assert bool(got[i, j]) == (j <= i and (j in verticals or i - j in slashes))
            assert bool(a_shape[i, j]) == (j <= i and (i - j < 10 or j < 4))


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(17, 120),
    k_v=st.integers(1, 40),
    k_s=st.integers(1, 40),
    size=st.sampled_from([4, 16, 32]),
    seed=st.integers(0, 99),
)
def test_the_kernel_reads_a_causal_superset(length: int, k_v: int, k_s: int, size: int, seed: int) -> None:
    query, key, _ = qkv(length, seed=seed)
    online = R.Online(16, 2, 6, size)
    heads = R.Heads.uniform(R.VERTICAL_SLASH, k_v, k_s, 4)
    lists = R.slash_lists(R.estimate(query, key, heads.kind, online, 0.3), heads, online)
    kernel = ops.vertical_slash_index(*lists, length, size).to_mask()
    token = P.vertical_slash_mask(*lists, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert bool((kernel | ~token).all())
    assert bool((causal | ~kernel).all())
    counted = R.slash_area(*lists, length, size)
    torch.testing.assert_close(counted, kernel.sum((2, 3)).double().mean(0) / causal_pairs(length))


def test_block_masks_hold_the_a_shape_and_areas_count_them() -> None:
    for length in (96, 90):
        for n_init, n_local in ((1, 1), (5, 20), (16, 32), (0, 33)):
            mask = P.a_shape_blocks(length, torch.tensor([n_init]), torch.tensor([n_local]), 16)[0, 0]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            tokens = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[:length, :length] & causal
            wanted = P.a_shape_mask(length, n_init, n_local)
            assert bool((tokens | ~wanted).all())
            for i in range(len(mask)):  # and no block too many
                for j in range(i + 1):
                    block = wanted[i * 16 : i * 16 + 16, j * 16 : j * 16 + 16]
                    assert bool(mask[i, j]) == (bool(block.any()) or i == j)
            assert P.block_area(mask, length, 16).item() == pytest.approx(int(tokens.sum()) / causal_pairs(length))


# -- 3: scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "last_q"), [(96, 16), (50, 64), (33, 1)])
def test_the_shear_sums_diagonals(length: int, last_q: int) -> None:
    query, key, _ = qkv(length, batch=2)
    seen = P.last_attention(query, key, last_q, 0.3)
    last_q = min(last_q, length)
    want = torch.zeros(2, 4, length)
    for r in range(last_q):
        for j in range(length):
            distance = length - last_q + r - j
            if distance >= 0:
                want[..., distance] += seen[..., r, j]
    slash, vertical = P.slash_scores(seen), P.vertical_scores(seen)
    torch.testing.assert_close(slash, want, **CLOSE)
    for scores in (slash, vertical):
        torch.testing.assert_close(scores.sum(-1), torch.full((2, 4), float(last_q)), **CLOSE)


def test_scores_do_not_depend_on_how_many_heads_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = qkv(batch=2)
    want = P.vertical_slash_scores(query, key, 0.3, 16)
    monkeypatch.setattr(P, "_CHUNK", 1)
    for a, b in zip(want, P.vertical_slash_scores(query, key, 0.3, 16), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_padding_changes_nothing_of_a_choice() -> None:
    """Kernels may round differently at a sequence's beginning; what is asked for is the same, only later."""
    query, key, value = qkv(80)
    pad = torch.nn.functional.pad
    padded = [pad(x, (0, 0, 16, 0), value=7.0) for x in (query, key, value)]
    starts = torch.tensor([16], dtype=torch.int32)
    _, _, scores = run(MIXED, query, key, value)
    out, _, later = run(MIXED, *padded, starts=starts)
    assert later.vertical is not None
    assert bool((later.vertical[..., :16] == -math.inf).all())
    for head in (1, 2):  # of the vertical-slash heads
        (columns, distances), (shifted, same) = (R.slash_lists(s, MIXED, SMALL) for s in (scores, later))
        assert (set((columns + 16)[0, head].tolist()), distances[0, head].tolist()) == (
            set(shifted[0, head].tolist()),
            same[0, head].tolist(),
        )
    mask = R.block_mask(scores, MIXED, SMALL, 80)
    assert torch.equal(R.block_mask(later, MIXED, SMALL, 96, starts)[:, :, 1:, 1:], mask)
    slash = ops.vertical_slash_index(*R.slash_lists(later, MIXED, SMALL), 96, 16).to_mask()
    blocks = R.block_mask(later, MIXED, SMALL, 96, starts).repeat_interleave(16, 2).repeat_interleave(16, 3)
    mask = torch.where((MIXED.kind == R.VERTICAL_SLASH)[:, None, None], slash, blocks).tril()
    mask[..., :16] = False
    want = masked_dense(*padded, mask, 0.3)
    torch.testing.assert_close(out[:, :, 16:], want[:, :, 16:], **CLOSE)


# -- 4: the index against its pseudo-code -----------------------------------------------------------------------------


def walk(verticals: list[int], slashes: list[int], m: int, size: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The card's step 6 for one row block: ranges (a multiple of `size` wide) and single columns."""
    e, ranges = m + size, []
    a = b = -1
    for distance in (d for d in slashes if d < e):
        r = max(e - distance, size)
        if a < 0:
            a, b = r - size, r
        elif r > b + size:
            ranges.append((a, b))
            a, b = r - size, r
        elif r > b:
            b += size
    if a >= 0:
        ranges.append((a, b))
    inside = {j for a, b in ranges for j in range(a, b)}
    return ranges, [j for j in verticals if j < e and j not in inside]


@pytest.mark.parametrize(("length", "size"), [(96, 16), (90, 16), (40, 64)])
def test_the_index_is_the_walk(length: int, size: int) -> None:
    generator = torch.Generator().manual_seed(length)
    for _ in range(10):
        verticals = torch.randperm(length, generator=generator)[:9].sort().values
        slashes = torch.randperm(length - 1, generator=generator)[:7].add(1).sort(descending=True).values
        slashes = torch.cat([slashes, torch.zeros(1, dtype=torch.int64)])
        index = ops.vertical_slash_index(verticals[None, None].int(), slashes[None, None].int(), length, size)
        mask = index.to_mask()[0, 0]
        for block, m in enumerate(range(0, length, size)):
            ranges, columns = walk(verticals.tolist(), slashes.tolist(), m, size)
            keys = {j for a, b in ranges for j in range(a, b)} | set(columns)
            assert index.columns[0, 0, block, : int(index.column_counts[0, 0, block])].tolist() == columns
            for i in range(m, min(m + size, length)):
                assert set(mask[i].nonzero()[:, 0].tolist()) == {j for j in keys if j <= i}
                for j in range(i + 1):  # and everything that was asked for
                    assert j in keys or not (j in verticals.tolist() or i - j in slashes.tolist())


@pytest.mark.parametrize("size", [16, 64])
def test_the_quick_area_is_close_to_the_count(size: int) -> None:
    query, key, _ = qkv(1024)
    online = R.Online(16, 2, 16, size)
    for k_v, k_s in ((10, 20), (60, 5), (200, 60)):
        heads = R.Heads.uniform(R.VERTICAL_SLASH, k_v, k_s, 4)
        lists = R.slash_lists(R.estimate(query, key, heads.kind, online, 0.3), heads, online)
        exact, quick = (R.slash_area(*lists, 1024, size, how) for how in (True, False))
        torch.testing.assert_close(quick, exact, rtol=0.05, atol=0.005)


@pytest.mark.parametrize("dense_rows", [0, 40])
def test_the_quick_area_of_blocks(dense_rows: int) -> None:
    for length in (800, 790):
        query, key, _ = qkv(length)
        online = R.Online(16, 2, 8, 16, dense_rows)
        heads = R.Heads(torch.tensor([0, 0, 2, 2]), torch.tensor([40, 3, 3, 60]), torch.tensor([100, 33, 1, 1]))
        exact = R.areas(R.estimate(query, key, heads.kind, online, 0.3), heads, online, length)
        quick = R.quick_block_area(heads, online, length)
        torch.testing.assert_close(quick[:2], exact[:2])
        torch.testing.assert_close(quick[2:], exact[2:], rtol=0.15, atol=0.0)


# -- 5, 8: the output is dense attention under the mask, head by head -------------------------------------------------


@pytest.mark.parametrize("length", [96, 90])
def test_heads_with_different_patterns_are_served_together(length: int) -> None:
    query, key, value = qkv(length, batch=2)
    out, area, scores = run(MIXED, query, key, value)
    slash = ops.vertical_slash_index(*R.slash_lists(scores, MIXED, SMALL), length, 16).to_mask()
    blocks = R.block_mask(scores, MIXED, SMALL, length).expand(2, -1, -1, -1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    tokens = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :length, :length] & causal
    mask = torch.where((MIXED.kind == R.VERTICAL_SLASH)[:, None, None], slash, tokens)
    torch.testing.assert_close(out, masked_dense(query, key, value, mask, 0.3), **CLOSE)
    torch.testing.assert_close(area, mask.sum((2, 3)).double().mean(0) / causal_pairs(length))


def test_each_head_is_as_if_alone() -> None:
    query, key, value = qkv()
    together, area, _ = run(MIXED, query, key, value)
    for head in range(4):
        one = R.Heads(*(x[head : head + 1] for x in MIXED))
        kv = slice(head // 2, head // 2 + 1)
        out, alone, _ = run(one, query[:, head : head + 1], key[:, kv], value[:, kv])
        torch.testing.assert_close(out[:, 0], together[:, head], **CLOSE)
        assert float(alone[0]) == pytest.approx(float(area[head]))


def test_bfloat16_is_served_with_scores_in_float32() -> None:
    states = [x.bfloat16() for x in qkv(90)]
    out, _, scores = run(MIXED, *states)
    want, _, same = run(MIXED, *(x.float() for x in states))
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(scores, same)
    torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=2e-2)


# 6, A-shape in two passes, is in test_a_shape.


# -- 7: planted patterns ----------------------------------------------------------------------------------------------


def planted(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[1, 1, S, S]`` whose causal attention is `weights` but for 1e-6."""
    return (weights.clamp_min(1e-9).log())[None, None], torch.eye(len(weights))[None, None]


def kept_mass(weights: Tensor, mask: Tensor) -> float:
    causal = torch.ones_like(weights).tril() * weights.clamp_min(1e-9)
    return float(((causal * mask).sum(1) / causal.sum(1)).mean())


def test_columns_and_a_distance_are_found() -> None:
    length = 256
    weights = torch.zeros(length, length)
    weights[:, [3, 77]] = 1.0
    weights[torch.arange(5, length), torch.arange(length - 5)] += 1.0
    weights = weights.tril() + torch.eye(length) * (weights.tril().sum(1) == 0)
    query, key = planted(weights)
    online = R.Online(64, 0, 1, 16)
    heads = R.Heads.uniform(R.VERTICAL_SLASH, 2, 2, 1)
    lists = R.slash_lists(R.estimate(query, key, heads.kind, online, 1.0), heads, online)
    assert lists[0].flatten().tolist() == [3, 77]
    assert lists[1].flatten().tolist() == [5, 0]
    assert kept_mass(weights, P.vertical_slash_mask(*lists, length)[0, 0]) >= 0.99


def test_blocks_beat_columns_and_diagonals_on_a_head_of_blocks() -> None:
    size, blocks = 64, 12
    length = size * blocks
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(blocks, blocks, generator=generator).tril().argmax(1)  # one dense block a row of blocks
    direction = torch.nn.functional.normalize(normal(blocks, 64), dim=1)
    key = direction.repeat_interleave(size, 0)[None, None] + 0.02 * normal(1, 1, length, 64, seed=1)
    query = 20 * direction[chosen].repeat_interleave(size, 0)[None, None] + 0.02 * normal(1, 1, length, 64, seed=2)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = (query[0, 0] @ key[0, 0].T).masked_fill(~causal, -math.inf).softmax(-1)
    online = R.Online(64, 4, 16, size)
    kinds = torch.tensor([R.VERTICAL_SLASH, R.BLOCK_SPARSE])
    scores = R.estimate(query, key, kinds, online, 1.0)
    block = R.Heads.uniform(R.BLOCK_SPARSE, 2, 1, 1)
    goal = float(R.areas(scores, block, online, length)[0])
    slash = R.fit_area(scores, R.Heads.uniform(R.VERTICAL_SLASH, 100, 100, 1), online, length, goal)
    mask = R.block_mask(scores, block, online, length)[0, 0].repeat_interleave(size, 0).repeat_interleave(size, 1)
    slashes = ops.vertical_slash_index(*R.slash_lists(scores, slash, online), length, size).to_mask()[0, 0]
    assert R.areas(scores, slash, online, length)[0] == pytest.approx(goal, rel=0.2)
    assert float((weights * mask).sum(1).mean()) > float((weights * slashes).sum(1).mean()) + 0.1


# -- 9: the search ----------------------------------------------------------------------------------------------------

PLAN = S.Plan(target=(1024, 4096), scale=0.01)


def searched(length: int = 400, plan: S.Plan = PLAN) -> tuple[S.Found, tuple[Tensor, Tensor, Tensor]]:
    states = qkv(length)
    found, out = S.search_layer(*states, 0.3, SMALL, plan)
    torch.testing.assert_close(out, dense_attention(*states, 0.3), **CLOSE)
    return found, states


def test_the_search_takes_the_least_error_of_those_that_fit() -> None:
    found, (query, key, value) = searched()
    again, _ = searched()
    for a, b in zip((*found.heads, found.score), (*again.heads, again.score), strict=True):
        assert torch.equal(a, b)
    length, dense = 400, dense_attention(query, key, value, 0.3)
    goal = P.a_shape_area(length, 10, 41, 16)
    scores = R.estimate(query, key, torch.tensor([1, 2]), SMALL, 0.3)
    errors = []
    for candidate in PLAN.candidates:
        heads, area = S.candidate_heads(candidate, scores, SMALL, length, 4, goal, PLAN)
        out, counted = R.attend(query, key, value, heads, scores, SMALL, 0.3)
        torch.testing.assert_close(area, counted)
        error = (out - dense)[0].flatten(1).norm(dim=1)
        errors.append(error.masked_fill(area > goal * 1.02, math.inf))
    torch.testing.assert_close(found.score, torch.stack(errors).min(0).values)
    assert bool((found.area <= goal * 1.02).all())
    assert PLAN.candidates[0] == (R.A_SHAPE, 10, 41, None)


def test_candidates_end_one_step_below_the_target() -> None:
    _, (query, key, _) = searched()
    scores = R.estimate(query, key, torch.tensor([1, 2]), SMALL, 0.3)
    goal = P.a_shape_area(400, 40, 100, 16)
    plan = S.Plan(step=4, epsilon=0.0)
    for candidate, step in (((1, 4, 1, "second"), 4), ((1, 1, 8, "first"), 4), ((2, 1, 0, "first"), 1)):
        made = S.Candidate(*candidate)
        heads, area = S.candidate_heads(made, scores, SMALL, 400, 4, goal, plan)
        more = heads._replace(**{made.moves: getattr(heads, made.moves or "") + 2 * step})
        assert bool((area <= goal).all())
        assert bool((R.areas(scores, more, SMALL, 400) > goal).all()), candidate
        assert bool((getattr(heads, made.moves or "") % step == 0).all())


def test_a_candidate_may_keep_its_ratio() -> None:
    _, (query, key, _) = searched()
    scores = R.estimate(query, key, torch.tensor([1, 2]), SMALL, 0.3)
    goal = P.a_shape_area(400, 40, 100, 16)
    heads, area = S.candidate_heads(S.Candidate(1, 64, 24, "both"), scores, SMALL, 400, 4, goal, S.Plan(epsilon=0.0))
    assert bool((area <= goal).all())
    assert bool((area > 0.8 * goal).all())
    torch.testing.assert_close(heads.first / heads.second, torch.full((4,), 64 / 24), rtol=0.1, atol=0.0)


def test_a_candidate_that_cannot_be_cheap_enough_is_out() -> None:
    wide = R.Online(16, 100, 100, 16)  # forced sinks and band cost more than the target
    found, _ = S.search_layer(*qkv(400), 0.3, wide, S.Plan(target=(16, 16), space=S.PAPER_SPACE[:1]))
    assert found.heads.kind.tolist() == [R.A_SHAPE] * 4


def test_released_search_scores_mass_and_renames_its_winners() -> None:
    plan = S.Plan("released", scale=0.05)
    found, (query, key, _) = searched(plan=plan)
    assert found.heads.kind.tolist() == [R.VERTICAL_SLASH] * 4
    weights = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3)[0]
    weights = weights.masked_fill(torch.ones(400, 400, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    mask = P.a_shape_mask(400, 5, 40)
    heads = R.Heads.uniform(R.A_SHAPE, 5, 40, 4)
    scores = R.estimate(query, key, torch.tensor([1]), SMALL, 0.3)
    got = S.retained_mass(query, key, 0.3, [S.token_mask(heads, scores, SMALL, 400)], 125)
    torch.testing.assert_close(got[0], (weights * mask)[:, 125:].sum(2).mean(1), **CLOSE)
    slash = R.Heads.uniform(R.VERTICAL_SLASH, 7, 9, 4)
    tokens = P.vertical_slash_mask(*R.slash_lists(scores, slash, SMALL), 400)[0]
    got = S.retained_mass(query, key, 0.3, [S.token_mask(slash, scores, SMALL, 400)], 125)
    torch.testing.assert_close(got[0], (weights * tokens)[:, 125:].sum(2).mean(1), **CLOSE)
    winners = S.Found(MIXED, torch.zeros(4), torch.zeros(4))
    renamed = S._renamed(winners).heads
    assert [tuple(int(x[h]) for x in renamed) for h in range(4)] == [
        (1, 3, 20),
        (1, 6, 12),
        (1, 20, 5),
        (1, 1000, 6096),
    ]
    outputs, _ = searched(plan=S.Plan("released-outputs", scale=0.05))
    assert outputs.heads.kind.tolist() == [R.VERTICAL_SLASH] * 4


# -- area -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [0.3, 0.5, 1.0])
def test_budgets_are_fitted_to_an_area(goal: float) -> None:
    query, key, _ = qkv(800)
    online = R.Online(16, 2, 8, 16)
    scores = R.estimate(query, key, MIXED.kind, online, 0.3)
    heads = R.fit_area(scores, MIXED, online, 800, goal)
    area = R.areas(scores, heads, online, 800)
    assert bool((area <= goal * 1.03).all())
    assert bool((area >= goal * 0.8).all()), area


# -- on a model -------------------------------------------------------------------------------------------------------

MODEL_SETTINGS: dict[str, Any] = {**TINY, "pattern": "vertical-slash", "k_v": 6, "k_s": 8}


def feed(
    stream: Stream, sizes: list[int], mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, dict[str, Any], Any]:
    with make("minference", **{**MODEL_SETTINGS, **settings}).attach(MODEL) as handle:  # type: ignore[attr-defined]
        return stream.feed(handle, *sizes, mask=mask), handle.report(), handle.runtime.said


@pytest.mark.parametrize("pattern", ["vertical-slash", "a-shape", "block-sparse"])
def test_prefill_is_sparse_and_reports_what_it_computed(pattern: str) -> None:
    small = {"pattern": pattern, "k_b": 2, "n_init": 3, "n_local": 12}
    stream = Stream(length=96)
    out, report, _ = feed(stream, [96], **small)
    assert float((out - stream.dense(0)).abs().max()) > 1e-2
    assert 0.1 < report["prefill_area"] < 0.9
    shares = torch.tensor(list(report["prefill_area_of_heads"].values()))
    assert shares.shape == (3, 4)
    assert float(shares.mean()) == pytest.approx(report["prefill_area"])
    _, report, _ = feed(Stream(length=96), [96], starting_layer=2, **small)
    dense = report["prefill_area_of_heads"]
    assert dense[0] == dense[1] == [1.0] * 4
    assert max(dense[2]) < 1


def test_area_reaches_the_model() -> None:
    for area in (0.4, "1/2"):
        _, report, _ = feed(Stream(length=256), [256], area=area)
        assert report["prefill_area"] == pytest.approx(float(make("minference", area=area).area), rel=0.15)  # type: ignore[attr-defined]


def test_ratio_scales_the_budgets() -> None:
    _, one, _ = feed(Stream(length=256), [256])
    _, four, _ = feed(Stream(length=256), [256], minference_ratio=4)
    _, same, _ = feed(Stream(length=256), [256], k_v=24, k_s=32)
    assert one["prefill_area"] < four["prefill_area"] == same["prefill_area"]


@pytest.mark.parametrize(
    ("sizes", "settings", "reason"),
    [
        ([40, 24], {"block_size": 64}, "one block"),
        ([64], {"k_v": 64}, "cover"),
        ([1, 40], {}, "whole prompt"),
    ],
)
def test_what_cannot_be_sparse_is_dense_and_said(sizes: list[int], settings: dict[str, Any], reason: str) -> None:
    stream = Stream()
    out, report, said = feed(stream, sizes, **settings)
    torch.testing.assert_close(out, stream.dense(0)[:, :, :, : sum(sizes)], **CLOSE)
    assert report["prefill_area"] == 1.0
    assert any(reason in line for line in said.values())


def test_a_window_of_the_layer_is_kept() -> None:
    model, text = tiny_model("gemma3"), ids(1, 96)
    plain = model(text).logits
    with make("minference", **MODEL_SETTINGS).attach(model) as handle:  # type: ignore[attr-defined]
        model(text, use_cache=True)
        areas = handle.report()["prefill_area_of_heads"]
        assert [max(a) < 1 for a in areas.values()] == [False, False, False, True]
        assert any("window" in line for line in handle.runtime.said.values())
    torch.testing.assert_close(model(text).logits, plain)


@pytest.mark.parametrize("pattern", ["a-shape", "block-sparse"])
def test_padding_by_whole_blocks_equals_each_prompt_alone(pattern: str) -> None:
    model = tiny_model("llama")
    long, short = ids(1, 96, seed=1), ids(1, 80, seed=2)
    batch = torch.cat([long, torch.nn.functional.pad(short, (16, 0))])
    mask = torch.ones_like(batch)
    mask[1, :16] = 0
    small = {**TINY, "pattern": pattern, "n_init": 3, "n_local": 12, "k_b": 3}
    with make("minference", **small).attach(model):  # type: ignore[attr-defined]
        both = model(batch, attention_mask=mask, use_cache=True).logits
        torch.testing.assert_close(both[0], model(long, use_cache=True).logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both[1, 16:], model(short, use_cache=True).logits[0], atol=1e-4, rtol=1e-4)


def test_it_stacks_with_a_decode_method() -> None:
    pair = [(make("minference", **MODEL_SETTINGS), None), (make("streaming-llm", tokens=12), None)]
    with attach(MODEL, pair) as handle:  # type: ignore[arg-type]
        cache = GossamerCache()
        MODEL(ids(1, 96), past_key_values=cache)
        MODEL(ids(1, 1), past_key_values=cache)
        report = handle.report()
    assert report["prefill_area"] < 1
    assert report["rows_kept"] < 1


def test_uncalibrated_heads_are_vertical_slash_and_it_is_said() -> None:
    heads = MInference().layers(MODEL, None)[2]
    assert heads is not None
    assert [x.tolist() for x in heads] == [[R.VERTICAL_SLASH] * 4, [1000] * 4, [6096] * 4]
    with MInference(**TINY, k_v=6, k_s=8).attach(MODEL) as handle:
        MODEL(ids(1, 96), use_cache=True)
        assert any("not calibrated: every head is vertical-slash(6, 8)" in s for s in handle.runtime.said.values())


# -- calibration: save, load, import, and bad ones --------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return MInference(**TINY, scale=0.01).calibrate(MODEL, ids(1, 400))


def test_a_calibration_is_a_pattern_for_every_head(calibration: Calibration, tmp_path: Path) -> None:
    assert calibration.tensors["kind"].shape == (3, 4)
    assert calibration.facts["search"] == "paper"
    method = MInference(**TINY)
    loaded = Calibration.load(calibration.save(tmp_path / "c.safetensors"))
    for made in (calibration, loaded):
        heads = method.layers(MODEL, made)[1]
        assert heads is not None
        assert torch.equal(heads.kind, calibration.tensors["kind"][1])
    with method.attach(MODEL, loaded) as handle:
        MODEL(ids(1, 400, seed=5), use_cache=True)
        goal = P.a_shape_area(400, 10, 41, 8)
        assert handle.report()["prefill_area"] == pytest.approx(goal, rel=0.35)
        assert not handle.runtime.said


def test_config_files_go_both_ways(calibration: Calibration, tmp_path: Path) -> None:
    path = MInference().export_calibration(calibration, tmp_path / "config.json")
    back = MInference().import_calibration(path, MODEL)
    assert torch.equal(back.tensors["kind"], calibration.tensors["kind"])
    assert torch.equal(back.tensors["budget"], calibration.tensors["budget"])
    torch.testing.assert_close(back.tensors["score"], calibration.tensors["score"])
    with pytest.raises(OutputError, match="cannot write"):
        MInference().export_calibration(calibration, tmp_path / "missing" / "config.json")


def test_an_official_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    rows = [
        {
            "0": ["vertical_and_slash", 30, 800, 0.9],
            "1": ["stream_llm", 100, 800, 0.8],
            "3": ["block_sparse", 1000, 6096, 1],
        },
        {"2": ["vertical_and_slash", 3500, 100, 0.9]},
        {},
    ]
    path.write_text(json.dumps(rows))
    found = MInference().import_calibration(path, MODEL)
    heads = MInference().layers(MODEL, found)[0]
    assert heads is not None
    assert [tuple(int(x[h]) for x in heads) for h in range(4)] == [
        (1, 30, 800),
        (0, 100, 800),
        (1, 1000, 6096),
        (2, 100, 1),
    ]
    assert found.tensors["budget"][1, 2].tolist() == [3500, 100]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        {},
        [{}],
        [{}, {}, {"4": ["vertical_and_slash", 30, 800, 0.9]}],
        [{}, {}, {"0": ["diagonal", 30, 800, 0.9]}],
        [{}, {}, {"0": ["vertical_and_slash", 0, 800, 0.9]}],
        [{}, {}, {"0": ["vertical_and_slash", 30.5, 800, 0.9]}],
        [{}, {}, {"0": ["vertical_and_slash", 30, 800, math.nan]}],
        [{}, {}, {"0": 3}],
        [{}, {}, 3],
    ],
)
def test_bad_config_files_are_one_line(rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{" if rows is None else json.dumps(rows))
    with pytest.raises(CalibrationError) as caught:
        MInference().import_calibration(path, MODEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", torch.zeros(2, 4, dtype=torch.int64)),
        ("kind", torch.full((3, 4), 3)),
        ("kind", torch.zeros(3, 4)),
        ("budget", torch.zeros(3, 4, 2, dtype=torch.int64)),
        ("budget", torch.ones(3, 4)),
    ],
)
def test_a_damaged_calibration_is_refused(calibration: Calibration, name: str, value: Tensor) -> None:
    bad = Calibration("minference", fingerprint(MODEL), {**calibration.tensors, name: value})
    with pytest.raises(CalibrationError, match=r"damaged|fit"):
        MInference().attach(MODEL, bad)


def test_a_calibration_of_another_model_or_method_is_refused(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match="another model"):
        MInference().attach(tiny_model("llama"), calibration)
    with pytest.raises(CalibrationError, match="was made for quest"):
        MInference().attach(MODEL, Calibration("quest", fingerprint(MODEL), {}))
    with pytest.raises(CalibrationError, match="not finite"):
        Calibration("minference", "", {**calibration.tensors, "score": torch.tensor([math.nan])})


def test_bad_samples_and_settings_are_one_line() -> None:
    method = MInference(**TINY, scale=0.01)
    for tokens in (torch.zeros(1, 400), ids(1, 8), torch.zeros(400, dtype=torch.int64)):
        with pytest.raises(InputError, match="sample must be"):
            method.calibrate(MODEL, tokens)
    with pytest.raises(InputError, match="covers the sample"):
        MInference(**TINY, scale=1.0).calibrate(MODEL, ids(1, 400))
    for bad in ({"area": 0}, {"area": 1.5}, {"area": "x"}, {"k_v": 0}, {"minference_ratio": 0}, {"pattern": "spiral"}):
        with pytest.raises(InputError, match="minference"):
            make("minference", **bad)


def test_layers_with_a_window_of_their_own_are_not_searched() -> None:
    with pytest.raises(CalibrationError, match="window"):
        MInference(**TINY, scale=0.01).calibrate(tiny_model("gemma3"), ids(1, 400))


def test_commands_calibrate_on_the_sample_of_the_method(byte_tokenizer: Any) -> None:
    loaded = LoadedModel(MODEL, byte_tokenizer, "tiny")
    method = MInference(sample_tokens=1200)
    assert torch.equal(calibration_tokens(loaded, method=method), method.calibration_sample(MODEL, byte_tokenizer))
    assert calibration_tokens(loaded, blocks=2).shape == (2, 512)


def test_the_sample_is_one_retrieval_prompt(byte_tokenizer: Any) -> None:
    sample = MInference(sample_tokens=1200).calibration_sample(MODEL, byte_tokenizer)
    assert sample.shape[0] == 1
    assert 1000 < sample.shape[1] <= 1200
    assert torch.equal(sample, MInference(sample_tokens=1200).calibration_sample(MODEL, byte_tokenizer))
