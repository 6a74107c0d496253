"""Structures, rankings, allocations and masks: the select floor of pruning."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import InputError, ModelError
from gossamer.patterns import Masks, Structure, choose, keep_largest, nm_mask, second_order_prune
from gossamer.patterns.allocation import by_importance, capped_shares, erdos_renyi, whole_counts

shapes = st.tuples(st.integers(1, 7), st.integers(1, 9))


def drawn(shape: tuple[int, int], seed: int, ties: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * 2).round() if ties else x


@given(st.lists(shapes, min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_ranking_removes_exactly_the_smallest_and_the_later_of_equal_ones(sizes, share, seed, ties):
    scores = [drawn(s, seed + i, ties) for i, s in enumerate(sizes)]
    flat = torch.cat([s.flatten() for s in scores])
    remove = round(share * len(flat))
    kept = torch.cat([m.flatten() for m in keep_largest(scores, remove)])
    order = flat.sort(descending=True, stable=True).indices  # the earlier of equal ones first
    wanted = torch.ones(len(flat), dtype=torch.bool)
    wanted[order[len(flat) - remove :]] = False
    assert torch.equal(kept, wanted)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_masks_of_rising_sparsity_are_nested_even_with_ties(a, b, seed):
    score = drawn((5, 8), seed, ties=True)
    less, more = sorted((a, b))
    assert not bool((keep_largest([score], more)[0] & ~keep_largest([score], less)[0]).any())


def test_infinite_scores_force_entries_in_and_out_and_nan_is_refused():
    score = torch.tensor([math.inf, -5.0, -math.inf, 0.0, -0.0])
    assert keep_largest([score], 2)[0].tolist() == [True, False, False, True, True]
    assert keep_largest([score], 3)[0].tolist() == [True, False, False, True, False]
    with pytest.raises(InputError, match="NaN"):
        keep_largest([torch.tensor([math.nan])], 1)
    with pytest.raises(InputError, match="cannot be removed"):
        keep_largest([score], 6)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_nm_keeps_the_n_largest_of_every_group(groups, n, seed):
    score = drawn((3, groups * 4), seed)
    kept = nm_mask(score, n, 4).view(-1, 4)
    assert bool((kept.sum(1) == n).all())
    parts = score.view(-1, 4)
    assert bool((parts.masked_fill(~kept, math.inf).amin(1) >= parts.masked_fill(kept, -math.inf).amax(1)).all())


@pytest.mark.parametrize("text", ["element", "2:4", "4x1", "row", "column", "rows:8"])
def test_a_structure_is_what_its_text_says(text):
    assert str(Structure.parse(text)) == text
    assert Structure.parse(Structure.parse(text)) == Structure.parse(text)


@pytest.mark.parametrize("text", ["3:2", "0:4", "x", "4x", "rows:0", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match="a structure is"):
        Structure.parse(text)


@given(st.sampled_from(["4x1", "1x4", "2x2", "row", "column", "rows:4"]), st.floats(0, 0.9), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_zeros_of_blocks_come_whole_and_exact_to_one_block(structure, sparsity, seed):
    scores = {"a": drawn((8, 8), seed).abs(), "b": drawn((8, 8), seed + 1).abs()}
    masks = choose(scores, sparsity, structure)
    rows, columns = Structure.parse(structure).size((8, 8))
    for mask in masks.values():
        parts = mask.reshape(8 // rows, rows, 8 // columns, columns)
        assert torch.equal(parts.amin((1, 3)), parts.amax((1, 3)))
    assert masks.total - masks.kept == round(sparsity * 128 / (rows * columns)) * rows * columns


def test_a_cap_spares_a_matrix_and_the_others_pay():
    scores = {"weak": torch.full((10, 10), 0.1), "strong": torch.full((10, 10), 9.0)}
    masks = choose(scores, 0.5, cap=0.8)
    assert masks.shares() == pytest.approx({"weak": 0.8, "strong": 0.2})
    with pytest.raises(InputError, match="cannot be reached"):
        choose(scores, 0.9, cap=0.8)


def test_removed_entries_stay_removed_and_count():
    score = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    first = Masks({"w": torch.tensor([[False, True, True, True]])})
    assert choose({"w": score}, 0.5, among=first)["w"].tolist() == [[False, True, True, False]]


def test_shares_by_matrix_and_their_errors():
    scores = {"a": torch.rand(4, 4), "b": torch.rand(4, 4)}
    assert choose(scores, {"a": 0.25, "b": 0.75}).shares() == {"a": 0.25, "b": 0.75}
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match="sparsity"):
            choose(scores, bad)
    with pytest.raises(InputError, match="no multiple"):
        choose({"a": torch.rand(3, 4)}, 0.5, "2x1")
    with pytest.raises(InputError, match="different sizes"):
        choose({"a": torch.rand(4, 4), "b": torch.rand(4, 8)}, 0.5, "row")


@given(st.lists(shapes, min_size=2, max_size=5), st.floats(0.05, 1))
@settings(deadline=None, max_examples=60)
def test_densities_by_shape_meet_the_budget_and_treat_equal_shapes_equally(sizes, density):
    densities = erdos_renyi(sizes, density)
    total = sum(math.prod(s) for s in sizes)
    assert sum(d * math.prod(s) for d, s in zip(densities, sizes, strict=False)) == pytest.approx(density * total)
    assert all(-1e-9 <= d <= 1 + 1e-9 for d in densities)
    for d, s in zip(densities, sizes, strict=False):
        assert d == pytest.approx(densities[sizes.index(s)])


def test_allocation_by_importance_and_rounding():
    assert by_importance([0.0, 1.0], [(2, 2), (2, 2)], 0.75) == [0.5, 1.0]
    assert capped_shares([1.0, 100.0], [10, 10], 0.5, low=0.3) == pytest.approx([0.3, 0.7])
    assert whole_counts([0.3, 0.3, 0.4], [10, 10, 10], 11) == [4, 3, 4]
    for bad in ([1.0, math.nan], [1.0, -1.0], [1.0]):
        with pytest.raises(InputError, match="importances"):
            capped_shares(bad, [1, 1], 0.5)
    with pytest.raises(InputError, match="cannot be rounded"):
        whole_counts([0.5], [4], 5)


def test_masks_measure_each_other():
    a, b = (
        Masks({"w": torch.tensor([True, True, False, False])}),
        Masks({"w": torch.tensor([True, False, False, False])}),
    )
    assert b.within(a)
    assert not a.within(b)
    assert a.cosine(a) == 1
    assert a.cosine(b) == pytest.approx(1 / math.sqrt(2))
    assert a.jaccard(b) == pytest.approx(2 / 3)
    assert (a & b).kept == 1
    big = [torch.rand(400, 400, generator=torch.Generator().manual_seed(i)) < 0.3 for i in (1, 2)]
    assert Masks({"w": big[0]}).cosine(Masks({"w": big[1]})) == pytest.approx(0.3, abs=0.02)


def test_masks_save_as_bits_and_come_back(tmp_path: Path):
    masks = Masks({"a": torch.rand(5, 7) < 0.5, "b": torch.rand(3, 2, 2) < 0.5})
    path = masks.save(tmp_path / "m.safetensors")
    back = Masks.load(path)
    assert all(torch.equal(back[n], masks[n]) for n in masks)
    assert list(back) == list(masks)
    assert path.stat().st_size < 400
    for content in (b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            Masks.load(path)


def test_masks_of_another_model_are_refused():
    with pytest.raises(ModelError, match="another model"):
        Masks({"weight": torch.ones(2, 2, dtype=torch.bool)}).apply(nn.Linear(3, 2))


def test_second_order_with_identity_is_magnitude_pruning_per_block():
    weight = drawn((6, 16), 1)
    pruned, mask = second_order_prune(weight, torch.eye(16), 0.5, block_size=8)
    for part in range(2):
        block = slice(8 * part, 8 * part + 8)
        assert torch.equal(mask[:, block], keep_largest([weight[:, block].square()], 24)[0])
    assert torch.allclose(pruned, weight * mask, atol=1e-6)


@given(st.integers(0, 50), st.sampled_from(["element", "2:4"]))
@settings(deadline=None, max_examples=20)
def test_compensation_lowers_the_error_at_equal_mask(seed, structure):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    weight = torch.randn(8, 16, generator=generator)
    pruned, mask = second_order_prune(weight, x.T @ x, 0.5, structure, block_size=8)
    assert not bool(pruned[~mask].any())
    assert int(mask.sum()) == 64
    assert (x @ (weight - pruned).T).norm() <= (x @ (weight - weight * mask).T).norm() + 1e-4
    again, same = second_order_prune(weight, x.T @ x, kept=mask, block_size=8)
    assert torch.equal(same, mask)
    assert torch.allclose(again, pruned, atol=1e-5)


def test_second_order_refuses_what_it_cannot_take():
    weight = torch.rand(4, 8)
    for gram, kwargs in (
        (torch.eye(7), {}),
        (torch.full((8, 8), math.nan), {}),
        (torch.eye(8), {"structure": "4x1"}),
        (torch.eye(8), {"sparsity": 1.5}),
        (torch.eye(8), {"structure": "2:4", "block_size": 6}),
    ):
        with pytest.raises(InputError):
            second_order_prune(weight, gram, **kwargs)


def test_dead_inputs_are_removed_from_the_product():
    x = torch.randn(32, 8)
    x[:, 3] = 0
    pruned, _ = second_order_prune(torch.randn(4, 8), x.T @ x, 0.25, block_size=8)
    assert bool(pruned.isfinite().all())
    assert not bool(pruned[:, 3].any())
