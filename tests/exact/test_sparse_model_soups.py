"""Sparse Model Soups: the card's exact checks on phases, supports, merges, batch norms and schedules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.data.images import shapes
from gossamer.errors import InputError, ModelError
from gossamer.models import Plan, class_loss, tiny_model, train
from gossamer.patterns import Masks
from gossamer.registry import make
from gossamer.weights.gradual import GradualPruning, PruneRule, remaining_shares
from gossamer.weights.sparse_model_soups import SparseModelSoups
from gossamer.weights.sparse_model_soups_merge import (
    average,
    average_and_reprune,
    classifier_report,
    distances,
    ensemble,
    greedy_soup,
    recalibrate_batchnorm,
    uniform_soup,
    validation_split,
)
from gossamer.weights.sparse_model_soups_retrain import (
    SCHEDULES,
    Retraining,
    adaptive_start,
    retrainer,
    shuffled_batches,
)

IMAGES, LABELS = shapes(120, seed=0, noise=0.3)
INPUTS = list(IMAGES.split(40))


def cnn(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(54, 10),
        )


def soups(**overrides: Any) -> SparseModelSoups:
    return SparseModelSoups(
        **{
            "sparsity": 0.9,
            "phases": 3,
            "copies": 3,
            "steps": 4,
            "lr": 0.05,
            "min_lr": 0.001,
            "total_steps": 20,
            **overrides,
        }
    )


def retrain_of(method: SparseModelSoups, record: list[nn.Module] | None = None) -> Any:
    inner = retrainer(lambda seed, steps: shuffled_batches(IMAGES, LABELS, 30, steps, seed), method.plan)

    def retrain(model: nn.Module, masks: Masks, setting: Any) -> None:
        inner(model, masks, setting)
        if record is not None:
            record.append(copy.deepcopy(model))

    return retrain


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(IMAGES).argmax(1) == LABELS).float().mean())


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# -- phases and supports (1, 2, 6) ------------------------------------------------------------------------------------


@given(st.floats(0, 0.99), st.integers(1, 8))
def test_each_phase_removes_the_same_share_of_what_remains(sparsity, phases):
    shares = remaining_shares(sparsity, phases)
    q = 1 - (1 - sparsity) ** (1 / phases)
    assert shares == pytest.approx([1 - (1 - q) ** p for p in range(1, phases + 1)])
    assert shares[-1] == pytest.approx(sparsity)


@pytest.mark.parametrize("merge", ["uniform", "greedy"])
def test_candidates_and_soup_share_the_mask_of_their_phase_and_supports_shrink(merge):
    model, method = cnn(), soups(merge=merge)
    candidates: list[nn.Module] = []
    soup_masks: list[Masks] = []

    def after(m: nn.Module, phase: int) -> None:
        soup_masks.append(Masks({n: m.get_parameter(n) != 0 for n in ("0.weight", "5.weight")}))

    applied = method.run(model, retrain_of(method, candidates), score=accuracy, inputs=INPUTS, after_phase=after)
    total = 54 + 540
    assert applied.masks is not None
    assert applied.masks.total == total  # every linear and convolution, no batch norm
    for p, (facts, share) in enumerate(zip(applied.facts["phases"], remaining_shares(0.9, 3), strict=True)):
        assert round(facts["sparsity"] * total) == round(share * total)  # 1
        for candidate in candidates[3 * p : 3 * p + 3]:
            found = Masks({n: candidate.get_parameter(n) != 0 for n in soup_masks[p]})
            assert found.within(soup_masks[p])
            assert found.cosine(soup_masks[p]) > 0.999  # 2: an entry may be exactly 0 by chance only
    assert soup_masks[2].within(soup_masks[1])  # 6
    assert soup_masks[1].within(soup_masks[0])
    assert applied.facts["sparsity"] == pytest.approx(0.9, abs=1 / total)
    assert soup_masks[2].within(applied.masks)
    assert len({tuple(s["seed"] for s in f["settings"]) for f in applied.facts["phases"]}) == 3


def test_random_pruning_and_one_ranking_a_tensor_are_there_too():
    method = soups(criterion="random", scope="matrix", phases=1, copies=1, sparsity=0.5)
    applied = method.run(cnn(), retrain_of(method), inputs=INPUTS)
    assert applied.masks is not None
    assert list(applied.masks.shares().values()) == [0.5, 0.5]


# -- one copy is IMP (3) ----------------------------------------------------------------------------------------------


def test_one_copy_or_equal_copies_are_iterative_magnitude_pruning_bit_for_bit():
    base = cnn()
    one = soups(copies=1)
    many = soups(copies=3, vary="weight_decay", weight_decay=0.0)  # every factor of no decay is no decay
    models = [copy.deepcopy(base) for _ in range(3)]
    one.run(models[0], retrain_of(one), inputs=INPUTS)
    many.run(models[1], retrain_of(many), inputs=INPUTS)
    by_hand = models[2]
    kept: torch.Tensor | None = None
    for p, share in enumerate(remaining_shares(0.9, 3)):
        weights = [by_hand[0].weight, by_hand[5].weight]
        flat = torch.cat([w.detach().flatten().abs() for w in weights])
        if kept is not None:
            flat[~kept] = -1
        order = flat.sort(descending=True, stable=True).indices
        kept = torch.zeros(len(flat), dtype=torch.bool)
        kept[order[: len(flat) - round(share * len(flat))]] = True
        masks = Masks({"0.weight": kept[:54].view(6, 1, 3, 3), "5.weight": kept[54:].view(10, 54)})
        masks.apply(by_hand)
        setting = one.settings_of(p)[0]
        optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
        plan = one.plan(setting)
        for step, (x, y) in enumerate(shuffled_batches(IMAGES, LABELS, 30, 4, setting.seed)):
            by_hand.train()
            optimizer.param_groups[0]["lr"] = plan.rate(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(x), y).backward()
            for name, mask in masks.items():
                by_hand.get_parameter(name).grad.mul_(mask)
            optimizer.step()
            masks.apply(by_hand)
        recalibrate_batchnorm(by_hand, INPUTS, 0.2)
        by_hand.eval()
    assert equal(models[0], models[1])
    assert equal(models[0], by_hand)


# -- merges (4, 5) ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_a_soup_of_linear_models_predicts_the_mean_of_their_predictions(count, seed):
    generator = torch.Generator().manual_seed(seed)
    models = [nn.Linear(5, 3) for _ in range(count)]
    for model in models:
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
    soup = nn.Linear(5, 3)
    soup.load_state_dict(uniform_soup(models).state)
    x = torch.randn(7, 5, generator=generator)
    with torch.no_grad():
        wanted = torch.stack([m(x) for m in models]).mean(0)
        assert torch.allclose(soup(x), wanted, atol=1e-5)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_a_greedy_soup_is_never_worse_than_its_best_candidate(values):
    models = []
    for value in values:
        models.append(nn.Linear(1, 1, bias=False))
        models[-1].weight.data.fill_(value)

    def score(m: nn.Module) -> float:
        return -abs(float(m.weight.detach()) - 0.3)

    soup = greedy_soup(models, score)
    best = max(range(len(models)), key=lambda i: (score(models[i]), -i))
    assert soup.kept[0] == best
    assert soup.score >= score(models[best])
    merged = nn.Linear(1, 1, bias=False)
    merged.load_state_dict(soup.state)
    assert score(merged) == pytest.approx(soup.score)
    if len(models) == 1:
        assert torch.equal(soup.state["weight"], models[0].weight)


def test_masks_are_enforced_before_the_merge_and_statistics_are_averaged():
    models = [cnn(0), cnn(1)]
    masks = Masks({"5.weight": torch.rand(10, 54) < 0.5})
    for i, model in enumerate(models):
        model[1].running_mean.fill_(i)
        model[1].num_batches_tracked.fill_(5 + i)
    state = average(models, masks)
    assert not bool(state["5.weight"][~masks["5.weight"]].any())
    assert torch.allclose(state["0.weight"], (models[0][0].weight + models[1][0].weight) / 2)
    assert state["1.running_mean"].tolist() == [0.5] * 6
    assert int(state["1.num_batches_tracked"]) == 5


def test_the_average_of_models_pruned_alone_is_pruned_again():
    models = [cnn(0), cnn(1)]
    for model in models:
        average_and_reprune([model], 0.8)
    zeros = [sum(int((p == 0).sum()) for p in m.parameters()) for m in models]
    mean = cnn()
    mean.load_state_dict(average(models))
    assert sum(int((p == 0).sum()) for p in mean.parameters()) < 0.95 * min(zeros)  # supports differ
    assert average_and_reprune(models, 0.8, None).sparsity == pytest.approx(0.8, abs=0.01)


# -- batch norms (7) --------------------------------------------------------------------------------------------------


def test_recalibrated_batch_norms_hold_the_statistics_of_their_inputs():
    model = cnn()
    model[1].running_mean.fill_(9)
    recalibrate_batchnorm(model, INPUTS, 1.0)
    with torch.no_grad():
        hidden = model[0](IMAGES)
        parts = [model[0](part) for part in INPUTS]
    assert torch.allclose(model[1].running_mean, hidden.mean((0, 2, 3)), atol=1e-5)
    variance = torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0)
    assert torch.allclose(model[1].running_var, variance, atol=1e-5)
    assert model[1].momentum == 0.1
    recalibrate_batchnorm(model, INPUTS, 0.2)  # of three batches the first
    assert torch.allclose(model[1].running_mean, parts[0].mean((0, 2, 3)), atol=1e-5)
    assert model.training
    plain = nn.Linear(2, 2)
    recalibrate_batchnorm(plain, [])  # nothing to do
    with pytest.raises(InputError, match="batch norms"):
        recalibrate_batchnorm(model, [])


# -- schedules (8) ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 500), st.floats(0.01, 1), st.floats(0, 1), st.sampled_from(SCHEDULES))
def test_rates_stay_between_zero_and_the_largest(steps, total, lr, share, schedule):
    plan = Retraining(steps=steps, lr=lr, low=share * lr, total_steps=total, schedule=schedule)
    rates = [plan.rate(t) for t in range(steps)]
    assert all(0 <= rate <= lr * (1 + 1e-9) for rate in rates)
    warmup = round(0.1 * steps)
    if schedule in ("CLR", "LLR", "ALLR", "SLR"):
        assert rates[:warmup] == sorted(rates[:warmup])
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
        assert max(rates) == pytest.approx(lr)


def test_schedules_by_hand():
    def rates(schedule: Any, **overrides: Any) -> list[float]:
        plan = Retraining(**{"steps": 4, "lr": 0.8, "low": 0.2, "total_steps": 9, "schedule": schedule, **overrides})
        return [plan.rate(t) for t in range(4)]

    def dense(step: int) -> float:
        return 0.9 - 0.1 * step

    assert rates("FT") == [0.2] * 4
    assert rates("LRW", dense=dense) == pytest.approx([0.4, 0.3, 0.2, 0.1])  # steps 5 to 8 of 9
    assert rates("SLR", dense=dense) == pytest.approx([0.9, 0.7, 0.5, 0.3])  # every second one
    assert rates("CLR") == pytest.approx([0.2 + 0.3 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    assert rates("LLR") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    warm = Retraining(steps=20, lr=1.0, schedule="LLR")
    assert [warm.rate(t) for t in (0, 1, 2)] == pytest.approx([0.5, 1.0, 1.0])


@given(st.floats(0.001, 1), st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 1), st.integers(0, 99))
def test_the_adaptive_start_lies_in_its_bounds_and_grows_with_the_damage(lr, steps, total, q, seed):
    before = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    starts = []
    for gone in (0, 10, 50):
        after = before.clone()
        after[:gone] = 0
        starts.append(adaptive_start(before, after, q, lr, steps, total))
    assert all(lr * min(steps / total, 1.0) - 1e-12 <= start <= lr + 1e-12 for start in starts)
    assert starts == sorted(starts)
    assert starts[2] == pytest.approx(lr)
    with pytest.raises(InputError, match="adaptive"):
        adaptive_start(before, before[:3], q, lr, steps, total)


def test_allr_starts_each_phase_by_what_its_pruning_did():
    method = soups(schedule="ALLR", total_steps=400, copies=1)
    facts = method.run(cnn(), retrain_of(method), inputs=INPUTS).facts
    starts = [phase["settings"][0]["lr"] for phase in facts["phases"]]
    assert all(0.05 * 4 / 400 <= start <= 0.05 for start in starts)
    assert len(set(starts)) == 3


def test_a_phase_alone_serves_methods_that_prune_while_they_train():
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rule = PruneRule("taylor", include=lambda name: True)
    gradual = GradualPruning(0.6, end=5, every=1, rule=rule).follow(model, optimizer)
    batches = shuffled_batches(IMAGES, LABELS, 30, 6, 0)
    train(model, batches, Plan(6, 0.05), loss=class_loss, optimizer=optimizer, after_step=gradual.step)
    gradual.release()
    method = soups(copies=2)
    facts = method.soup_of(model, gradual.masks, retrain_of(method), method.settings_of(0), inputs=INPUTS)
    assert facts["kept"] == [0, 1]
    assert facts["distances"]["l2_max"] > 0
    assert all(not bool(model.get_parameter(n)[~m].any()) for n, m in gradual.masks.items())
    assert gradual.masks.sparsity == pytest.approx(0.6, abs=0.001)


# -- settings and diagnostics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vary", ["seed", "weight_decay", "length", "lr"])
def test_exactly_one_thing_differs_between_copies(vary):
    method = soups(vary=vary, weight_decay=0.1, copies=3)
    found = [vars(s) for s in method.settings_of(1)]
    key = {"length": "steps"}.get(vary, vary)
    assert len({s[key] for s in found}) == 3
    for other in {"seed", "weight_decay", "steps", "lr"} - {key}:
        assert len({s[other] for s in found}) == 1
    assert found[1][key] == {"seed": 1001, "weight_decay": 0.1, "steps": 4, "lr": 0.05}[key]


def test_diagnostics_by_hand():
    models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    for model, row in zip(models, ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]), strict=True):
        model.weight.data.copy_(torch.tensor([row]))
    found = distances(models)
    assert found["l2_max"] == pytest.approx(2)
    assert found["angle_max"] == pytest.approx(180)
    assert found["angle_mean"] == pytest.approx((90 + 180 + 90) / 3)
    assert found["centre_min"] == pytest.approx(2 / 3)
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    report = classifier_report(probabilities, torch.tensor([0, 1, 1, 1]), bins=10)
    assert report["accuracy"] == 0.75
    assert report["worst_class"] == pytest.approx(2 / 3)
    assert report["ece"] == pytest.approx(0.5 * 0.3 + 0.25 * 0.3 + 0.25 * 0.45, abs=1e-6)
    assert report["mce"] == pytest.approx(0.45, abs=1e-6)
    x = torch.rand(4, 2)
    pair = [nn.Linear(2, 3), nn.Linear(2, 3)]
    assert torch.allclose(ensemble(pair, x), (pair[0](x).softmax(1) + pair[1](x).softmax(1)) / 2)
    rows, held = validation_split(20)
    assert sorted([*rows.tolist(), *held.tolist()]) == list(range(20))
    assert len(held) == 2


# -- a language model, and what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_model_is_pruned_in_its_blocks_and_loads_without_this_library(family, tmp_path):
    tokens = torch.randint(1, 256, (12, 17), generator=torch.Generator().manual_seed(0))
    method = make("sparse-model-soups", sparsity=0.6, phases=2, copies=2, steps=3, batch=4, merge="greedy")
    applied = method.apply(tiny_model(family), tokens)
    assert applied.facts["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert Masks.of(applied.model, 0.01).within(applied.masks)
    for phase in applied.facts["phases"]:
        assert phase["soup"] >= phase["best"] - 1e-9  # greedy, on the same data
    applied.model.save_pretrained(tmp_path)
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, applied.model(tokens).logits)


def test_what_it_cannot_do_is_said_in_one_line():
    for wrong in (
        {"sparsity": 1.0},
        {"phases": 0},
        {"vary": "width"},
        {"schedule": "SGD"},
        {"merge": "best"},
        {"lr": 1e-6},
        {"schedule": "FT", "vary": "lr"},
    ):
        with pytest.raises(InputError, match="sparse-model-soups"):
            make("sparse-model-soups", **wrong)
    method = soups(merge="greedy", phases=1)
    with pytest.raises(InputError, match="score"):
        method.run(cnn(), retrain_of(method), inputs=INPUTS)
    method = soups(phases=1)
    with pytest.raises(InputError, match="batch norms"):
        method.run(cnn(), retrain_of(method))
    with pytest.raises(InputError, match="token blocks"):
        make("sparse-model-soups").apply(tiny_model("llama"))
    with pytest.raises(InputError, match="one model or more"):
        average([])
    with pytest.raises(InputError, match="one model or more"):
        greedy_soup([], lambda m: 0.0)
    with pytest.raises(ModelError, match="different shapes"):
        average([nn.Linear(2, 2), nn.Linear(2, 3)])
    with pytest.raises(ModelError, match="another model"):
        average([nn.Linear(2, 2)], Masks({"weight": torch.ones(3, 3)}))
    broken = nn.Linear(2, 2)
    broken.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        average([nn.Linear(2, 2), broken])
    for wrong in ({"schedule": "XLR"}, {"steps": 0}, {"low": 2.0}):
        with pytest.raises(InputError, match="retraining"):
            Retraining(**{"steps": 4, "lr": 1.0, **wrong})
    with pytest.raises(InputError, match="too few"):
        validation_split(1)
    with pytest.raises(InputError, match="shapes"):
        shapes(0)
    with pytest.raises(InputError, match="probabilities"):
        classifier_report(torch.rand(3), torch.zeros(3))


def test_shapes_are_seeded_and_can_be_learned():
    again, labels = shapes(120, seed=0, noise=0.3)
    assert torch.equal(again, IMAGES)
    assert torch.equal(labels, LABELS)
    clean, classes = shapes(400, seed=1)
    means = torch.stack([clean[classes == c].mean(0) for c in range(10)]).flatten(1)
    assert float(torch.cdist(means, means).add(torch.eye(10) * 9).min()) > 0.5  # no two classes look alike on average
    model = cnn()
    batches = shuffled_batches(clean, classes, 40, 150, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, batches, Plan(steps=150, lr=0.1, warmup=5), loss=class_loss, optimizer=optimizer)
    with torch.no_grad():
        assert float((model(clean).argmax(1) == classes).float().mean()) > 0.7
