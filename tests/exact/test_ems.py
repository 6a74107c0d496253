"""EMS by its card: the score, the merge, one compression, the whole run beside a naive one, and a long generation."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention import attach
from gossamer.attention.quest import Quest
from gossamer.cache.ems import EMS, RunningSums, last_rows
from gossamer.cache.merged_mass import widen
from gossamer.cache.merging import (
    Rows,
    add_members,
    evict_then_merge,
    global_local_score,
    merge_classes,
    merge_into,
    pair_similarity,
    tokens_for_mass,
    zero_class,
)
from gossamer.errors import InputError, ModelError, RecipeError
from gossamer.hf import GossamerCache, attention_views
from gossamer.models import tiny_model
from gossamer.ops.attention_statistics import attention_columns
from gossamer.testing import Stream, _model

SCALE = 0.25


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*lead, n, d=8, seed=0):
    return Rows(
        random(*lead, n, d, seed=seed), random(*lead, n, d, seed=seed + 1), random(*lead, n, seed=seed + 2).abs() + 0.01
    )


def layer(n=40, batch=2, heads=2, d=8, seed=0):
    """Keys, values and scores of n rows; keys and values lie near few directions, so that many resemble each other."""
    pick = torch.randint(0, 4, (batch, heads, n), generator=torch.Generator().manual_seed(seed))
    near = [random(batch, heads, 4, d, seed=seed + i).gather(2, pick[..., None].expand(-1, -1, -1, d)) for i in (1, 2)]
    key, value = (x + 0.3 * random(batch, heads, n, d, seed=seed + 3 + i) for i, x in enumerate(near))
    return key, value, random(batch, heads, n, seed=seed + 5).abs()


# -- the score --------------------------------------------------------------------------------------------------------


def test_local_sums_are_brought_to_the_global_mean():
    """Check 7: over the tokens given, the means agree, and the local scale has no effect."""
    total, local = random(2, 3, 50).abs() * 9, random(2, 3, 50, seed=1).abs()
    aligned = global_local_score(total, local, combine="sum") - total
    torch.testing.assert_close(aligned.mean(-1), total.mean(-1), rtol=1e-5, atol=0)
    score = global_local_score(total, local)
    torch.testing.assert_close(score, torch.maximum(total, aligned))
    for factor in (0.5, 2.0**-20, 2.0**20):  # powers of two: no rounding
        assert torch.equal(global_local_score(total, local * factor), score)
    torch.testing.assert_close(global_local_score(total, local * 0.3), score, rtol=1e-5, atol=1e-6)
    assert bool((score > total).any())  # without the alignment the maximum is always the global sum
    assert not torch.equal(global_local_score(total * 2, local), score)


def test_one_side_alone_and_pooled():
    total, local = random(1, 2, 9).abs(), random(1, 2, 9, seed=1).abs()
    assert torch.equal(global_local_score(total, local, combine="global"), total)
    assert torch.equal(global_local_score(total, local, combine="local"), local)
    pooled = global_local_score(total, local, combine="global", pool=3)
    want = torch.nn.functional.pad(total, (1, 1)).unfold(-1, 3, 1).mean(-1)
    torch.testing.assert_close(pooled, want)
    nothing = torch.zeros(1, 2, 9)
    assert torch.equal(global_local_score(total, nothing), total)
    assert torch.equal(global_local_score(nothing, nothing), nothing)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_streamed_sums_are_the_dense_ones(block):
    """Check 8, with the mean over a group's heads that the policy takes."""
    stream = Stream()
    query, key = stream.query[0], stream.key[0]
    grouped = query.unflatten(1, (2, -1))
    logits = torch.einsum("bkgtd,bksd->bkgts", grouped, key) * SCALE
    later = torch.ones(64, 64, dtype=torch.bool).triu(1)
    dense = logits.masked_fill(later, -math.inf).softmax(-1).mean(2)
    streamed = attention_columns(query, key, scale=SCALE, block=block) / grouped.shape[2]
    torch.testing.assert_close(streamed, dense.sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last_rows(query[:, :, -5:], key, None, SCALE), dense[:, :, -5:], rtol=1e-5, atol=1e-6)


def test_last_rows_leave_padding_out():
    stream = Stream()
    query, key, starts = stream.query[0, :, :, 56:], stream.key[0], torch.tensor([0, 60], dtype=torch.int32)
    got = last_rows(query, key, starts, SCALE)
    alone = last_rows(query[1:, :, 4:], key[1:, :, 60:], None, SCALE)
    assert torch.equal(got[0], last_rows(query, key, None, SCALE)[0])
    torch.testing.assert_close(got[1:, :, 4:, 60:], alone)
    assert float(got[1, :, :4].abs().sum() + got[1, :, :, :60].abs().sum()) == 0


# -- similarity, classes, merging -------------------------------------------------------------------------------------


def test_similarity_is_the_product_of_clamped_cosines():
    a, b = rows(2, n=5), rows(2, n=3, seed=7)
    got = pair_similarity(a.key, a.value, b.key, b.value)
    raw = pair_similarity(a.key, a.value, b.key, b.value, clamp=False)
    for i, j, h in itertools.product(range(5), range(3), range(2)):
        cosines = [
            float(torch.cosine_similarity(x[h, i], y[h, j], dim=0)) for x, y in ((a.key, b.key), (a.value, b.value))
        ]
        assert float(got[h, i, j]) == pytest.approx(max(cosines[0], 0) * max(cosines[1], 0), abs=1e-6)
        assert float(raw[h, i, j]) == pytest.approx(cosines[0] * cosines[1], abs=1e-6)
    torch.testing.assert_close(pair_similarity(a.key * 5, a.value * 0.1, b.key, b.value), got)


