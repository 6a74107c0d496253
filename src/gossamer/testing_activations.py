"""The contract of the activation family, as a pytest suite that other packages run on their own methods.

    from gossamer.testing_activations import ActivationCase, ActivationContract

    class TestMine(ActivationContract):
        cases = [ActivationCase("my-method", {"sparsity": 0.5})]

A case that fails tells which promise of the family the method breaks. Models are small, random and in fp32; the whole suite
takes less than a second a case.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.activations import ActivationHandle, ActivationMethod
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError
from gossamer.hf import mlp_views
from gossamer.hf.channels import Meter
from gossamer.models import tiny_model
from gossamer.patterns import NeuronRule
from gossamer.recipe import Recipe
from gossamer.registry import make, method

__all__ = ["METHODS", "ActivationCase", "ActivationContract"]


@dataclass(frozen=True)
class ActivationCase:
    """A method with settings, and what it promises beyond the family's contract.

    Attributes:
        slug: its name in the registry.
        settings: its hyperparameters; about half of the neurons dropped tests best.
        dense: the settings with which it drops nothing that counts; None where there are none.
        sparser: settings that drop more, and nothing less; None where there are none.
        family: the tiny model that it is tested on.
        learn: settings with which its calibration is made.
    """

    slug: str
    settings: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Any] | None = field(default_factory=lambda: {"sparsity": 0.0})
    sparser: dict[str, Any] | None = field(default_factory=lambda: {"sparsity": 0.8})
    family: str = "llama"
    learn: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.slug, *(f"{k}={v}" for k, v in self.settings.items()), self.family])

    def method(self, **changes: Any) -> ActivationMethod:
        """The method with the case's settings and these."""
        return cast(ActivationMethod, make(self.slug, **{**self.settings, **changes}))

    @property
    def model(self) -> PreTrainedModel:
        """The suite's model of this family, shared by all tests."""
        return _model(self.family)

    def calibration(self) -> Calibration | None:
        """What it learns on the suite's model; None where it needs nothing."""
        return _learned(self.slug, json.dumps(self.learn, sort_keys=True), self.family)

    def rules(self, **changes: Any) -> list[tuple[nn.Module, NeuronRule | None]]:
        """What the settings keep: (MLP or linear layer, rule) pairs."""
        made, calibration = self.method(**changes), self.calibration()
        policy = made.neuron_policy(self.model, calibration)
        found: list[tuple[nn.Module, NeuronRule | None]] = []
        if policy is not None:
            found += [(view.owner, policy.rule(view.index)) for view in mlp_views(self.model)]
        found += made.channel_rules(self.model, calibration)
        return found


_CHESS: list[dict[str, Any]] = [{}, {"moment": "abs"}, {"parts": "attention"}, {"parts": "both"}]

#: Every activation method of this package that works on any model.
METHODS: list[ActivationCase] = [
    ActivationCase("cats"),
    ActivationCase("cats", {"compat": "released"}),
    ActivationCase("cats", {"sparsity": 0.3}, family="gpt2"),
    ActivationCase("cats", family="gemma"),
    *[ActivationCase("chess", settings) for settings in _CHESS],
    ActivationCase("chess", {"parts": "both"}, family="qwen3"),
    ActivationCase("chess", {"quantiles": "mean", "group": 1}, learn={"quantiles": "mean", "group": 1}),
    ActivationCase("relufication", dense=None, sparser=None),
    ActivationCase("relufication", dense=None, sparser=None, family="gpt2"),
    ActivationCase("top-k-neurons"),
    ActivationCase("top-k-neurons", family="gpt2"),
    ActivationCase("random-neurons", {"seed": 3}),
    ActivationCase("random-neurons", family="gpt2"),
]


@cache
def _model(family: str) -> PreTrainedModel:
    return tiny_model(family)


@cache
def _learned(slug: str, settings: str, family: str) -> Calibration | None:
    made = cast(ActivationMethod, make(slug, **json.loads(settings)))
    return made.calibrate(_model(family), _ids(4, 48, seed=11)) if "calibration" in made.needs else None


