"""Essential sparsity: the card's exact checks, the turn's search, the lottery-ticket baseline and the monitor."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import matrices
from gossamer.models import MaskHolder, Plan, block_batches, byte_model, tiny_model, token_loss, train
from gossamer.patterns import Masks, choose
from gossamer.patterns.allocation import erdos_renyi
from gossamer.patterns.criteria import random
from gossamer.registry import make
from gossamer.weights.essential_sparsity import (
    Essential,
    Point,
    essential_sparsity,
    magnitude_mask,
    magnitude_prune,
    refined,
    sparsity_curve,
)
from gossamer.weights.essential_sparsity_study import (
    ZeroWeightMonitor,
    layer_profile,
    lottery_ticket,
    mask_similarity,
    storage_bytes,
    zero_weights,
)

TOKENS = torch.randint(1, 256, (4, 24), generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    """Matrices in blocks, and a head that is not pruned."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
        self.head = nn.Linear(2, 2)
        for block, weight in zip(self.blocks, weights, strict=True):
            block.weight.data.copy_(weight)


def drawn(seed: int, levels: int = 0) -> Stack:
    """Three matrices; with `levels`, values on so few levels that most are ties, as after de-quantising."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(s, generator=generator) * scale for s, scale in (((4, 8), 1.0), ((8, 8), 0.5), ((3, 12), 2.0))
    ]
    return Stack([(w * levels).round() / levels if levels else w for w in weights])


def magnitudes(model: nn.Module) -> torch.Tensor:
    return torch.cat([m.weight.flatten().abs() for m in matrices(model)])


# -- the mask (1, 2, 3, 9) --------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([0, 1, 3]), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_counts_are_exact_masks_are_nested_and_the_ranking_is_global(seed, levels, one, two):
    model = drawn(seed, levels)
    low, high = sorted((one, two))
    masks = [magnitude_mask(model, s) for s in (low, high)]
    total = masks[0].total
    assert total == 32 + 64 + 36
    assert [total - m.kept for m in masks] == [round(s * total) for s in (low, high)]  # 1
    assert masks[1].within(masks[0])  # 2
    flat = torch.cat([masks[0][m.name].flatten() for m in matrices(model)])
    size = magnitudes(model)
    if flat.any() and (~flat).any():
        assert float(size[~flat].max()) <= float(size[flat].min())  # 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_embeddings_norms_biases_and_heads_stay_and_nothing_removed_is_the_dense_model_bit_for_bit(family):
    dense, same = tiny_model(family), tiny_model(family)
    assert magnitude_prune(same, 0.0).sparsity == 0
    with torch.no_grad():
        assert torch.equal(dense(TOKENS).logits, same(TOKENS).logits)  # 9
    magnitude_prune(same, 0.5)
    prunable = {m.name for m in matrices(dense)}
    for name, parameter in same.named_parameters():
        if name not in prunable:
            assert torch.equal(parameter, dense.get_parameter(name))
    assert sum(zero_weights(same).values()) == round(0.5 * sum(m.parameter.numel() for m in matrices(dense)))


def test_a_mask_is_taken_before_a_cast_to_a_narrow_type():
    model = drawn(5)
    masks = magnitude_mask(model, 0.5)
    narrow = magnitude_mask(copy.deepcopy(model).bfloat16(), 0.5)
    assert narrow.kept == masks.kept  # ties of bfloat16 do not move the count


# -- N:M and ERK (4, 6) -----------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]))
@settings(deadline=None, max_examples=15)
def test_every_group_of_m_inputs_keeps_its_n_largest(seed, nm):
    n, m = nm
    model = drawn(seed)
    masks = magnitude_mask(model, structure=f"{n}:{m}")
    for matrix in matrices(model):
        groups, kept = matrix.weight.abs().reshape(-1, m), masks[matrix.name].reshape(-1, m)
        assert bool((kept.sum(1) == n).all())
        assert bool((groups.masked_fill(kept, 0).amax(1) <= groups.masked_fill(~kept, math.inf).amin(1)).all())


@given(st.floats(0.02, 0.98), st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_erk_densities_sum_to_the_budget_stay_below_one_and_go_by_shape(sparsity, seed):
    shapes = [(8, 8), (4, 32), (8, 8), (64, 16)]
    density = erdos_renyi(shapes, 1 - sparsity)
    sizes = [a * b for a, b in shapes]
    assert sum(d * n for d, n in zip(density, sizes, strict=True)) == pytest.approx((1 - sparsity) * sum(sizes))
    assert max(density) <= 1 + 1e-9
    assert density[0] == density[2]
    free = [i for i, d in enumerate(density) if d < 1 - 1e-9]
    raw = [sum(shapes[i]) / sizes[i] / density[i] for i in free]
    assert raw == pytest.approx(raw[:1] * len(raw))
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): random(torch.empty(s), generator) for i, s in enumerate(shapes)}
    counts = {n: int(m.sum()) for n, m in choose(scores, sparsity, scope="erk").items()}
    assert all(abs(counts[str(i)] - d * n) <= 0.5 + 1e-6 for i, (d, n) in enumerate(zip(density, sizes, strict=True)))


# -- masks through fine-tuning (5) ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5),
    ],
)
def test_fine_tuning_leaves_masked_entries_at_exactly_zero_and_moves_the_others(build):
    model = tiny_model("llama")
    masks = magnitude_prune(model, 0.4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build(model.parameters())
    MaskHolder(model, masks, optimizer)
    for batch in block_batches(TOKENS, 2, 4):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not bool(weight[~mask].any())
        assert float((weight != before[name])[mask].float().mean()) > 0.99


# -- the turn (7) -----------------------------------------------------------------------------------------------------


def test_the_turn_of_the_cards_curves():
    grid = [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert essential_sparsity(grid, [0, 0, -0.5, -0.9, -3, -10], 1.0) == Essential(0.3, 0.5)
    assert str(essential_sparsity(grid, [0.0] * 6, 1.0)) == "> 0.5"


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0, 3))
def test_the_turn_is_as_defined(scores, epsilon):
    grid = [i / 10 for i in range(len(scores))]
    good = [score >= scores[0] - epsilon for score in scores]
    found = essential_sparsity(grid, scores, epsilon).sparsity
    if all(good):
        assert found is None
    else:
        i = grid.index(found)
        assert all(good[: i + 1])
        assert not good[i + 1]


def test_a_score_that_is_not_a_number_is_a_drop_and_what_is_no_curve_is_refused():
    assert essential_sparsity([0, 0.1, 0.2], [1.0, 1.0, math.nan]).sparsity == 0.1
    for grid, scores in (
        ([], []),
        ([0.1, 0.2], [0, 0]),
        ([0, 0.2, 0.2], [0, 0, 0]),
        ([0, 0.1], [0]),
        ([0], [math.nan]),
    ):
        with pytest.raises(InputError):
            essential_sparsity(grid, scores)
    with pytest.raises(InputError, match="grid lies"):
        sparsity_curve(tiny_model("llama"), lambda m: 0.0, [1.0])
    with pytest.raises(InputError, match="N:M"):
        sparsity_curve(tiny_model("llama"), lambda m: 0.0, ["4x1"])


@given(st.floats(0.11, 0.59), st.floats(0.005, 0.05))
def test_bisection_finds_the_turn_to_its_resolution(turn, resolution):
    def score(s: float) -> float:
        return 0.0 if s <= turn else -5.0

    curve = [Point(i / 10, (score(i / 10),), i / 10) for i in range(8)]
    found, points = refined(curve, score, 1.0, resolution)
    assert found.sparsity <= turn < found.sparsity + resolution
    assert [p.sparsity for p in points] == sorted(p.sparsity for p in points)


def test_a_curve_takes_fresh_copies_fine_tunes_with_every_seed_and_other_pruners():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    calls: list[tuple[float, int]] = []

    def finetune(copy: Any, masks: Masks, seed: int) -> None:
        calls.append((round(masks.sparsity, 3), seed))
        with torch.no_grad():
            copy.model.layers[0].mlp.up_proj.weight.add_(seed)  # revives: the masks go on again

    curve = sparsity_curve(model, lambda m: Masks.of(m).sparsity, [0.5, 0.0, "2:4"], finetune=finetune, seeds=(1, 2))
    assert [(p.sparsity, p.asked, len(p.scores)) for p in curve] == [(0.0, 0.0, 2), (0.5, 0.5, 2), (0.5, "2:4", 2)]
    assert calls == [(s, seed) for s in (0.0, 0.5, 0.5) for seed in (1, 2)]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def other(m: nn.Module, s: float | str) -> Masks:
        masks = make("sparsegpt", sparsity=s).apply(m, TOKENS).masks
        assert masks is not None
        return masks

    def error(m: Any) -> float:
        with torch.no_grad():
            return -float((m(TOKENS).logits - model(TOKENS).logits).norm())

    grid = [0.0, 0.5]
    better, plain = sparsity_curve(model, error, grid, prune=other), sparsity_curve(model, error, grid)
    assert better[0].score == plain[0].score == 0
    assert better[1].score > plain[1].score


# -- similarity, tickets, profile (8) ---------------------------------------------------------------------------------


def test_masks_are_like_themselves_and_random_ones_like_chance():
    generator = torch.Generator().manual_seed(0)
    for density in (0.3, 0.7):
        one, two = (Masks({"w": torch.rand(400, 400, generator=generator) < density}) for _ in range(2))
        assert mask_similarity(one, one)["cosine"] == pytest.approx(1)
        found = mask_similarity(one, two)
        assert found["cosine"] == pytest.approx(density, abs=0.01)
        assert found["excess"] == pytest.approx(0, abs=0.01)
        assert found["jaccard"] == pytest.approx((1 - density) / (1 + density), abs=0.01)
    with pytest.raises(InputError, match="in common"):
        mask_similarity(one, Masks({"v": one["w"]}))


def test_a_ticket_rewinds_and_prunes_what_the_trained_weights_say():
    model = tiny_model("llama")
    start = copy.deepcopy(model.state_dict())
    name = matrices(model)[0].name
    seen = []

    def finetune(m: Any, masks: Masks, step: int) -> None:
        seen.append((step, round(masks.sparsity, 4)))
        weight = m.get_parameter(name)
        assert torch.equal(weight, start[name] * masks[name])  # the checkpoint's, masked
        with torch.no_grad():
            weight[0].mul_(1e-6)  # training makes the first row the least

    masks = lottery_ticket(model, finetune, 0.2, rounds=2)
    assert seen == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert not bool(masks[name][0].any())
    assert bool(magnitude_mask(tiny_model("llama"), 0.2)[name][0].any())  # which the checkpoint alone would have kept


def test_the_profile_adds_up_and_storage_is_counted():
    model = tiny_model("llama")
    masks = magnitude_mask(model, 0.4)
    profile = layer_profile(model, masks)
    size = {m.name: m.parameter.numel() for m in matrices(model)}
    assert sum(profile["by_matrix"][n] * size[n] for n in size) == pytest.approx(0.4 * masks.total, abs=1)
    assert set(profile["by_role"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert storage_bytes(masks)["sparse"] == masks.kept * 4 + masks.total // 8
    nm = magnitude_mask(model, structure="2:4")
    assert storage_bytes(nm, "2:4", 2)["sparse"] == nm.total + nm.total // 4 * 3 // 8  # C(4, 2) = 6 fit in 3 bits


# -- the monitor ------------------------------------------------------------------------------------------------------


def test_the_monitor_counts_near_and_exact_zeros_and_finds_the_jump():
    model = byte_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    monitor = ZeroWeightMonitor(model, tau=0.1, every=2)

    def after(step: int) -> None:
        if step == 3:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(0)
        monitor(step)

    train(model, block_batches(TOKENS, 2, 8), Plan(steps=8, lr=1e-6, warmup=1), after_step=after)
    total = sum(m.parameter.numel() for m in matrices(model))
    assert [p["step"] for p in monitor.history] == [0, 2, 4, 6]
    assert monitor.history[1]["near"] == pytest.approx(0.08, abs=0.02)  # of a normal, |x| < 0.1 σ
    assert monitor.history[2]["near"] - monitor.history[1]["near"] == pytest.approx(32 * 64 / total * 0.92, abs=0.02)
    found = monitor.abrupt(window=1)
    assert (found["start"], found["end"]) == (2, 4)
    monitor.history = [{"step": i, "near": i / 10, "zero": 0.0} for i in range(10)]
    assert monitor.abrupt(window=2) is None  # an even rise is not abrupt


def test_the_monitor_follows_any_optimizer_and_refuses_what_it_cannot_watch():
    model = tiny_model("llama")
    monitor = ZeroWeightMonitor(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stop = monitor.follow(optimizer)
    optimizer.step()
    optimizer.step()
    stop()
    optimizer.step()
    assert [p["step"] for p in monitor.history] == [0, 1]
    with pytest.raises(InputError, match="tau"):
        ZeroWeightMonitor(model, tau=0)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.inf
    with pytest.raises(ModelError, match="finite"):
        ZeroWeightMonitor(model)


# -- the method -------------------------------------------------------------------------------------------------------


def test_the_method_finds_the_turn_on_text_and_prunes_to_it():
    model = tiny_model("llama", initializer_range=0.05)
    dense = token_loss(model, TOKENS)
    method = make("essential-sparsity", epsilon=0.02, step=0.2, resolution=0.05)
    applied = method.apply(model, TOKENS)
    facts = applied.facts
    curve = facts["curve"]
    assert curve[0]["perplexity"] == pytest.approx(math.exp(dense))
    limit = 1.02 * curve[0]["perplexity"] * (1 + 1e-9)
    good = [p["sparsity"] for p in curve if p["perplexity"] <= limit]
    assert facts["sparsity"] == pytest.approx(max(good), abs=1e-4)
    assert math.exp(token_loss(applied.model, TOKENS)) <= limit
    if not facts["essential_sparsity"].startswith(">"):
        assert min(p["sparsity"] for p in curve if p["perplexity"] > limit) - max(good) <= 0.05 + 1e-9


def test_it_can_be_set_to_a_share_of_parameters_and_asks_for_text():
    model = tiny_model("llama")
    cls = type(make("essential-sparsity"))
    assert cls.needs == {"calibration"}  # so that `gossamer apply` hands text to the search
    assert cls.with_kept(0.75, model).apply(model).facts["sparsity"] == pytest.approx(0.25, abs=1e-4)


def test_a_sparsity_or_nm_needs_no_text_and_the_checkpoint_loads_without_this_library(tmp_path):
    applied = make("essential-sparsity", structure="2:4").apply(tiny_model("llama"))
    assert applied.facts["sparsity"] == 0.5
    model = tiny_model("gpt2")
    applied = make("essential-sparsity", sparsity=0.3).apply(model)
    applied.model.save_pretrained(tmp_path)
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Masks.of(loaded, 0.01).cosine(applied.masks) == pytest.approx(1)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, applied.model(TOKENS).logits)


def test_what_it_cannot_do_is_said_in_one_line():
    for wrong in ({"sparsity": 1.0}, {"structure": "4x1"}, {"structure": "5:4"}, {"structure": "2:4", "sparsity": 0.5}):
        with pytest.raises(InputError, match="essential-sparsity"):
            make("essential-sparsity", **wrong)
    with pytest.raises(InputError, match="token blocks"):
        make("essential-sparsity").apply(tiny_model("llama"))
    with pytest.raises(ModelError, match="no matrix"):
        make("essential-sparsity", sparsity=0.5).apply(nn.LayerNorm(3))
    broken = tiny_model("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        make("essential-sparsity", sparsity=0.5).apply(broken)
    with pytest.raises(ModelError, match="not finite"):
        make("essential-sparsity").apply(broken, TOKENS)


def test_masks_of_rising_sparsity_are_nested_in_the_real_order():
    model = drawn(3, levels=2)
    chain = [magnitude_mask(model, s / 10) for s in range(11)]
    assert all(b.within(a) for a, b in itertools.pairwise(chain))
    assert chain[-1].kept == 0
