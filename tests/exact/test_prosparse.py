"""ProSparse: its formulas by hand, its penalty, its three stages, and the exact sparse FFN (numbers are the card's checks)."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.activations.penalty import ActivationPenalty, ffn_l1, l1
from gossamer.activations.prosparse import (
    ProSparse,
    ffn_flops,
    layer_sparsity,
    model_sparsity,
    share_of_zeros,
)
from gossamer.activations.relufication import (
    FATReLU,
    ShiftedReLU,
    fatrelu,
    relufy,
    restore_shift,
    shift_relu,
    shift_threshold,
    shifted_relu,
    strict_threshold,
)
from gossamer.data.bytes import byte_batches
from gossamer.errors import CalibrationError, InputError, ModelError, UnknownNameError
from gossamer.hf import mlp_views
from gossamer.models import tiny_model
from gossamer.models.training import Plan, byte_model, train
from gossamer.ops import NeuronWeights, sparse_mlp
from gossamer.patterns import NeuronRule
from gossamer.recipe import Recipe
from gossamer.registry import make

IDS = torch.arange(1, 13)[None]
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def batches(steps: int, seed: int = 0) -> Any:
    data = torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return byte_batches(data, 2, 12, steps, seed)


# -- ReLUs (2) --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3, width=32), min_size=1), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_fatrelu_of_0_is_relu_and_zeros_only_grow(values: list[float], one: float, two: float) -> None:
    z = torch.tensor(values)
    assert torch.equal(fatrelu(z, 0.0), torch.relu(z))
    low, high = sorted((one, two))
    assert ((fatrelu(z, low) == 0) <= (fatrelu(z, high) == 0)).all()
    kept = fatrelu(z, high)
    assert torch.equal(kept[kept != 0], z[kept != 0])  # z, not z − t


def test_a_gate_of_exactly_t_stays_and_a_nan_is_seen() -> None:
    z = torch.tensor([0.5, math.nan])
    assert fatrelu(z, 0.5)[0] == 0.5
    assert fatrelu(z, 0.5)[1].isnan()
    assert shifted_relu(z, 0.5)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.0, 0.01, 0.3, 1.0])
def test_the_rule_of_a_kernel_keeps_what_fatrelu_keeps(dtype: torch.dtype, t: float) -> None:
    at = torch.tensor(t, dtype=dtype)
    up, down = torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)
    z = torch.cat([torch.stack([torch.nextafter(at, down), at, torch.nextafter(at, up)]), normal(300).to(dtype)])
    gate = torch.relu(z)
    kept = NeuronRule(threshold=strict_threshold(t, dtype)).mask(gate)
    assert torch.equal(torch.where(kept, gate, 0), fatrelu(z, t))


# -- the exact sparse FFN (3, 7) --------------------------------------------------------------------------------------


def three_steps(x: Tensor, w_s: Tensor, w_1: Tensor, w_2: Tensor, t: float) -> tuple[Tensor, int, int]:
    """The card's three steps for one token, by loops: output, rows of W₁ read, columns of W₂ read."""
    z = w_s @ x
    x1, rows, columns = torch.zeros(len(z)), 0, 0
    for j in range(len(z)):
        if z[j] > 0 and z[j] >= t:
            x1[j] = z[j] * (w_1[j] @ x)
            rows += 1
    y = torch.zeros(w_2.shape[0])
    for j in range(len(z)):
        if x1[j] != 0:
            y += x1[j] * w_2[:, j]
            columns += 1
    return y, rows, columns


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.2])
def test_three_steps_are_the_masked_dense_ffn_and_read_what_is_not_zero(share: float, t: float) -> None:
    channels, neurons = 24, 70
    x = normal(1, channels, seed=1)
    w_s, w_1 = normal(neurons, channels, seed=2) / channels**0.5, normal(neurons, channels, seed=3) / channels**0.5
    w_2 = normal(channels, neurons, seed=4) / neurons**0.5
    off = torch.randperm(neurons, generator=torch.Generator().manual_seed(5)) < round(share * neurons)
    sign = torch.where(off, -1.0, 1.0) * torch.where(w_s @ x[0] < 0, -1.0, 1.0)
    w_s = w_s * sign[:, None]  # the chosen share of gates is negative
    x1 = fatrelu(x @ w_s.T, t) * (x @ w_1.T)
    dense = x1 @ w_2.T
    active = int((x1 != 0).sum())
    if t == 0:
        assert active == neurons - round(share * neurons)
    y, rows, columns = three_steps(x[0], w_s, w_1, w_2, t)
    counts = torch.zeros(2, dtype=torch.int64)
    weights = NeuronWeights(w_s, w_1, w_2.t().contiguous(), activation="relu")
    out = sparse_mlp(x, weights, threshold=strict_threshold(t, torch.float32), counts=counts)
    torch.testing.assert_close(y[None], dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
    assert rows == columns == active
    assert counts.tolist() == [active, active]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("t", [0.0, 0.3])
def test_attached_decoding_is_the_models_own(family: str, t: float) -> None:
    model = tiny_model(family)
    relufy(model)
    shift_threshold(model, t)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    activations = [view.activation for view in mlp_views(model)]
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        want = model(IDS[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
        x1: list[Tensor] = []
        hooks = [v.down.register_forward_pre_hook(lambda m, args: x1.append(args[0])) for v in mlp_views(model)]
        model(IDS[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True)
        for hook in hooks:
            hook.remove()
        with ProSparse().attach(model) as handle:
            got = model(IDS[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
            report = handle.report()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    zeros = [share_of_zeros(values) for values in x1]
    assert report["sparsity"] == pytest.approx(sum(zeros) / len(zeros))
    assert 0.2 < report["sparsity"] < 1
    assert report["relu_threshold"] == t
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(view.activation is old for view, old in zip(mlp_views(model), activations, strict=True))


def test_attach_takes_the_shift_from_settings_or_configuration() -> None:
    model = tiny_model("llama")
    relufy(model)
    lifted = copy.deepcopy(model)
    shift_threshold(lifted, 0.4)
    want = logits(lifted)
    for view in mlp_views(lifted):  # as transformers loads it: the configuration knows, the modules don't
        view.replace_activation(nn.ReLU())
    for subject, method in ((lifted, ProSparse()), (model, ProSparse(threshold=0.4))):
        with method.attach(subject) as handle:
            torch.testing.assert_close(logits(subject), want, atol=1e-5, rtol=1e-5)
            assert handle.report()["relu_threshold"] == 0.4
    shift_relu(model, 0.2)
    want = logits(model)
    with ProSparse().attach(model):
        torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="shifted ReLU"):
        ProSparse(threshold=0.4).attach(model)
    assert isinstance(mlp_views(model)[0].activation, ShiftedReLU)


# -- the penalty (4, 5) -----------------------------------------------------------------------------------------------


def test_without_lambda_a_step_is_plain_training() -> None:
    plain, penalised = byte_model("llama", **SMALL), byte_model("llama", **SMALL)
    for model in (plain, penalised):
        relufy(model)
    train(plain, batches(3), Plan(steps=3))
    method = ProSparse(relu_steps=3, peaks=(), ends=())
    method.train(penalised, batches(3), Plan(steps=3))
    with_stages = byte_model("llama", **SMALL)  # its stage 0 is as long
    ProSparse(relu_steps=3, peaks=(1.0,), ends=(4,)).train(with_stages, batches(4), Plan(steps=4, warmup=0, floor=1.0))
    reference = byte_model("llama", **SMALL)
    relufy(reference)
    states: list[dict[str, Tensor]] = []

    def keep(step: int) -> None:
        states.append({name: value.clone() for name, value in reference.state_dict().items()})

    train(reference, batches(4), Plan(steps=4, warmup=0, floor=1.0), after_step=keep)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, penalised.state_dict()[name])
    last = with_stages.state_dict()
    assert not all(torch.equal(value, last[name]) for name, value in states[-1].items())
    three = byte_model("llama", **SMALL)
    kept: list[dict[str, Tensor]] = []
    ProSparse(relu_steps=3, peaks=(1.0,), ends=(4,)).train(
        three,
        batches(4),
        Plan(steps=4, warmup=0, floor=1.0),
        after_step=lambda step: kept.append({n: v.clone() for n, v in three.state_dict().items()}),
    )
    for step in range(3):
        assert all(torch.equal(value, kept[step][name]) for name, value in states[step].items())


@pytest.mark.parametrize("reduction", ["mean", "token", "sum"])
def test_gradient_on_x1_is_the_sign_times_the_reductions_factor(reduction: Any) -> None:
    x1 = normal(3, 5, 7)
    x1[0, 0, :3] = 0
    x1.requires_grad_()
    (0.3 * l1(x1, reduction)).backward()
    factor = {"mean": 1 / (3 * 5 * 7), "token": 1 / (3 * 5), "sum": 1.0}[reduction]
    assert x1.grad is not None
    torch.testing.assert_close(x1.grad, 0.3 * x1.detach().sign() * factor)
    assert not x1.grad[0, 0, :3].any()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_penalty_is_of_gate_times_up_summed_over_layers(family: str) -> None:
    model = tiny_model(family)
    relufy(model)
    model.requires_grad_(True)
    views, x1 = mlp_views(model), {}
    hooks = [v.down.register_forward_pre_hook(lambda m, a, i=v.index: x1.update({i: a[0]})) for v in views]
    with ffn_l1(model, lambda t: 0.1 * t, "mean") as penalty:
        model(IDS, use_cache=False)
        value = penalty(step=4)  # time 5
    for hook in hooks:
        hook.remove()
    want = 0.5 * sum(x.abs().mean() for x in x1.values())
    torch.testing.assert_close(value, want)
    assert isinstance(value, Tensor)
    gradients = torch.autograd.grad(value, [p for v in views for p in (v.gate.weight, v.up.weight)], retain_graph=True)
    wanted = torch.autograd.grad(want, [p for v in views for p in (v.gate.weight, v.up.weight)])
    for got, expected in zip(gradients, wanted, strict=True):
        assert got.abs().sum() > 0  # W_s and W₁ both learn
        torch.testing.assert_close(got, expected)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = byte_model("llama", **SMALL).train()
        relufy(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with ffn_l1(model, 3.0) as penalty:
            for _ in range(2):  # what a recomputation leaves behind is not counted in the next step
                loss = model(IDS, use_cache=False).logits.square().mean() + penalty(0)
                model.zero_grad()
                loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_penalties_of_outputs_and_of_modules_that_run_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    nn.init.eye_(model.layer.weight)
    with ActivationPenalty(model, [model.layer], torch.Tensor.sum, 2.0, of="output") as penalty:
        with torch.no_grad():
            model(torch.ones(1, 2))
        with pytest.raises(InputError, match="after a forward"):
            penalty(0)
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))  # the one that counts
        assert float(penalty(0)) == 8  # type: ignore[arg-type]
        with pytest.raises(InputError, match="once for each"):
            penalty(0)
    assert not model._forward_pre_hooks
    assert not model.layer._forward_hooks
    with pytest.raises(InputError, match="needs modules"):
        ActivationPenalty(model, [], l1)
    with pytest.raises(InputError, match="reduction"):
        ffn_l1(tiny_model("llama"), 1.0, "median")  # type: ignore[arg-type]


# -- sparsity (6) -----------------------------------------------------------------------------------------------------


def test_sparsity_is_of_x1_and_layers_weigh_the_same() -> None:
    assert share_of_zeros(torch.zeros(3, 4)) == 1
    assert share_of_zeros(torch.ones(3, 4)) == 0
    model = tiny_model("llama", initializer_range=0.2)
    relufy(model)
    first, second = mlp_views(model)
    with torch.no_grad():
        first.up.weight.zero_()  # x₁ is 0 though the gate is not
        assert layer_sparsity(model, IDS)[0] == 1
        hidden: list[Tensor] = []
        hook = second.down.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
        model(IDS)
        hook.remove()
    zeros = share_of_zeros(hidden[0])
    assert 0 < zeros < 1
    assert layer_sparsity(model, IDS)[1] == pytest.approx(zeros)
    assert model_sparsity(model, IDS) == pytest.approx((1 + zeros) / 2)
    assert model_sparsity(tiny_model("llama"), IDS) == 0  # SiLU
    with pytest.raises(CalibrationError, match="blocks"):
        layer_sparsity(model, IDS[0])
    assert ffn_flops(8, 32, 1.0) == 2 * 8 * 32


# -- a checkpoint is an ordinary one ----------------------------------------------------------------------------------


def family_model(family: str) -> Any:
    small = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
    }
    made: dict[str, Any] = {
        "phi3": lambda: transformers.Phi3Config(**small, pad_token_id=0),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            activation_function="gelu",
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**small),
        "falcon": lambda: transformers.FalconConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        ),
    }
    torch.manual_seed(0)
    if family in made:
        return transformers.AutoModelForCausalLM.from_config(made[family]()).eval()
    if family == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**small)).eval()
    if family == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
        ).eval()
    return tiny_model(family, vocab_size=64)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "mistral", "gemma", "gemma3", "gpt2", "phi3", "opt", "gpt_neox", "falcon", "bert", "t5"],
)
def test_round_trip_without_gossamer(family: str, tmp_path: Any) -> None:
    model = family_model(family)
    call = {"decoder_input_ids": IDS} if family == "t5" else {}
    with torch.no_grad():
        before = model(IDS, **call).logits
        relufy(model)
        want = model(IDS, **call).logits
        assert not torch.equal(want, before)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(loaded(IDS, **call).logits, want)
    assert all(type(view.activation) is nn.ReLU for view in mlp_views(loaded))


