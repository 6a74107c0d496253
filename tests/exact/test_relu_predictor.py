"""The activation predictor: its metrics, its training, and the approximate engine that computes what it names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.activations.prosparse_predictor import (
    ActivationPredictor,
    PredictedNeurons,
    ReLUPredictor,
    fit_predictor,
    predicted_sparsity,
    recall,
)
from gossamer.activations.relufication import relufy
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import mlp_views
from gossamer.models import fingerprint, tiny_model
from gossamer.registry import make

METHOD = ReLUPredictor(hidden=32, epochs=2, pair_batch=32)


def ids(batch: int = 1, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def relu_model(family: str = "llama") -> Any:
    model = tiny_model(family)
    relufy(model)
    return model


MODEL = relu_model()
LEARNED = METHOD.calibrate(MODEL, ids(4, 64))


def biased(calibration: Calibration, bias: float) -> Calibration:
    """All neurons predicted, or none."""
    tensors = {
        name: torch.full_like(t, bias) if name.endswith("second.bias") else t for name, t in calibration.tensors.items()
    }
    return Calibration(calibration.method, calibration.fingerprint, tensors, calibration.facts)


def test_metrics_by_hand() -> None:
    active = torch.tensor([[True, True, False, False], [True, False, False, False]])
    predicted = torch.tensor([[True, False, True, False], [True, False, False, False]])
    assert recall(predicted, active) == pytest.approx(2 / 3)
    assert predicted_sparsity(predicted) == 5 / 8
    assert recall(predicted, torch.zeros_like(active)) == 1


def test_two_layers_with_relu_between() -> None:
    net, x = ActivationPredictor(5, 3, 7), torch.randn(2, 5)
    want = torch.clamp(x @ net.first.weight.T + net.first.bias, min=0) @ net.second.weight.T + net.second.bias
    torch.testing.assert_close(net(x), want)


def test_training_learns_what_can_be_learned_and_keeps_the_best_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    active = x @ torch.randn(8, 40, generator=generator) > 2.0
    fit = fit_predictor(x, active, 64, epochs=12, lr=1e-2)
    assert fit.recall > 0.9
    assert fit.sparsity == pytest.approx(1 - float(active.float().mean()), abs=0.05)
    assert fit.recall == max(point["recall"] for point in fit.history) == fit.history[fit.epoch]["recall"]
    # The held-out pairs are the first twentieth of the seeded order: the kept weights give the kept numbers.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ActivationPredictor(8, 64, 40)
        held = torch.randperm(4000)[:200]
    predicted = fit.predictor(x[held]).sigmoid() > 0.5
    assert recall(predicted, active[held]) == fit.recall
    again = fit_predictor(x, active, 64, epochs=12, lr=1e-2)
    assert again.history == fit.history


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_only_named_neurons_are_computed(family: str, mode: Any) -> None:
    model = relu_model(family)
    method = METHOD.model_copy(update={"mode": mode})
    learned = method.calibrate(model, ids(2, 64))
    assert sorted(learned.facts) == ["hidden", "pairs", "recall", "sparsity"]
    prompt, step = ids(2), ids(2, 1, seed=1)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        dense = model(step, past_key_values=copy.deepcopy(cache)).logits
        with method.attach(model, biased(learned, 1e4)) as handle:
            everything = model(step, past_key_values=copy.deepcopy(cache)).logits
            assert handle.report()["neurons_kept"] == 1
        with method.attach(model, biased(learned, -1e4)) as handle:
            nothing = model(step, past_key_values=copy.deepcopy(cache)).logits
            assert handle.report()["neurons_kept"] == 0
        hooks = []
        for view in mlp_views(model):  # by hand: every row's own prediction
            net = ActivationPredictor(view.channels, 32, view.neurons)
            net.load_state_dict({n: learned.tensors[f"{view.index}.{n}"] for n in net.state_dict()})
            seen: dict[str, Tensor] = {}
            target = view.owner if view.gated else view.up
            hooks.append(target.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(x=a[0])))
            hooks.append(
                view.down.register_forward_pre_hook(lambda m, a, seen=seen, net=net: (a[0] * (net(seen["x"]) > 0),))
            )
        want = model(step, past_key_values=copy.deepcopy(cache)).logits
        for hook in hooks:
            hook.remove()
        with method.attach(model, learned) as handle:
            got = model(step, past_key_values=copy.deepcopy(cache)).logits
            report = handle.report()
    torch.testing.assert_close(everything, dense, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(nothing, dense, atol=1e-2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert 0 < report["neurons_kept"] < 1
    assert report["predictor_bytes"] == sum(t.numel() * 4 for t in learned.tensors.values())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


def test_each_token_computes_its_own_neurons_in_blocks_batches_and_steps() -> None:
    tokens = ids(2, 9)
    with torch.no_grad(), METHOD.attach(MODEL, LEARNED) as handle:
        block = MODEL(tokens, use_cache=False).logits
        assert handle.mlp is not None
        kept = handle.mlp.meters[0].totals[0][1]
        for row in range(2):  # a single row gathers
            cache, steps = None, []
            for i in range(9):
                out = MODEL(tokens[row : row + 1, i : i + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
            torch.testing.assert_close(torch.cat(steps, 1)[0], block[row], atol=1e-4, rtol=1e-4)
        assert handle.mlp.meters[0].totals[1][1] == kept


def test_attaching_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    METHOD.attach(MODEL, LEARNED).detach()
    METHOD.calibrate(MODEL, ids(1, 64))
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_do_not_fit_in_memory_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.activations.prosparse_predictor._HELD", 1)
    grouped = METHOD.calibrate(MODEL, ids(4, 64))
    assert grouped.facts == LEARNED.facts
    assert all(torch.equal(t, LEARNED.tensors[name]) for name, t in grouped.tensors.items())


def test_bad_input_is_one_clear_line(tmp_path: Any) -> None:
    plain = tiny_model("llama")
    with pytest.raises(ModelError, match="relufy"):
        METHOD.calibrate(plain, ids())
    with pytest.raises(ModelError, match="relufy"):
        METHOD.attach(plain, Calibration("relu-predictor", fingerprint(plain), LEARNED.tensors))
    with pytest.raises(CalibrationError, match="needs a calibration"):
        METHOD.attach(MODEL)
    with pytest.raises(CalibrationError, match="another model"):
        METHOD.attach(relu_model("qwen2"), LEARNED)
    with pytest.raises(CalibrationError, match="blocks"):
        METHOD.calibrate(MODEL, ids()[0])
    for name, tensor in (("0.first.bias", torch.zeros(3)), ("1.second.weight", torch.zeros(2, 2))):
        damaged = Calibration("relu-predictor", LEARNED.fingerprint, {**LEARNED.tensors, name: tensor})
        with pytest.raises(CalibrationError, match="damaged"):
            METHOD.attach(MODEL, damaged)
    missing = {n: t for n, t in LEARNED.tensors.items() if not n.startswith("1.")}
    with pytest.raises(CalibrationError, match="damaged"):
        METHOD.attach(MODEL, Calibration("relu-predictor", LEARNED.fingerprint, missing))
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in MODEL.modules())
    loaded = Calibration.load(LEARNED.save(tmp_path / "p.safetensors"))
    METHOD.attach(MODEL, loaded).detach()
    for x, active in (
        (torch.zeros(30, 4), torch.zeros(29, 8, dtype=torch.bool)),
        (torch.zeros(5, 4), torch.zeros(5, 8, dtype=torch.bool)),
        (torch.zeros(30, 4), torch.zeros(30, 8)),
    ):
        with pytest.raises(InputError, match="a predictor needs"):
            fit_predictor(x, active, 4)
    with pytest.raises(CalibrationError, match="not finite"):
        fit_predictor(torch.full((30, 4), float("nan")), torch.zeros(30, 8, dtype=torch.bool), 4)
    broken = relu_model()
    with torch.no_grad():
        mlp_views(broken)[0].gate.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="not finite"):
        METHOD.calibrate(broken, ids(4, 64))
    for wrong in ({"hidden": 0}, {"cutoff": 1.0}, {"epochs": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            make("relu-predictor", **wrong)


def test_no_rule_before_the_first_token() -> None:
    assert PredictedNeurons([ActivationPredictor(2, 2, 2)], 0.5).rule(0) is None