def _ids(batch: int = 1, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def _logits(model: nn.Module, ids: Tensor, steps: int = 0, mask: Tensor | None = None) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` of a prompt read in one block, the last `steps` tokens decoded singly."""
    call: Any = model
    prompt = ids.shape[1] - steps
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    parts, past = [], None
    for begin, end in [(0, prompt), *[(i, i + 1) for i in range(prompt, ids.shape[1])]]:
        out = call(
            ids[:, begin:end],
            past_key_values=past,
            use_cache=True,
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, begin:end],
        )
        parts.append(out.logits)
        past = out.past_key_values
    return torch.cat(parts, 1)


def _meters(handle: ActivationHandle) -> list[Meter]:
    return [meter for run in (handle.mlp, handle.channels) if run is not None for meter in run.meters]


class ActivationContract:
    """What every activation method keeps. Subclass it in a test file and name your `cases`."""

    cases: ClassVar[Sequence[ActivationCase]] = METHODS

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One run of each test for each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    @pytest.fixture(autouse=True)
    def _no_gradients(self) -> Any:
        with torch.no_grad():
            yield

    def attach(self, case: ActivationCase, **changes: Any) -> ActivationHandle:
        """The case's method on the suite's model."""
        return case.method(**changes).attach(case.model, case.calibration())

    # -- quality ------------------------------------------------------------------------------------------------------

    def test_dropping_nothing_is_dense(self, case: ActivationCase) -> None:
        """Bit for bit where all is computed and masked, up to rounding where a kernel gathers."""
        if case.dense is None:
            pytest.skip("it always drops something")
        want = _logits(case.model, _ids(2), 3)
        with self.attach(case, **case.dense, mode="mask"):
            assert torch.equal(_logits(case.model, _ids(2), 3), want)
        with self.attach(case, **case.dense):
            torch.testing.assert_close(_logits(case.model, _ids(2), 3), want, atol=1e-4, rtol=1e-4)

    def test_dropping_some_is_not_dense(self, case: ActivationCase) -> None:
        """The method does something, to prompts and to steps: the other tests would hold for one that does nothing."""
        want = _logits(case.model, _ids(2), 3)
        with self.attach(case) as handle:
            got = _logits(case.model, _ids(2), 3)
        assert bool(torch.isfinite(got).all())
        assert bool(((got - want).abs().amax(-1) > 1e-3).all())
        assert all(
            0.05 < cast(float, meter.share(decode)) < 0.95 for meter in _meters(handle) for decode in (True, False)
        )

    def test_a_mask_equals_a_gather(self, case: ActivationCase) -> None:
        """A decode step that reads only what is kept gives what zeroing the rest gives, and keeps as many."""
        results, totals = {}, {}
        for mode in ("mask", "gather"):
            with self.attach(case, mode=mode) as handle:
                results[mode] = _logits(case.model, _ids(2), 6)
            totals[mode] = [meter.totals for meter in _meters(handle)]
        torch.testing.assert_close(results["gather"], results["mask"], atol=1e-4, rtol=1e-4)
        assert totals["mask"] == totals["gather"]

    # -- the pattern --------------------------------------------------------------------------------------------------

    def test_masks_are_nested(self, case: ActivationCase) -> None:
        """What a higher sparsity keeps, a lower one keeps as well, for every token."""
        if case.sparser is None:
            pytest.skip("its sparsity can't be chosen")
        fewer = case.rules(**case.sparser)
        for (module, rule), (other, less) in zip(case.rules(), fewer, strict=True):
            assert module is other
            assert rule is not None
            assert less is not None
            size = next((v.neurons for v in mlp_views(case.model) if v.owner is module), None)
            size = cast(Any, module).in_features if size is None else size
            a = torch.randn(50, size, generator=torch.Generator().manual_seed(0))
            a = a * torch.linspace(0.001, 1, size)
            kept, rest = rule.mask(a), less.mask(a)
            assert not bool((rest & ~kept).any())
            assert int(rest.sum()) < int(kept.sum())

    def test_the_reported_share_is_the_counted_share(self, case: ActivationCase) -> None:
        """By other means: the rules laid over what the attached model's layers were given."""
        seen: list[tuple[NeuronRule, Tensor]] = []
        views = {view.owner: view for view in mlp_views(case.model)}
        handles = []
        for module, rule in case.rules():
            assert rule is not None
            view, target = views.get(module), module
            if view is not None and not view.gated:
                target = view.down

            def look(
                m: nn.Module, args: Any, rule: NeuronRule = rule, view: Any = view, target: nn.Module = target
            ) -> None:
                on = args[0] if view is None or not view.gated else view.hidden(args[0])[0]
                seen.append((rule, on))

            handles.append(target.register_forward_pre_hook(look))
        with self.attach(case, mode="mask") as handle:
            case.model(_ids(2))
            report = handle.report()
        for hook in handles:
            hook.remove()
        shares = [float(rule.mask(a).float().mean()) for rule, a in seen]
        neurons = shares[: len(views)] if handle.mlp is not None else []
        channels = shares[len(neurons) :]
        # In the model's order attention comes before the MLP of its layer: compare as sets of numbers.
        reported = [*report.get("neurons_kept_by_layer", []), *report.get("channels_kept_by_layer", [])]
        assert sorted(reported) == pytest.approx(sorted(shares), abs=1e-6)
        for name, size in (("neurons_kept", len(neurons)), ("channels_kept", len(channels))):
            assert (name in report) is bool(size)
            if size:
                assert report[name] == pytest.approx(sum(report[f"{name}_by_layer"]) / size)

    def test_counted_bytes_are_the_promised_bytes(self, case: ActivationCase) -> None:
        """`io_bytes` is a formula; the runtime counts what was kept."""
        with self.attach(case) as handle:
            _logits(case.model, _ids(3), 1)
            report = handle.report()
            if handle.mlp is not None:
                want = 0.0
                for view, meter in zip(handle.mlp.views, handle.mlp.meters, strict=True):
                    want += case.method().io_bytes(
                        view.channels, view.neurons, float(meter.totals[1][3]), 4, view.gated
                    )
                assert report["mlp_bytes_read"] == round(want)
            if handle.channels is not None:
                pairs = zip(handle.channels.chosen, handle.channels.meters, strict=True)
                rows = sum(int(m.totals[1][3]) * cast(Any, module).out_features for (module, _), m in pairs)
                assert report["channel_bytes_read"] == 4 * rows

    # -- causality ----------------------------------------------------------------------------------------------------

    def test_later_tokens_change_nothing_before_them(self, case: ActivationCase) -> None:
        """The logits of a token don't see what follows."""
        ids, other = _ids(2), _ids(2, seed=5)
        other[:, :12] = ids[:, :12]
        with self.attach(case):
            one, two = _logits(case.model, ids), _logits(case.model, other)
        assert torch.equal(one[:, :12], two[:, :12])
        assert not torch.allclose(one[:, 12:], two[:, 12:])

    def test_a_block_equals_steps(self, case: ActivationCase) -> None:
        """Every token keeps what it would keep alone."""
        with self.attach(case):
            torch.testing.assert_close(
                _logits(case.model, _ids(2), 12), _logits(case.model, _ids(2)), atol=1e-4, rtol=1e-4
            )

    def test_each_row_of_a_batch_is_its_own_run(self, case: ActivationCase) -> None:
        """Padding and neighbours do not matter, in prompts and in steps."""
        ids, mask = _ids(2), torch.ones(2, 24, dtype=torch.long)
        mask[1, :9] = 0
        with self.attach(case):
            together = _logits(case.model, ids, 4, mask)
            alone = _logits(case.model, ids[:1], 4), _logits(case.model, ids[1:, 9:], 4)
        torch.testing.assert_close(together[:1], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1:, 9:], alone[1], atol=1e-4, rtol=1e-4)

    def test_generate_gives_each_sequence_its_own(self, case: ActivationCase) -> None:
        """Greedy with left padding as alone; sampling and beams run."""
        ids, mask = _ids(2), torch.ones(2, 24, dtype=torch.long)
        mask[1, :9] = 0
        with self.attach(case):
            whole = case.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
            alone = case.model.generate(ids[1:, 9:], attention_mask=mask[1:, 9:], max_new_tokens=6, do_sample=False)
            for way in ({"do_sample": True}, {"num_beams": 2}):
                assert case.model.generate(ids, attention_mask=mask, max_new_tokens=3, **way).shape == (2, 27)
        assert torch.equal(whole[1:, 24:], alone[:, 15:])

    # -- manners ------------------------------------------------------------------------------------------------------

    def test_two_runs_are_the_same(self, case: ActivationCase) -> None:
        """Attached again, whatever the state of the random numbers, which is left alone."""
        results = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            with self.attach(case):
                results.append(_logits(case.model, _ids(2), 3))
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(results[0], results[1])

    def test_inputs_weights_and_calibrations_are_untouched(self, case: ActivationCase) -> None:
        """They are read, never written."""
        ids, weights = _ids(2), copy.deepcopy(case.model.state_dict())
        calibration = copy.deepcopy(case.calibration())
        with self.attach(case):
            _logits(case.model, ids, 3)
            assert all(torch.equal(v, weights[k]) for k, v in case.model.state_dict().items())
        assert torch.equal(ids, _ids(2))
        now = case.calibration()
        if calibration is not None and now is not None:
            assert all(torch.equal(v, calibration.tensors[k]) for k, v in now.tensors.items())

    def test_detach_restores(self, case: ActivationCase) -> None:
        """After detaching, the model is what it was, bit for bit, and its weights lie as they lay."""
        model = tiny_model(case.family)  # a fresh one, on which no test left anything
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        strides = {name: (p.stride(), p.requires_grad) for name, p in model.named_parameters()}
        want = _logits(model, _ids(2), 3)
        handle = case.method().attach(model, case.calibration())
        _logits(model, _ids(2), 3)
        handle.detach()
        handle.detach()
        for name, module in model.named_modules():
            assert dict(vars(module)) == before[name]
        assert {name: (p.stride(), p.requires_grad) for name, p in model.named_parameters()} == strides
        assert torch.equal(_logits(model, _ids(2), 3), want)

    def test_masked_training_reaches_only_what_is_kept(self, case: ActivationCase) -> None:
        """Gradients pass a mask as zeros: a neuron that no token keeps gets none in its row of up."""
        model = copy.deepcopy(case.model)
        made = case.method(mode="mask")
        with torch.enable_grad(), made.attach(model, case.calibration()) as handle:
            cast(Any, model)(_ids(1, 2)).logits.square().mean().backward()
        views = mlp_views(model)
        assert any(float(cast(Tensor, view.down.weight.grad).abs().sum()) > 0 for view in views)
        if handle.mlp is not None and views[0].gated and views[0].up is not views[0].gate:
            grads = torch.stack([cast(Tensor, view.up.weight.grad).abs().sum(1) for view in views])
            kept = sum(int(meter.totals[0][3]) for meter in handle.mlp.meters)
            assert 0 < int((grads > 0).sum()) <= kept < grads.numel()

    # -- settings and calibration -------------------------------------------------------------------------------------

    def test_settings_round_trip(self, case: ActivationCase) -> None:
        """A recipe file can hold the method, which is a value."""
        made = case.method()
        again = make(case.slug, **json.loads(json.dumps(made.settings())))
        assert again == made
        assert hash(again) == hash(made)
        assert make(case.slug).settings() == {}
        assert Recipe.of(made).steps[0].method.slots == made.slots
        with pytest.raises(ValueError, match="frozen"):
            made.mode = "mask"  # type: ignore[misc]

    def test_bad_settings_are_one_line(self, case: ActivationCase) -> None:
        """Refused when the method is made, with its name and the setting's."""
        bad: list[tuple[str, Any]] = [("no_such_setting", 1), ("mode", "fast"), ("int8", "maybe")]
        if "sparsity" in method(case.slug).model_fields:
            bad += [("sparsity", value) for value in (-0.1, 1.1, float("nan"), "half", None)]
        for name, value in bad:
            with pytest.raises(InputError) as caught:
                make(case.slug, **{name: value})
            assert "\n" not in str(caught.value)
            assert case.slug in str(caught.value)
            assert name in str(caught.value)

    def test_calibration_round_trip(self, case: ActivationCase, tmp_path: Path) -> None:
        """A saved and loaded calibration makes the same run."""
        calibration = case.calibration()
        if calibration is None:
            pytest.skip("needs no calibration")
        loaded = Calibration.load(calibration.save(tmp_path / "calibration.safetensors"))
        assert loaded.facts == calibration.facts
        with self.attach(case):
            want = _logits(case.model, _ids(2), 3)
        with case.method().attach(case.model, loaded):
            assert torch.equal(_logits(case.model, _ids(2), 3), want)

    def test_other_calibrations_are_refused(self, case: ActivationCase) -> None:
        """None, another method's, another model's, an incomplete one; and texts or weights that can't be learned from."""
        calibration, made = case.calibration(), case.method()
        if calibration is None:
            pytest.skip("needs no calibration")
        other = tiny_model(case.family, seed=1)
        wrong = Calibration("another", calibration.fingerprint, calibration.tensors, calibration.facts)
        empty = Calibration(case.slug, calibration.fingerprint, {}, calibration.facts)
        for model, given, words in (
            (case.model, None, "needs a calibration"),
            (case.model, wrong, "was made for another"),
            (other, calibration, "another model"),
            (case.model, empty, "calibrate again"),
        ):
            with pytest.raises(CalibrationError, match=words) as caught:
                made.attach(model, given)
            assert "\n" not in str(caught.value)
        for tokens in (_ids()[0], _ids()[:, :0], _ids().float()):
            with pytest.raises(CalibrationError, match="token blocks"):
                made.calibrate(case.model, tokens)
        with pytest.raises(CalibrationError, match="eval mode"):
            made.calibrate(copy.deepcopy(case.model).train(), _ids())
        next(iter(other.parameters())).fill_(float("nan"))
        with pytest.raises(CalibrationError, match="not finite"):
            made.calibrate(other, _ids())

    def test_two_on_one_model_are_refused(self, case: ActivationCase) -> None:
        """And the first one still runs, and leaves as if nothing had been tried."""
        with self.attach(case):
            want = _logits(case.model, _ids(2), 3)
            with pytest.raises(Exception, match="already under a"):
                self.attach(case)
            assert torch.equal(_logits(case.model, _ids(2), 3), want)
        assert not any("forward" in module.__dict__ for module in case.model.modules())