def test_classes_ties_and_no_centers():
    assert zero_class(torch.tensor([[0.6, 0.6], [0.59, 0.1], [0.0, 0.0]]), 0.6).tolist() == [1, 0, 0]
    assert zero_class(torch.zeros(3, 2), 0.0).tolist() == [1, 1, 1]
    assert zero_class(torch.zeros(3, 0), 0.0).tolist() == [0, 0, 0]


def naive_merge(centers, tokens, classes):
    """Word for word, one head."""
    keys, values, scores = [], [], []
    for j in range(len(centers.score)):
        group = [(centers.key[j], centers.value[j], centers.score[j])]
        group += [(tokens.key[i], tokens.value[i], tokens.score[i]) for i in range(len(classes)) if classes[i] == j + 1]
        weight = sum(s for _, _, s in group)
        direction = sum(s * k / k.norm() for k, _, s in group)
        size = sum(s * k.norm() for k, _, s in group) / weight
        keys.append(size * direction / direction.norm())
        values.append(sum(s * v for _, v, s in group) / weight)
        scores.append(weight)
    return torch.stack(keys), torch.stack(values), torch.stack(scores)


def test_the_merge_is_the_cards():
    centers, tokens = rows(2, 3, n=4), rows(2, 3, n=6, seed=10)
    classes = torch.randint(0, 5, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    got = merge_classes(centers, tokens, classes)
    for b, h in itertools.product(range(2), range(3)):
        one = [Rows(*(x[b, h] for x in part)) for part in (centers, tokens)]
        for mine, theirs in zip(got, naive_merge(*one, classes[b, h]), strict=True):
            torch.testing.assert_close(mine[b, h], theirs, atol=1e-6, rtol=1e-5)


def test_plain_means_shrink_keys():
    center = Rows(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0]]), torch.tensor([1.0]))
    token = Rows(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0]]), torch.tensor([1.0]))
    one = torch.tensor([1])
    assert float(merge_classes(center, token, one).key.norm()) == pytest.approx(3.0)
    averaged = merge_classes(center, token, one, norms="averaged").key
    assert averaged.tolist() == [[1.5, 1.5]]


def test_a_center_without_members_stays_bit_for_bit():
    centers, tokens = rows(n=3), rows(n=2, seed=5)
    got = merge_classes(centers, tokens, torch.tensor([0, 2]))
    for before, after in zip(centers, got, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])


def test_scores_of_zero_and_keys_that_cancel_stay_finite():
    zero = Rows(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1))
    token = Rows(torch.full((1, 2), 5.0), torch.ones(1, 2), torch.zeros(1))
    got = merge_classes(zero, token, torch.tensor([1]))
    assert torch.equal(got.key, zero.key)
    plus = Rows(torch.tensor([[2.0, 0.0]]), torch.ones(1, 2), torch.ones(1))
    minus = Rows(torch.tensor([[-4.0, 0.0]]), torch.ones(1, 2), torch.ones(1))
    assert merge_classes(plus, minus, torch.tensor([1])).key.tolist() == [[3.0, 0.0]]
    null = Rows(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1))
    for got in (merge_classes(null, minus, torch.tensor([1])), merge_classes(null, null, torch.tensor([1]))):
        assert all(torch.isfinite(x).all() for x in got)


@given(seed=st.integers(0, 10_000), tau=st.floats(0, 1), clamp=st.booleans())
@settings(max_examples=40, deadline=None)
def test_merged_centers_lie_between_their_members(seed, tau, clamp):
    """Check 5: key norms within the members' norms, values within their hull (per channel, and by the weights' sum)."""
    with torch.no_grad():
        centers, tokens = rows(n=4, seed=seed), rows(n=12, seed=seed + 50)
        alike = pair_similarity(tokens.key, tokens.value, centers.key, centers.value, clamp=clamp)
        merged, classes = merge_into(centers, tokens, alike, tau)
    for j in range(4):
        mine = classes == j + 1
        keys = torch.cat([centers.key[j : j + 1], tokens.key[mine]])
        values = torch.cat([centers.value[j : j + 1], tokens.value[mine]])
        norms = keys.norm(dim=-1)
        assert norms.min() - 1e-5 <= merged.key[j].norm() <= norms.max() + 1e-5
        assert bool((merged.value[j] >= values.amin(0) - 1e-5).all())
        assert bool((merged.value[j] <= values.amax(0) + 1e-5).all())
        torch.testing.assert_close(merged.score[j], centers.score[j] + tokens.score[mine].sum())


def test_copies_of_a_center_change_nothing():
    """Check 4."""
    centers = rows(2, n=4)
    pick = torch.tensor([0, 0, 3, 1, 3])
    copies = Rows(centers.key[:, pick], centers.value[:, pick], random(2, 5, seed=9).abs())
    alike = pair_similarity(copies.key, copies.value, centers.key, centers.value)
    merged, classes = merge_into(centers, copies, alike, 0.6)
    assert torch.equal(classes, (pick + 1).expand(2, -1))
    torch.testing.assert_close(merged.key, centers.key, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged.value, centers.value, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        merged.score, add_members(centers.score[..., None], copies.score[..., None], classes)[..., 0]
    )


