"""merge_rows and best_match against loops over the formulas."""

import math

import pytest
import torch

from gossamer.errors import InputError
from gossamer.ops import best_match, merge_rows


def case(batch=2, heads=3, rows=20, dim=5, merged=7, seed=0):
    """Rows, scores, sources from the last rows, targets among the first; about a third go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(batch, heads, rows, dim, generator=generator)
    scores = torch.rand(batch, heads, rows, generator=generator)
    sources = torch.stack([torch.randperm(10, generator=generator)[:merged] + 10 for _ in range(batch * heads)])
    targets = torch.randint(0, 6, (batch, heads, merged), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -1
    return data, scores, sources.view(batch, heads, merged).int(), targets.int()


def by_loop(rows, scores, sources, targets, keep_norm):
    rows, total = rows.double().clone(), scores.double().clone()
    for b, h in ((b, h) for b in range(rows.shape[0]) for h in range(rows.shape[1])):
        old, weight = rows[b, h].clone(), scores[b, h].double()
        for j in set(targets[b, h].tolist()) - {-1}:
            members = [j, *(int(i) for i, to in zip(sources[b, h], targets[b, h], strict=True) if to == j)]
            total[b, h, j] = sum(weight[i] for i in members)
            if keep_norm:
                u = sum(weight[i] * old[i] / old[i].norm() for i in members)
                rows[b, h, j] = u / u.norm() * sum(weight[i] * old[i].norm() for i in members) / total[b, h, j]
            else:
                rows[b, h, j] = sum(weight[i] * old[i] for i in members) / total[b, h, j]
    return rows.float(), total.float()


@pytest.mark.parametrize("keep_norm", [False, True])
def test_merging_is_the_weighted_mean(keep_norm):
    rows, scores, sources, targets = case()
    before = scores.clone()
    want, total = by_loop(rows, scores, sources, targets, keep_norm)
    got = merge_rows(rows, scores, sources, targets, keep_norm=keep_norm)
    torch.testing.assert_close(rows, want)
    torch.testing.assert_close(got, total)
    assert torch.equal(scores, before), "values are merged with the weights that keys were"


def test_untouched_rows_keep_their_bits_and_nowhere_changes_nothing():
    rows, scores, sources, targets = case()
    before = rows.clone()
    merge_rows(rows, scores, sources, targets)
    touched = torch.zeros(2, 3, 21, dtype=torch.bool).scatter_(2, targets.long().masked_fill(targets < 0, 20), True)
    assert torch.equal(rows[~touched[..., :20]], before[~touched[..., :20]])
    rows = before.clone()
    sources[:] = 10**6  # not looked at
    assert torch.equal(merge_rows(rows, scores, sources, torch.full_like(targets, -1), keep_norm=True), scores)
    assert torch.equal(rows, before)


def test_copies_of_a_target_leave_it_as_it_is():
    rows, scores, sources, targets = case()
    targets.clamp_min_(0)
    for b in range(2):
        for h in range(3):
            rows[b, h, sources[b, h].long()] = rows[b, h, targets[b, h].long()]
    for keep_norm in (False, True):
        got = rows.clone()
        merge_rows(got, scores, sources, targets, keep_norm=keep_norm)
        torch.testing.assert_close(got, rows, atol=1e-6, rtol=0)


def test_length_stays_between_the_members_and_scores_add_up():
    rows, scores, sources, targets = case()
    sources, targets = sources[:, :, :1], targets[:, :, :1].clamp_min(0)
    sizes = torch.stack([rows.norm(dim=-1).gather(2, ids.long()) for ids in (sources, targets)])
    got = merge_rows(rows, scores, sources, targets, keep_norm=True)
    new = rows.norm(dim=-1).gather(2, targets.long())
    assert bool((new >= sizes.amin(0) - 1e-6).all() & (new <= sizes.amax(0) + 1e-6).all())
    torch.testing.assert_close(
        got.gather(2, targets.long()), sum(scores.gather(2, x.long()) for x in (sources, targets))
    )


def test_weights_of_zero_and_opposite_directions_leave_the_target():
    rows = torch.tensor([[[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]]])
    before = rows.clone()
    zero = torch.zeros(1, 1, 3)
    merge_rows(rows, zero, torch.tensor([[[1]]]), torch.tensor([[[0]]]))
    assert torch.equal(rows, before)
    merge_rows(rows, zero + 1, torch.tensor([[[1]]]), torch.tensor([[[0]]]), keep_norm=True)
    assert torch.equal(rows, before)


BAD_MERGES = [
    {"sources": torch.tensor([[[3]]])},
    {"sources": torch.tensor([[[-1]]])},
    {"targets": torch.tensor([[[-2]]])},
    {"targets": torch.tensor([[[3]]])},
    {"targets": torch.tensor([[[1]]])},
    {"targets": torch.tensor([[[0, 0]]])},
    {"sources": torch.tensor([[1]])},
    {"scores": torch.ones(1, 1, 2)},
    {"scores": torch.ones(1, 1, 3).double()},
    {"rows": torch.ones(1, 1, 3, 2).int()},
    {"targets": torch.zeros(1, 1, 1)},
]


@pytest.mark.parametrize("wrong", BAD_MERGES)
def test_bad_merges_are_one_line(wrong):
    given = {"rows": torch.ones(1, 1, 3, 2), "scores": torch.ones(1, 1, 3), "sources": torch.tensor([[[1]]])}
    with pytest.raises(InputError) as error:
        merge_rows(**{**given, "targets": torch.tensor([[[0]]]), **wrong})
    assert "\n" not in str(error.value)


def test_match_is_the_best_product_of_clamped_cosines():
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(2, 3, 30, d, generator=generator) for d in (5, 7))
    sources, centres = torch.arange(20, 30).expand(2, 3, -1), torch.arange(3, 18).expand(2, 3, -1)
    for tau in (0.0, 0.2, 0.5, 1.1):
        got = best_match(key, value, sources, centres, tau)
        assert got.dtype == torch.int32
        for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(10)):
            like = [
                math.prod(
                    max(0.0, float(torch.cosine_similarity(x[b, h, 20 + i], x[b, h, j], 0))) for x in (key, value)
                )
                for j in range(3, 18)
            ]
            want = 3 + like.index(max(like)) if max(like) >= tau else -1
            assert int(got[b, h, i]) == want


def test_two_opposites_are_not_alike():
    key = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]]]])
    assert best_match(key, key, torch.tensor([[[1]]]), torch.tensor([[[0]]]), 0.1).item() == -1


def test_unused_slots_and_rows_of_zeros_match_nothing():
    key = torch.zeros(1, 1, 3, 4)
    key[0, 0, 1] = 1
    ids = torch.tensor([[[-1, 0, 1]]])
    assert best_match(key, key, ids, torch.tensor([[[-1, 1]]]), 0.5).tolist() == [[[-1, -1, 1]]]
    assert best_match(key, key, ids, torch.tensor([[[-1, 1]]]), 0.0).tolist() == [[[-1, 1, 1]]]
    assert best_match(key, key, ids, torch.zeros(1, 1, 0, dtype=torch.int32), 0.0).tolist() == [[[-1, -1, -1]]]


@pytest.mark.parametrize("ids", [[[[3]]], [[[-2]]], [[0]]])
def test_bad_matches_are_one_line(ids):
    key, fine = torch.ones(1, 1, 3, 2), torch.tensor([[[0]]])
    for sources, centres in ((torch.tensor(ids), fine), (fine, torch.tensor(ids))):
        with pytest.raises(InputError) as error:
            best_match(key, key, sources, centres, 0.5)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        best_match(key, key[:, :, :2], fine, fine, 0.5)