@pytest.mark.parametrize(("shift", "kind"), [(shift_threshold, FATReLU), (shift_relu, ShiftedReLU)])
def test_the_configuration_remembers_a_shift(shift: Any, kind: Any, tmp_path: Any) -> None:
    model = tiny_model("llama")
    relufy(model)
    unshifted = logits(model)
    shift(model, 0.3)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == "relu"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), unshifted)  # an ordinary ReLU model, until asked
    restore_shift(loaded)
    assert torch.equal(logits(loaded), want)
    assert isinstance(mlp_views(loaded)[0].activation, kind)
    shift(loaded, 0.0)
    assert torch.equal(logits(loaded), unshifted)
    assert not hasattr(loaded.config, "relu_shift")
    shift(loaded, 0.3)
    relufy(loaded)
    assert torch.equal(logits(loaded), unshifted)
    assert not hasattr(loaded.config, "hidden_act_param")


# -- the method -------------------------------------------------------------------------------------------------------


def test_published_schedules() -> None:
    seven = ProSparse.preset("7b").schedule()
    assert [seven(t) for t in (1, 5000, 5001, 6000, 10000, 11000, 16000, 16500)] == [
        0,
        0,
        5e-3,
        5e-3,
        5e-2,
        5e-2,
        0.2,
        0.2,
    ]
    assert seven(8000) == pytest.approx((5e-3 + 5e-2) / 2)
    thirteen = ProSparse.preset("13b").schedule()
    assert [thirteen(t) for t in (5500, 6750, 10750, 11000, 15000, 16000)] == [0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2]
    one = ProSparse.preset("1b")
    assert [one.schedule()(t) for t in (10000, 15000, 20000, 25000, 35000, 95000)] == [0, 1e-3, 5e-3, 5e-3, 5e-2, 5e-2]
    assert one.sft_factor < one.peaks[-1]
    for size in ("7b", "13b"):
        assert ProSparse.preset(size).threshold == 0.01  # type: ignore[arg-type]