def test_bad_input_is_one_line():
    good, token = rows(2, n=3), rows(2, n=4, seed=4)
    alike = pair_similarity(token.key, token.value, good.key, good.value)
    key, value, score = layer()
    bad = [
        lambda: global_local_score(torch.ones(1, 2, 3), torch.ones(1, 2, 4)),
        lambda: global_local_score(torch.ones(3), torch.ones(3)),
        lambda: global_local_score(torch.ones(1, 1, 3), torch.ones(1, 1, 3), pool=2),
        lambda: global_local_score(torch.full((1, 1, 3), math.nan), torch.ones(1, 1, 3)),
        lambda: global_local_score(torch.ones(1, 1, 3), torch.full((1, 1, 3), math.inf)),
        lambda: merge_into(good, token, alike[:, 1:], 0.5),
        lambda: merge_into(good, token, alike * math.nan, 0.5),
        lambda: merge_classes(good, rows(1, n=4), torch.zeros(1, 4, dtype=torch.int64)),
        lambda: merge_classes(good, token, torch.zeros(2, 5, dtype=torch.int64)),
        lambda: merge_classes(good, rows(2, n=4, d=9), torch.zeros(2, 4, dtype=torch.int64)),
        lambda: merge_classes(good._replace(score=good.score[:, 1:]), token, torch.zeros(2, 4, dtype=torch.int64)),
        lambda: evict_then_merge(key, value, score, budget=12, window=4),
        lambda: evict_then_merge(key, value, score[..., :36], budget=4, window=4),
        lambda: evict_then_merge(key, value, score[..., :36], budget=40, window=4),
        lambda: evict_then_merge(key, value[:, :1], score[..., :36], budget=12, window=4),
        lambda: widen(key, key, torch.ones(2, 2, 39), 0.5),
        lambda: widen(key, key, torch.zeros(2, 2, 40), 0.5),
        lambda: widen(key, key, torch.full((2, 2, 40), math.nan), 0.5),
    ]
    for call in bad:
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"budget": 32},
        {"budget": 0},
        {"window": 0},
        {"pool": 4},
        {"gamma": -1},
        {"tau": -0.1},
        {"tau": math.nan},
        {"mass": 0.0},
        {"mass": 1.5},
        {"combine": "min"},
        {"similarity": "cosine"},
        {"every": -1},
        {"bias": "members"},
        {"blocks": 3},
    ],
    ids=str,
)
def test_bad_settings_are_one_line(bad):
    with pytest.raises(InputError) as caught:
        EMS(**bad)
    assert "\n" not in str(caught.value)
    assert next(iter(bad)) in str(caught.value) or "budget" in str(caught.value)


# -- one compression --------------------------------------------------------------------------------------------------


def compress(key, value, score, **changes):
    """Choice and merged rows in one object; `merged` without the window."""
    choice, kept = evict_then_merge(key, value, score, **{"budget": 16, "window": 6, **changes})
    assert torch.equal(kept.key[:, :, -6:], key[:, :, -6:])
    assert torch.equal(kept.value[:, :, -6:], value[:, :, -6:])
    merged = Rows(kept.key[:, :, :-6], kept.value[:, :, :-6], kept.score[:, :, :-6])
    return SimpleNamespace(**choice._asdict(), carry=choice.carry, targets=choice.targets, merged=merged)


def compressed(**changes):
    key, value, score = layer()
    return (key, value, score[..., :34]), compress(key, value, score[..., :34], **changes)


def test_three_categories_by_score_ties_to_the_earlier():
    (_, _, score), done = compressed(gamma=0.5)
    ranked = score.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(done.ids[..., :10], ranked[..., :10].sort(-1).values)
    assert torch.equal(done.ids[..., 10:], torch.arange(34, 40).expand(2, 2, -1))
    assert torch.equal(done.members, ranked[..., 10:15])
    key, value, _ = layer()
    tied = compress(key, value, torch.ones(2, 2, 34), gamma=0.5)
    assert torch.equal(tied.ids[..., :10], torch.arange(10).expand(2, 2, -1))
    assert torch.equal(tied.members, torch.arange(10, 15).expand(2, 2, -1))


def test_above_one_nothing_merges():
    """Check 2: bit for bit what eviction by s leaves."""
    (key, value, score), done = compressed(tau=1.01)
    ids = score.argsort(dim=-1, descending=True, stable=True)[..., :10].sort(-1).values
    index = ids[..., None].expand(-1, -1, -1, 8)
    assert torch.equal(done.merged.key, key.gather(2, index))
    assert torch.equal(done.merged.value, value.gather(2, index))
    assert torch.equal(done.merged.score, score.gather(2, ids))
    assert not bool(done.classes.any())
    merging = compressed(tau=0.5)[1]
    assert torch.equal(merging.ids, done.ids)
    assert not torch.equal(merging.merged.key, done.merged.key)
    none = compressed(gamma=0.0)[1]
    assert torch.equal(none.merged.key, done.merged.key)


def test_at_zero_everything_merges():
    """Check 3: with enough candidates no score is lost."""
    (_, _, score), done = compressed(tau=0.0, gamma=10.0)
    assert bool((done.classes > 0).all())
    assert done.members.shape[-1] == 24
    torch.testing.assert_close(done.merged.score.sum(-1), score.sum(-1), rtol=1e-6, atol=0)
    lossy = compressed(tau=0.6, gamma=10.0)[1]
    assert bool((lossy.merged.score.sum(-1) < score.sum(-1)).all())


def test_heads_and_sequences_are_independent():
    """Check 9."""
    key, value, score = layer()
    (_, _, _), before = compressed(tau=0.4)
    key[1, 0], value[1, 0] = random(40, 8, seed=77), random(40, 8, seed=78)
    after = compress(key, value, score[..., :34], tau=0.4)
    for b, h in itertools.product(range(2), range(2)):
        same = torch.equal(before.merged.key[b, h], after.merged.key[b, h])
        assert same is not ((b, h) == (1, 0))


