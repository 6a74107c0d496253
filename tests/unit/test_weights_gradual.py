"""Gradual pruning and prune–retrain, for every criterion, structure and scope."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import matrices
from gossamer.models import Plan, block_batches, byte_model, class_loss, language_loss, tiny_model, train
from gossamer.patterns import Masks, choose
from gossamer.patterns.criteria import magnitude
from gossamer.weights.gradual import (
    CRITERIA,
    GradualPruning,
    PruneRule,
    ScoreKeeper,
    even_shares,
    passes,
    prune_retrain,
    remaining_shares,
    state_of,
)

TOKENS = torch.randint(0, 256, (6, 17), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def trained(schedule: GradualPruning, steps: int = 8):
    model = byte_model("llama", **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    gradual = schedule.follow(model, optimizer)
    seen: list[Masks] = []

    def after(step: int) -> None:
        gradual.step(step)
        seen.append(gradual.masks)
        for name, mask in gradual.masks.items():
            assert not bool(model.get_parameter(name)[~mask].any())

    train(model, block_batches(TOKENS, 2, steps), Plan(steps=steps, warmup=1), optimizer=optimizer, after_step=after)
    return model, gradual, seen


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("structure", ["element", "2:4", "4x1", "row"])
@pytest.mark.parametrize("scope", ["global", "matrix", "erk"])
def test_any_criterion_structure_and_scope_reach_the_final_sparsity_by_nested_masks(criterion, structure, scope):
    if structure == "row" and scope == "global":
        return  # rows of different lengths do not compete
    _, gradual, seen = trained(GradualPruning(0.5, end=6, every=2, rule=PruneRule(criterion, structure, scope)))
    assert [step for step, _ in gradual.history] == [0, 2, 4, 6]
    assert gradual.masks.sparsity == pytest.approx(0.5, abs=0.02 if scope == "erk" or structure == "row" else 1e-3)
    assert all(after.within(before) for before, after in itertools.pairwise(seen))


@given(st.floats(0, 0.9), st.floats(0, 0.09), st.integers(0, 50), st.integers(1, 100))
@settings(deadline=None)
def test_the_cubic_schedule_is_zhu_and_guptas(final, initial, begin, length):
    if initial > final:
        initial, final = final, initial
    schedule = GradualPruning(final, begin=begin, end=begin + length, initial=initial)
    for t in range(begin, begin + length + 1):
        wanted = final + (initial - final) * (1 - (t - begin) / length) ** 3
        assert schedule.at(t) == pytest.approx(wanted, abs=1e-9)
    assert schedule.at(begin + length + 7) == final
    assert schedule.at(0) == initial
    assert schedule.prunes(begin + length)


def test_released_weights_grow_and_the_sparsity_is_what_the_schedule_says():
    model, gradual, _ = trained(GradualPruning(0.6, end=5, every=1))
    total = gradual.masks.total
    for step, sparsity in gradual.history:
        assert sparsity == pytest.approx(round(gradual.schedule.at(step) * total) / total)
    gradual.release()
    train(model, block_batches(TOKENS, 2, 2), Plan(steps=2, warmup=1))
    assert any(bool(model.get_parameter(n)[~m].any()) for n, m in gradual.masks.items())


def test_scores_of_passes_are_those_of_autograd():
    model = tiny_model("llama")
    batches = [TOKENS[:3], TOKENS[3:]]
    wanted: dict[str, dict[str, torch.Tensor]] = {"taylor": {}, "movement": {}}
    for batch in batches:
        model.zero_grad()
        language_loss(model, batch).backward()
        for m in matrices(model):
            product = m.weight * m.view(m.parameter.grad)
            for name, value in (("taylor", product.abs()), ("movement", -product)):
                wanted[name][m.name] = wanted[name].get(m.name, 0) + value
    for criterion, scores in wanted.items():
        keeper = ScoreKeeper(PruneRule(criterion), model)
        passes(language_loss, batches)(model)
        for name, score in keeper.scores().items():
            assert torch.allclose(score, scores[name], atol=1e-6)
        keeper.release()


def test_phases_are_exact_and_nested_and_retraining_sees_its_masks():
    model = tiny_model("llama")
    called = []

    def retrain(model, masks, phase):
        called.append((phase, masks.sparsity))
        with torch.no_grad():
            for m in matrices(model):
                m.parameter.add_(0.01)  # revives everything: the masks go on again

    shares = remaining_shares(0.9, 3)
    found = prune_retrain(model, shares, retrain)
    total = found[0].total
    assert called == [(i, m.sparsity) for i, m in enumerate(found)]
    for share, masks in zip(shares, found, strict=True):
        assert total - masks.kept == round(share * total)
    assert found[2].within(found[1])
    assert found[1].within(found[0])
    assert all(not bool(model.get_parameter(n)[~m].any()) for n, m in found[-1].items())


def test_rewinding_goes_back_to_the_first_weights():
    model = tiny_model("llama")
    start = state_of(model)
    name = matrices(model)[0].name

    def retrain(model, masks, phase):
        assert torch.equal(model.get_parameter(name), start[name] * masks[name])
        with torch.no_grad():
            model.get_parameter(name).add_(1)

    prune_retrain(model, even_shares(0.4, 2), retrain, rewind=start)


def test_gradient_criteria_prune_classifiers_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    batch = (torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
    rule = PruneRule("taylor", include=lambda name: True)
    (masks,) = prune_retrain(model, [0.5], lambda *_: None, rule, look=passes(class_loss, [batch]))
    assert masks.sparsity == 0.5
    assert set(masks) == {"0.weight", "3.weight"}
    with pytest.raises(ModelError, match="wanda"):
        ScoreKeeper(PruneRule("wanda"), model)


def test_blocks_already_gone_stay_gone_whatever_the_sign_of_the_scores():
    scores = {"w": torch.tensor([[-3.0, -1.0], [-2.0, 4.0]])}
    among = Masks({"w": torch.tensor([[True, False], [True, True]])})
    for structure in ("1x1", "element"):
        assert choose(scores, 0.5, structure, among=among)["w"].tolist() == [[False, False], [True, True]]
        assert choose(scores, 0.0, structure, among=among)["w"].tolist() == among["w"].tolist()
    few = Masks({"w": torch.tensor([[True, False]])})
    assert choose({"w": torch.ones(1, 2)}, 0, "2:2", among=few)["w"].tolist() == [[True, False]]


def test_what_cannot_be_scheduled_is_refused_in_one_line():
    with pytest.raises(InputError, match="criterion"):
        PruneRule("size")
    with pytest.raises(InputError, match="structure"):
        PruneRule(structure="cube")
    for wrong in ({"sparsity": 1.0}, {"sparsity": 0.5, "initial": 0.6}, {"sparsity": 0.5, "begin": 9, "end": 9}):
        with pytest.raises(InputError, match="gradual"):
            GradualPruning(**wrong)
    with pytest.raises(InputError, match="shape"):
        GradualPruning(0.5, shape="round")
    with pytest.raises(InputError, match="rise"):
        prune_retrain(tiny_model("llama"), [0.5, 0.4], lambda *_: None)
    with pytest.raises(InputError, match="none were seen"):
        prune_retrain(tiny_model("llama"), [0.5], lambda *_: None, PruneRule("taylor"))
    with pytest.raises(InputError, match="no pass"):
        ScoreKeeper(PruneRule("wanda"), tiny_model("llama")).scores()
    for shares in (even_shares, remaining_shares):
        with pytest.raises(InputError, match="prune-retrain"):
            shares(1.0, 3)
    broken = tiny_model("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        PruneRule().masks(broken, 0.5)


def test_magnitude_is_the_rankings():
    model = tiny_model("llama")
    scores = {m.name: magnitude(m.weight) for m in matrices(model)}
    assert {n: m.tolist() for n, m in choose(scores, 0.3).items()} == {
        n: m.tolist() for n, m in PruneRule().masks(model, 0.3).items()
    }