@settings(max_examples=30)
@given(st.integers(60, 40000))
def test_scaled_stages_keep_their_shares(steps: int) -> None:
    method = ProSparse.preset("7b")
    scaled = method.scaled(steps)
    assert scaled.steps == steps
    for old, new in zip((method.relu_steps, *method.ends), (scaled.relu_steps, *scaled.ends), strict=True):
        assert abs(new / steps - old / method.steps) <= 0.5 / steps + 1e-12


def test_baselines_are_as_long() -> None:
    method = ProSparse.preset("7b").scaled(330)
    vanilla, shifted = method.arm("vanilla"), method.arm("shifted")
    fixed = method.arm("fixed", 0.5)
    assert {m.steps for m in (method, vanilla, shifted, fixed)} == {330}
    assert [vanilla.schedule()(t) for t in (1, 330)] == [0, 0]
    assert (shifted.bias, shifted.threshold) == (0.1, None)
    assert [fixed.schedule()(t) for t in (100, 101, 330)] == [0, 0.5, 0.5]
    assert fixed.threshold == 0.01


def test_training_makes_zeros_and_an_ordinary_checkpoint(tmp_path: Any) -> None:
    method = ProSparse(relu_steps=5, peaks=(2.0, 20.0), ends=(10, 40), threshold=0.02)
    arms = {}
    for name, arm in {"prosparse": method, "vanilla": method.arm("vanilla")}.items():
        model = byte_model("llama", **SMALL)
        result = arm.train(model, batches(40), Plan(steps=40, lr=3e-3, warmup=2))
        arms[name] = model_sparsity(model, IDS)
        assert not model.training
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert (result.curve[-1]["penalty"] > 0) == (name == "prosparse")
        assert result.curve[4]["penalty"] == 0  # stage 0
    assert arms["prosparse"] > arms["vanilla"] + 0.1
    model = byte_model("llama", **SMALL)
    method.train(model, batches(40), Plan(steps=40, lr=3e-3, warmup=2))
    assert isinstance(mlp_views(model)[0].activation, FATReLU)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with ProSparse().attach(loaded) as handle:
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
        assert handle.report()["relu_threshold"] == 0.02
    tuned = method.finetune(model, batches(3, seed=1), Plan(steps=3))
    assert isinstance(mlp_views(model)[0].activation, FATReLU)
    assert all(point["penalty"] > 0 for point in tuned.curve)
    shifted = byte_model("llama", **SMALL)
    method.arm("shifted").train(shifted, batches(40), Plan(steps=40))
    assert isinstance(mlp_views(shifted)[0].activation, ShiftedReLU)