def test_mass_gives_each_head_its_own_number():
    key, value, score = layer()
    score = score[..., :34].clone()
    score[0, 0] = 1.0  # flat: 0.9 of the mass needs nearly all tokens
    score[0, 1] = 0.0
    score[0, 1, 3] = 1.0  # sharp: one token is enough
    done = compress(key, value, score, tau=0.0, mass=0.9)
    assert done.candidates[0].tolist() == [31 - 10, 0]
    assert (done.classes > 0).sum(-1)[0].tolist() == [21, 0]
    ranked = score.sort(-1, descending=True).values
    for b, h in itertools.product(range(2), range(2)):
        total, count = 0.0, 0
        while total < 0.9 * float(ranked[b, h].sum()) - 1e-6:
            total, count = total + float(ranked[b, h, count]), count + 1
        assert int(done.candidates[b, h]) == max(0, count - 10)
    assert tokens_for_mass(torch.zeros(1, 3), 0.9).tolist() == [1]


def test_padding_is_neither_center_nor_member():
    key, value, score = layer()
    score = score[..., :34]
    starts = torch.tensor([0, 13], dtype=torch.int32)
    alone = compress(key[1:, :, 13:], value[1:, :, 13:], score[1:, :, 13:], tau=0.4)
    together = compress(key, value, score, tau=0.4, starts=starts)
    assert torch.equal(together.ids[1:], alone.ids + 13)
    torch.testing.assert_close(together.merged.key[1:], alone.merged.key)
    torch.testing.assert_close(together.merged.value[1:], alone.merged.value)
    starts = torch.tensor([0, 30], dtype=torch.int32)  # 4 real tokens before the window, 10 places
    short = compress(key, value, score, tau=0.0, starts=starts)
    assert torch.equal(short.ids[1, :, 6:10], torch.arange(30, 34).expand(2, -1))
    assert bool((short.ids[1, :, :6] < 30).all())
    assert int(short.candidates[1].sum()) == int((short.classes[1] > 0).sum()) == 0


def test_long_prompts_are_compared_in_blocks(monkeypatch):
    whole = compressed(gamma=10.0)[1]
    monkeypatch.setattr("gossamer.cache.merging._BLOCK", 5)
    assert torch.equal(compressed(gamma=10.0)[1].classes, whole.classes)
    assert bool((whole.classes > 0).any())
    assert bool((whole.classes == 0).any())


def test_running_sums_of_members_go_to_their_center():
    _, done = compressed(tau=0.0, gamma=10.0)
    sums = random(2, 2, 3, 40, seed=5).abs()
    carried = done.carry(sums)
    assert carried.shape == (2, 2, 3, 16)
    torch.testing.assert_close(carried.sum(-1), sums.sum(-1))
    assert torch.equal(carried[..., 10:], sums[..., 34:])
    h = int(done.classes[0, 0, 0]) - 1
    mine = done.members[0, 0][done.classes[0, 0] == h + 1].tolist()
    torch.testing.assert_close(carried[0, 0, 1, h], sums[0, 0, 1, [*mine, int(done.ids[0, 0, h])]].sum())
    lost = compressed(tau=1.01)[1]
    assert torch.equal(lost.carry(sums), sums.gather(3, lost.ids.unsqueeze(2).expand(-1, -1, 3, -1)))


# -- the whole run beside a naive one -----------------------------------------------------------------------------------


class Naive:
    """One KV head, token by token, as the card says: lists of entries, Python loops."""

    def __init__(self, method):
        self.method = method
        self.entries = []  # [position, key, value, global sum, {query position: local row}]
        self.t = 0

    def feed(self, query, key, value):
        """A block ``[group, new, d]``, ``[new, d]``; returns its outputs ``[group, new, d]``."""
        new, outs = key.shape[0], []
        for i in range(new):
            self.entries.append([self.t, key[i], value[i], 0.0, {}])
            keys = torch.stack([e[1] for e in self.entries])
            probs = (query[:, i] @ keys.T * SCALE).softmax(-1)
            outs.append(probs @ torch.stack([e[2] for e in self.entries]))
            for e, p in zip(self.entries, probs.mean(0).tolist(), strict=True):
                e[3] += p
                e[4][self.t] = p
            self.t += 1
        budget, every = self.method.plan(self.t)
        if len(self.entries) > budget and (new > 1 or len(self.entries) >= budget + every):
            self.compress(budget)
        return torch.stack(outs, 1)

    def compress(self, budget):
        method, window = self.method, self.method.window
        older, recent = self.entries[:-window], self.entries[-window:]
        total = [e[3] for e in older]
        local = [sum(p for t, p in e[4].items() if t >= self.t - window) for e in older]
        ratio = sum(total) / sum(local) if sum(local) else 0.0
        join = {
            "max": lambda g, x: max(g, x * ratio),
            "sum": lambda g, x: g + x * ratio,
            "global": lambda g, x: g,
            "local": lambda g, x: x,
        }[method.combine]
        score = [join(g, x) for g, x in zip(total, local, strict=True)]
        ranked = sorted(range(len(older)), key=lambda j: (-score[j], older[j][0]))
        count = budget - window
        centers, count_tbm = sorted(ranked[:count]), math.ceil(method.gamma * count)
        if method.mass is not None:
            reached, n = 0.0, 0
            while reached < method.mass * sum(score) - 1e-9:
                reached, n = reached + score[ranked[n]], n + 1
            count_tbm = max(0, n - count)
        groups = {j: [j] for j in centers}
        for i in ranked[count : count + count_tbm]:
            best, where = method.tau, None
            for j in centers:
                cosines = [float(torch.cosine_similarity(older[i][x], older[j][x], dim=0).clamp_min(0)) for x in (1, 2)]
                if cosines[0] * cosines[1] > best or (cosines[0] * cosines[1] == best and where is None):
                    best, where = cosines[0] * cosines[1], j
            if where is not None:
                groups[where].append(i)
        kept = []
        for j in centers:
            members = groups[j]
            if len(members) == 1:
                kept.append(older[j])
                continue
            weight = sum(score[i] for i in members)
            direction = sum(score[i] * older[i][1] / older[i][1].norm() for i in members)
            size = sum(score[i] * older[i][1].norm() for i in members) / weight
            received = {t: sum(older[i][4].get(t, 0.0) for i in members) for i in members for t in older[i][4]}
            kept.append(
                [
                    older[j][0],
                    size * direction / direction.norm(),
                    sum(score[i] * older[i][2] for i in members) / weight,
                    sum(older[i][3] for i in members),
                    received,
                ]
            )
        self.entries = kept + recent


RUNS = [
    {"budget": 16, "window": 6, "tau": 0.1},
    {"budget": 16, "window": 6, "tau": 0.1, "combine": "sum", "every": 3},
    {"budget": 16, "window": 6, "tau": 0.2, "combine": "local", "gamma": 0.5},
    {"budget": 16, "window": 6, "tau": 0.1, "combine": "global", "every": 1},
    {"budget": 16, "window": 6, "tau": 0.05, "mass": 0.8},
    {"budget": 0.25, "window": 4, "tau": 0.1},
    {"budget": 12, "window": 2, "tau": 2.0},
]
SIZES = [[1] * 64, [64], [40, *[1] * 24], [20, 5, 1, 1, 30, *[1] * 7]]


def clustered(**changes):
    """A stream whose keys and values resemble each other, so that there is something to merge."""
    stream = Stream(**changes)
    for x, seed in ((stream.key, 1), (stream.value, 2)):
        shape = (*x.shape[:3], 3, x.shape[-1])
        pick = torch.randint(0, 3, x.shape[:4], generator=torch.Generator().manual_seed(7))
        near = random(*shape, seed=seed).gather(3, pick[..., None].expand_as(x))
        x.mul_(0.5).add_(near)
    return stream


def check_run(method, stream, sizes, got, starts=(0, 0)):
    for i, b, h in itertools.product(range(3), range(2), range(2)):
        naive, begin = Naive(method), 0
        group = slice(2 * h, 2 * h + 2)
        for size in sizes:
            part = slice(max(begin, starts[b]), begin + size)
            begin += size
            if part.stop <= part.start:
                continue
            out = naive.feed(stream.query[i, b, group, part], stream.key[i, b, h, part], stream.value[i, b, h, part])
            torch.testing.assert_close(got[i, b, group, part], out, atol=2e-5, rtol=1e-4)
        kv = stream.cache.layers[i]
        left = kv.length - len(naive.entries)
        assert kv.positions[b, h, left:].tolist() == [e[0] + starts[b] for e in naive.entries]
        torch.testing.assert_close(
            kv.keys[b, h, left:], torch.stack([e[1] for e in naive.entries]), atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            kv.values[b, h, left:], torch.stack([e[2] for e in naive.entries]), atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=["steps", "one block", "prompt and steps", "turns"])
def test_the_run_is_the_cards(run, sizes):
    method, stream = EMS(**run), clustered()
    with method.attach(_model()) as handle:
        got = stream.feed(handle, *sizes)
        share = handle.report()["merged_share"]
    check_run(method, stream, sizes, got)
    assert (share > 0) is (method.tau < 1)


@pytest.mark.parametrize("norms", ["separate", "averaged"])
def test_the_cache_merges_in_place_what_the_building_block_says(norms):
    stream = clustered()
    with EMS(budget=16, window=6, tau=0.1, norms=norms, combine="global").attach(_model()) as handle:
        stream.feed(handle, 40)
    for i, kv in enumerate(stream.cache.layers):
        query, key, value = (x[i, :, :, :40] for x in (stream.query, stream.key, stream.value))
        score = attention_columns(query, key, scale=SCALE)[:, :, :34] / 2
        choice, kept = evict_then_merge(key, value, score, budget=16, window=6, tau=0.1, norms=norms)
        assert bool((choice.classes > 0).any())
        assert torch.equal(kv.positions.long(), choice.ids)
        torch.testing.assert_close(kv.keys, kept.key, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kv.values, kept.value, atol=1e-5, rtol=1e-5)


def test_padded_sequences_are_their_own_runs():
    """A budget in tokens means the same for every sequence; both are compressed at the same steps."""
    method, stream, sizes = EMS(budget=16, window=6, tau=0.1), clustered(), [40, *[1] * 24]
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :11] = False
    with method.attach(_model()) as handle:
        got = stream.feed(handle, *sizes, mask=mask)
    assert torch.isfinite(got).all()
    check_run(method, stream, sizes, got, starts=(0, 11))


def test_a_sequence_shorter_than_the_budget_loses_nothing():
    method, stream = EMS(budget=16, window=6, tau=0.0), clustered()
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :34] = False
    with method.attach(_model()) as handle:
        got = stream.feed(handle, 40, *[1] * 5, mask=mask)
    kv = stream.cache.layers[0]
    assert kv.starts.tolist() == [0, 10]
    assert kv.positions[1, 0, 10:].tolist() == list(range(34, 45))
    dense = clustered().pick(torch.tensor([1]), 34).dense(0)[:, :, :, :11]
    torch.testing.assert_close(got[:, 1:, :, 34:], dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=["steps", "one block", "prompt and steps", "turns"])