def test_it_stacks_with_sparse_attention_in_a_recipe(tmp_path: Any) -> None:
    model = tiny_model("llama")
    relufy(model)
    shift_threshold(model, 0.2)
    want = model.generate(IDS, max_new_tokens=6, do_sample=False)
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe.of(make("prosparse", threshold=0.2), make("quest", tokens=4096)).to_yaml())
    with Recipe.load(file).attach(model) as handle:
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), want)
        report = handle.report()
    assert report["rows_kept"] == 1
    assert 0 < report["sparsity"] < 1
    assert report["relu_threshold"] == 0.2


def test_bfloat16_decoding_is_the_models_own() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    relufy(model)
    shift_threshold(model, 0.3)
    want = logits(model, IDS[:, :1])
    with ProSparse().attach(model):
        torch.testing.assert_close(logits(model, IDS[:, :1]), want, atol=0.1, rtol=0.05)


def test_int8_decoding_is_near() -> None:
    model = tiny_model("llama")
    relufy(model)
    step = IDS[:, :1]
    with ProSparse(int8=True).attach(model) as handle:
        near = logits(model, step)
        assert handle.report()["mlp_bytes_dense"] == 2 * 3 * 64 * 128
    want = logits(model, step)
    assert 0 < (near - want).abs().max() < 0.05 * want.abs().max()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"peaks": (0.1,), "ends": (10, 20)}, "one end for each peak"),
        ({"relu_steps": 50, "peaks": (0.1,), "ends": (40,)}, "one after the other"),
        ({"peaks": (0.2, 0.1), "ends": (6000, 7000)}, "must not fall"),
        ({"peaks": (math.nan,), "ends": (6000,)}, "peaks"),
        ({"relu_steps": 0, "peaks": (), "ends": ()}, "needs steps"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": math.inf}, "threshold"),
        ({"reduction": "median"}, "reduction"),
        ({"bias": 0.1, "threshold": 0.01}, "choose one"),
        ({"lr": 0}, "lr"),
    ],
)
def test_bad_settings_are_one_clear_line(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        make("prosparse", **settings_)
    assert "\n" not in str(caught.value)


def test_bad_calls_are_one_clear_line() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnknownNameError, match="70b"):
        ProSparse.preset("70b")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one after the other"):
        ProSparse.preset("7b").scaled(5)
    with pytest.raises(InputError, match=r"use \.scaled"):
        ProSparse().train(model, batches(3), Plan(steps=3))
    for refused in (
        lambda: ProSparse().attach(model),
        lambda: shift_threshold(model, 0.1),
        lambda: ProSparse().finetune(model, batches(1), Plan(steps=1)),
    ):
        with pytest.raises(ModelError, match=r"SiLU.*relufy"):
            refused()
    with pytest.raises(ModelError, match="no MLP"):
        relufy(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no configuration"):
        relufy(nn.Sequential(model))
    relufy(model)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="not negative"):
            shift_threshold(model, bad)
    with ProSparse().attach(model), pytest.raises(ModelError, match="already under a policy"):
        ProSparse().attach(model)
    assert type(mlp_views(model)[0].activation) is nn.ReLU
    model.config.relu_shift = "bent"
    with pytest.raises(ModelError, match="no shift of a ReLU"):
        restore_shift(model)


def test_weights_that_are_not_finite_are_seen() -> None:
    model = tiny_model("llama")
    relufy(model)
    with torch.no_grad():
        mlp_views(model)[0].gate.weight[3, 5] = math.nan
    with ProSparse(threshold=0.1).attach(model):
        assert logits(model, IDS[:, :1]).isnan().any()  # a NaN is kept, not skipped
    with pytest.raises(InputError, match="not finite"):
        ProSparse(relu_steps=1, peaks=(), ends=()).train(model, batches(1), Plan(steps=1))