def test_a_budget_above_the_context_is_dense(sizes):
    """Check 1: nothing is touched."""
    stream = Stream()
    with EMS(budget=64, window=6).attach(_model()) as handle:
        got = stream.feed(handle, *sizes)
    torch.testing.assert_close(got, stream.dense(0), atol=1e-5, rtol=1e-5)
    for i, kv in enumerate(stream.cache.layers):
        assert torch.equal(kv.keys, stream.key[i])
        assert torch.equal(kv.values, stream.value[i])
        assert kv.dropped == 0


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
def test_every_head_ends_with_the_budget_and_the_window(tau):
    """Check 6."""
    stream = clustered()
    with EMS(budget=16, window=6, tau=tau).attach(_model()) as handle:
        stream.feed(handle, 40)
        report = handle.report()
    for i, kv in enumerate(stream.cache.layers):
        assert kv.keys.shape == kv.values.shape == (2, 2, 16, 16)
        assert torch.equal(kv.keys[:, :, -6:], stream.key[i, :, :, 34:40])
        assert torch.equal(kv.values[:, :, -6:], stream.value[i, :, :, 34:40])
        assert bool((kv.positions.diff(dim=2) > 0).all())
    assert report["cache_rows_kept"] == 16 / 40
    assert report["merged_share"] == {0.0: 1.0, 2.0: 0.0}.get(tau, report["merged_share"])
    assert 0 < report["score_bytes_held"] == 3 * 2 * 2 * 7 * 22 * 4


def test_altering_a_head_changes_that_head_only():
    """Check 9, through the cache: the first layer's rows of the other heads stay bit for bit."""
    kept = []
    for change in (False, True):
        stream = clustered()
        if change:
            stream.key[:, 1, 0], stream.value[:, 1, 0] = random(64, 16, seed=5), random(64, 16, seed=6)
        with EMS(budget=16, window=6, tau=0.3).attach(_model()) as handle:
            stream.feed(handle, 40, *[1] * 8)
        kept.append(stream.cache.layers[0])
    for b, h in itertools.product(range(2), range(2)):
        same = torch.equal(kept[0].keys[b, h], kept[1].keys[b, h])
        assert same is not ((b, h) == (1, 0))


def test_only_prompts_are_compressed_where_it_is_asked_for():
    stream = clustered()
    with EMS(budget=16, window=6, every=0).attach(_model()) as handle:
        stream.feed(handle, 40, *[1] * 14)
        assert all(kv.length == 30 for kv in stream.cache.layers)
        assert handle.report()["score_bytes_read"] == 0
        assert handle.report()["score_bytes_held"] == 0
        stream.feed(handle, 10)
        assert all(kv.length == 16 for kv in stream.cache.layers)


def test_decoding_compresses_every_c_tokens():
    stream = clustered()
    lengths = []
    with EMS(budget=16, window=6, every=4).attach(_model()) as handle:
        stream.feed(handle, 40)
        for _ in range(9):
            stream.feed(handle, 1)
            lengths.append(stream.cache.layers[0].length)
        assert stream.cache.get_seq_length() == 49
        assert handle.report()["score_bytes_read"] > 0
    assert lengths == [17, 18, 19, 16, 17, 18, 19, 16, 17]


def test_a_crop_within_what_was_kept_goes_on_as_if_nothing_had_been():
    """The removed queries' lines of the ring are overwritten, their additions to the global sum stay: `local` shows it."""
    kept = []
    for wrong in (False, True):
        stream = clustered()
        with EMS(budget=16, window=6, every=12, combine="local", tau=0.1).attach(_model()) as handle:
            stream.feed(handle, 40)
            if wrong:
                other = clustered(seed=3)
                other.cache = stream.cache
                other.feed(handle, 1, 1, 1)
                stream.cache.crop(-3)
            stream.feed(handle, *[1] * 12)
        assert stream.cache.layers[0].length == 16
        kept.append(stream.cache.layers[0])
    assert torch.equal(kept[0].positions, kept[1].positions)
    assert torch.equal(kept[0].keys, kept[1].keys)


def test_the_sums_can_be_taken_along():
    """Another state, with what `tensors` gave for these sequences, goes on as the old one would have."""
    kept = []
    for moved in (False, True):
        stream = clustered()
        with EMS(budget=16, window=6, tau=0.1).attach(_model()) as handle:
            stream.feed(handle, 40, 1, 1)
            for kv in stream.cache.layers if moved else []:
                view = kv.views[handle.runtime]
                given, rows = view.cache_state.tensors(), view.cache_state.rows
                assert {name: x.shape[0] for name, x in given.items()} == {"total": 2, "ring": 2}
                view.cache_state = RunningSums()
                view.cache_state.restore({name: x.clone() for name, x in given.items()}, rows)
            stream.feed(handle, *[1] * 12)
        kept.append(stream.cache.layers[0])
    assert torch.equal(kept[0].positions, kept[1].positions)
    assert torch.equal(kept[0].keys, kept[1].keys)
    assert RunningSums().tensors() == {}


def test_it_may_be_attached_to_a_cache_that_is_full():
    stream = clustered()
    with EMS(budget=64, window=6).attach(_model()) as handle:
        stream.feed(handle, 40)
    with EMS(budget=16, window=6).attach(_model()) as handle:
        first = stream.feed(handle, 1)
        torch.testing.assert_close(first, clustered().dense(40)[:, :, :, :1], atol=1e-5, rtol=1e-5)
        assert all(kv.length == 16 for kv in stream.cache.layers)
        assert torch.isfinite(stream.feed(handle, *[1] * 12)).all()


def test_a_decode_method_selects_among_the_merged_rows():
    outs = []
    for tokens in (None, 1.0):
        stream, method = clustered(), EMS(budget=24, window=6, tau=0.1)
        stack = [(method, None)] if tokens is None else [(Quest(tokens=tokens, page_size=4), None), (method, None)]
        with attach(_model(), stack) as handle:
            outs.append(stream.feed(handle, 40, *[1] * 24))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


# -- the mass of merged rows ----------------------------------------------------------------------------------------------


def of_copies(kinds=2):
    """A stream with few distinct rows: every older token is the copy of another one."""
    stream = Stream()
    pick = torch.randint(0, kinds, stream.key.shape[:4], generator=torch.Generator().manual_seed(7))
    pick[:, :, :, :kinds] = torch.arange(kinds)
    for x, seed in ((stream.key, 1), (stream.value, 2)):
        near = random(*x.shape[:3], kinds, x.shape[-1], seed=seed)
        x.copy_(near.gather(3, pick[..., None].expand_as(x)))
    return stream


ALL_COPIES = {"budget": 16, "window": 6, "gamma": 10.0, "tau": 0.999}


@pytest.mark.parametrize(
    "sizes", [*SIZES, [30, 20, 14]], ids=["steps", "one block", "prompt, steps", "turns", "chunks"]
)
def test_with_the_bias_copies_keep_their_mass(sizes):
    """Merging identical tokens changes no output: dense attention over all 64 rows, that of 16 to 22 kept ones."""
    outs = {}
    for bias in ("none", "log(members)"):
        stream = of_copies()
        with EMS(**ALL_COPIES, bias=bias).attach(_model()) as handle:
            outs[bias] = stream.feed(handle, *sizes)
            share = handle.report()["merged_share"]
            states = [kv.views[handle.runtime].cache_state for kv in stream.cache.layers]
        assert all(kv.length <= 22 for kv in stream.cache.layers)
        for kv, state in zip(stream.cache.layers, states, strict=True):
            if bias == "none":
                assert state.members is None
            else:
                assert share == 1.0  # else a kind of row was lost
                assert bool((state.counts(kv.length).sum(-1) == 64).all())
    dense = of_copies().dense(0)
    torch.testing.assert_close(outs["log(members)"], dense, atol=2e-5, rtol=1e-4)
    if len(sizes) > 1:
        assert float((outs["none"] - dense).abs().max()) > 0.05


def test_with_the_bias_scores_are_those_of_the_unmerged_rows():
    """What a kept row has received is what all the tokens it stands for would have."""
    stream, sizes = of_copies(), [40, 1, 1, 1, 4, 1, 1]
    with EMS(**ALL_COPIES, every=30, combine="global", bias="log(members)").attach(_model()) as handle:
        stream.feed(handle, *sizes)
        states = [kv.views[handle.runtime].cache_state for kv in stream.cache.layers]
    group = stream.query.shape[2] // stream.key.shape[2]
    for i, state in enumerate(states):
        kv = stream.cache.layers[i]
        query, key = stream.query[i, :, :, :49], stream.key[i, :, :, :49]
        want = attention_columns(query, key, scale=SCALE) / group
        total = state.total[..., : state.rows]
        torch.testing.assert_close(total.sum(-1), want.sum(-1), rtol=1e-4, atol=1e-4)
        for b, h in itertools.product(range(2), range(2)):
            for kind in key[b, h, :2]:
                mine = (kv.keys[b, h] - kind).norm(dim=-1) < 1e-3
                theirs = (key[b, h] - kind).norm(dim=-1) < 1e-3
                torch.testing.assert_close(total[b, h][mine].sum(), want[b, h][theirs].sum(), rtol=1e-4, atol=1e-4)


def test_the_bias_leaves_padding_out():
    stream, mask = of_copies(), torch.ones(2, 64, dtype=torch.bool)
    mask[1, :11] = False
    with EMS(**ALL_COPIES, bias="log(members)").attach(_model()) as handle:
        got = stream.feed(handle, 40, 4, *[1] * 20, mask=mask)
    torch.testing.assert_close(got[:, :1], of_copies().dense(0)[:, :1], atol=2e-5, rtol=1e-4)
    alone = of_copies().pick(torch.tensor([1]), 11).dense(0)
    torch.testing.assert_close(got[:, 1:, :, 11:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("every", [None, 0])
def test_the_counts_can_be_taken_along(every):
    outs = []
    for moved in (False, True):
        stream = of_copies()
        with EMS(**ALL_COPIES, every=every, bias="log(members)").attach(_model()) as handle:
            stream.feed(handle, 40, 1, 1)
            for kv in stream.cache.layers if moved else []:
                view = kv.views[handle.runtime]
                given, rows = view.cache_state.tensors(), view.cache_state.rows
                assert "members" in given
                view.cache_state = RunningSums()
                view.cache_state.restore({name: x.clone() for name, x in given.items()}, rows)
            outs.append(stream.feed(handle, *[1] * 12))
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0], of_copies().dense(42)[:, :, :, :12], atol=2e-5, rtol=1e-4)


def test_the_bias_takes_attention_and_changes_nothing_where_nothing_merges():
    with pytest.raises(RecipeError, match="claim attention in decode"):
        attach(_model(), [(EMS(bias="log(members)"), None), (Quest(), None)])
    outs = []
    for bias in ("none", "log(members)"):
        with EMS(budget=16, window=6, tau=2.0, bias=bias).attach(_model()) as handle:
            outs.append(clustered().feed(handle, 40, 4, *[1] * 20))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


# -- keys before their rotation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3", "mistral"])
def test_prerope_compares_keys_that_the_projection_made(family, monkeypatch):
    """First-layer rows that are compared are outputs of the projection (or of the norm behind it), before rotation."""
    model = tiny_model(family, **({"layer_types": ["full_attention"] * 4} if family == "gemma3" else {}))
    ids = torch.randint(1, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    view, raw, seen = attention_views(model)[0], [], {"rope": [], "prerope": []}
    hook = view.k_source.register_forward_hook(lambda module, args, out: raw.append(out))

    def spy(key, value, center_key, center_value, *, clamp):
        seen[kind].append(torch.cat([key, center_key], 2))
        return pair_similarity(key, value, center_key, center_value, clamp=clamp)

    monkeypatch.setattr("gossamer.cache.merging.pair_similarity", spy)
    for kind in seen:
        with EMS(budget=30, window=10, similarity=kind, every=0).attach(model):
            model(ids, use_cache=True)
    hook.remove()
    dim = view.module.head_dim
    made = raw[0].reshape(60, -1, dim) if raw[0].dim() == 3 else raw[0][0]  # [tokens, kv heads, d], norms come in both
    made = made if made.shape[0] == 60 else made.transpose(0, 1)
    furthest = {}
    for kind, compared in seen.items():
        away = torch.cdist(compared[0][0], made.transpose(0, 1), compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
        furthest[kind] = float(away.max())
    assert furthest["prerope"] < 1e-4
    assert furthest["rope"] > 1e-2


def test_prerope_follows_the_stored_positions_while_decoding():
    """With copies at other positions all candidates find their center, also long after the prompt."""
    model = tiny_model("llama", num_hidden_layers=1)
    cycle = torch.randint(1, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    with EMS(budget=24, window=8, similarity="prerope", tau=0.99).attach(model) as handle:
        cache = GossamerCache()
        for t in range(200):
            model(cycle[:, t % 8 : t % 8 + 1], past_key_values=cache, use_cache=True)
        share = handle.report()["merged_share"]
    with EMS(budget=24, window=8, tau=0.99).attach(model) as handle:
        cache = GossamerCache()
        for t in range(200):
            model(cycle[:, t % 8 : t % 8 + 1], past_key_values=cache, use_cache=True)
        assert handle.report()["merged_share"] < share
    assert share > 0


def test_prerope_needs_positions_that_can_be_undone():
    with pytest.raises(ModelError, match="similarity='rope'") as caught:
        EMS(similarity="prerope").attach(tiny_model("gpt2"))
    assert "\n" not in str(caught.value)


# -- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3", "gpt2", "mistral"])
def test_families_generate_in_bounded_memory(family):
    model = tiny_model(family)
    ids = torch.randint(1, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    ways = [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}]
    with EMS(budget=16, window=4).attach(model) as handle:
        for way in ways:
            out = model.generate(ids, attention_mask=mask, max_new_tokens=12, **way)
            assert out.shape == (2, 42)
        held = handle.report()["cache_rows_kept"]
    assert held < 0.7


def test_padded_batches_generate_what_single_sequences_do():
    model = tiny_model("llama")
    ids = torch.randint(3, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with EMS(budget=16, window=4, every=4).attach(model):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
        for i, start in ((0, 0), (1, 9)):
            alone = model.generate(
                ids[i : i + 1, start:], attention_mask=mask[i : i + 1, start:], max_new_tokens=16, do_sample=False
            )
            assert together[i, 30:].tolist() == alone[0, -16:].tolist()


def test_bfloat16_and_inference_mode_run():
    model = tiny_model("llama").to(torch.bfloat16)
    ids = torch.randint(1, 256, (1, 30))
    with EMS(budget=12, window=4, every=2).attach(model):
        cache = GossamerCache()
        with torch.inference_mode():
            model(ids, past_key_values=cache, use_cache=True)
            for _ in range(5):
                model(ids[:, :1], past_key_values=cache, use_cache=True)
        for _ in range(5):
            logits = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        assert cache.layers[0].keys.dtype == torch.bfloat16
        assert torch.isfinite(logits).all()


def test_a_long_generation_is_bounded():
    """2,000 tokens: flat memory, positions that follow the tokens, finite numbers; sums do not grow beyond the tokens."""
    model = tiny_model("llama", num_hidden_layers=1)
    cache, token, capacity = GossamerCache(), torch.tensor([[5]]), set()
    with EMS(budget=32, window=8, combine="sum").attach(model) as handle:
        for t in range(2000):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            kv = cache.layers[0]
            if t >= 100:
                capacity.add((kv.capacity, kv.key_storage.data_ptr(), handle.report()["score_bytes_held"]))
                assert 32 <= kv.length < 40
            if t % 97 == 0 and t:
                assert bool((kv.positions.diff(dim=2) > 0).all())
                recent = min(8, kv.length)
                assert torch.equal(kv.positions[0, 0, -recent:].long(), torch.arange(t + 1 - recent, t + 1))
                assert torch.isfinite(kv.keys).all()
                assert torch.isfinite(kv.values).all()
        state = next(iter(kv.views.values())).cache_state
        total = state.total[..., : kv.length]
    assert torch.isfinite(logits).all()
    assert len(capacity) == 1
    assert cache.get_seq_length() == 2000
    assert bool((total >= 0).all())
    assert bool((total.sum(-1) <= 2000 * (1 + 1e-4)).all())  # each query gives away 1


def test_what_it_costs():
    model = _model()
    stream = Stream()
    with EMS(budget=16, window=6).attach(model) as handle:
        stream.feed(handle, 40)
        before = handle.report()
        stream.feed(handle, 1)
        after = handle.report()
    promised = EMS(budget=16, window=6).io_bytes(41, handle.runtime.shape, 4)
    assert promised == {"rows": 17 * 2 * 2 * 16 * 4, "scores": 17 * 2 * 16 * 4}
    assert after["score_bytes_read"] - before["score_bytes_read"] == promised["scores"] * 3 * 2
    assert EMS(budget=16, window=6, every=0).io_bytes(41, handle.runtime.shape, 4)["scores"] == 0
    assert EMS(budget=16, window=6).held_rows(10) == 10
