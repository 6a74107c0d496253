"""MoE-X: the card's checks on its formulas, the layer against one expert at a time, up-cycling, whole models, metrics."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from gossamer.activations.moe_x import MoEX, dense_mlp, upcycle
from gossamer.activations.moe_x_layer import (
    MoEXLayer,
    expert_statistics,
    firing_probability,
    sparsity_scores,
    true_l0,
)
from gossamer.activations.moe_x_metrics import (
    best_f1_coverage,
    board_f1,
    byte_labels,
    classifier_f1,
    precise_rules,
    reconstruct,
)
from gossamer.activations.moe_x_models import CLASSES, PRESETS, moe_layers, preset, router_penalty
from gossamer.activations.router import balance_loss, group_by_unit, load_shares, softmax_gates, spread, top_units
from gossamer.errors import InputError, ModelError, RecipeError, UnknownNameError
from gossamer.models import Plan, fingerprint, tiny_model, train
from gossamer.recipe import Recipe
from gossamer.registry import make

D, M, UNITS = 12, 5, 16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(seed: int = 0, k: int = 2, dtype: torch.dtype = torch.float32, **settings: Any) -> MoEXLayer:
    """A layer with weights of spread 1 and biases that are not zero, in eval mode."""
    made = MoEXLayer(D, M, UNITS, k, **settings).to(dtype).eval()
    with torch.no_grad():
        for index, weight in enumerate(made.parameters()):
            weight.copy_(normal(*weight.shape, seed=100 * seed + index, dtype=dtype))
    return made


def plain(made: MoEXLayer, x: Tensor) -> Tensor:
    """The layer by its definition, token by token and expert by expert."""
    rows = []
    for token in x:
        scores = []
        for j in range(made.n_experts):
            if made.router is not None:
                scores.append(float(made.router[j] @ token))
                continue
            weight = made.encoder[j]
            mean, variance = 0.0, 0.0
            for i in range(made.d_model):
                column = weight[:, i].tolist()
                mu = sum(column) / len(column)
                mean += mu * float(token[i])
                variance += sum((c - mu) ** 2 for c in column) / len(column) * float(token[i]) ** 2
            if made.encoder_bias is not None:
                column = made.encoder_bias[j].tolist()
                mu = sum(column) / len(column)
                mean += mu
                variance += sum((c - mu) ** 2 for c in column) / len(column)
            scores.append(-math.erf(mean / math.sqrt(2) / math.sqrt(variance + 1e-6)))
        best = sorted(range(made.n_experts), key=lambda j: -scores[j])[: made.k]
        total = sum(math.exp(scores[j]) for j in best)
        y = torch.zeros(made.d_model, dtype=x.dtype) if made.output_bias is None else made.output_bias.clone()
        for j in best:
            hidden = made.encoder[j] @ token + (0 if made.encoder_bias is None else made.encoder_bias[j])
            hidden = hidden.clamp(min=0) if made.activation == "relu" else F.gelu(hidden, approximate="tanh")
            y = y + math.exp(scores[j]) / total * (hidden @ made.decoder[j])
        rows.append(y)
    return torch.stack(rows)


KINDS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"router": "linear"},
    {"router": "linear", "activation": "gelu", "bias": True},
]


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, M])
@torch.no_grad()
def test_the_layer_is_its_definition(kind: dict[str, Any], k: int) -> None:
    made, x = layer(k=k, dtype=torch.float64, **kind), normal(9, D, seed=1, dtype=torch.float64)
    assert torch.allclose(made(x), plain(made, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_wide_mlp_gives_the_same_output(kind: dict[str, Any]) -> None:
    """Check 1: y = W_dec h with the masked concatenation h."""
    made, x = layer(**kind), normal(2, 7, D, seed=2)
    y, info = made(x, return_hidden=True)
    assert info.hidden.shape == (2, 7, M * UNITS)
    wide = info.hidden @ made.decoder.flatten(0, 1)
    if made.output_bias is not None:
        wide = wide + made.output_bias
    assert (y - wide).abs().max() <= 1e-5 * y.abs().max()
    assert torch.equal(y, made(x))
    blocks = info.hidden.unflatten(-1, (M, UNITS))
    chosen = torch.zeros(2, 7, M, dtype=torch.bool).scatter_(-1, info.units, True)
    assert bool((blocks[~chosen] == 0).all())
    assert int((blocks != 0).sum()) == int(info.l0.sum())
    if made.activation == "relu":
        assert bool((info.hidden >= 0).all())


@torch.no_grad()
def test_all_experts_at_equal_gates_are_their_average() -> None:
    """Check 2, with an encoder whose experts all score alike."""
    made, x = layer(k=M), normal(6, D, seed=3)
    made.encoder.copy_(made.encoder - made.encoder.mean(1, keepdim=True))  # no mean: every score is 0
    experts = [F.relu(x @ made.encoder[j].T) @ made.decoder[j] for j in range(M)]
    y, info = made(x, return_hidden=True)
    assert torch.allclose(info.gates, torch.full((6, M), 1 / M), atol=1e-6)
    assert torch.allclose(y, torch.stack(experts).mean(0), atol=1e-4)


@given(seed=st.integers(0, 1000), k=st.integers(1, M), linear=st.booleans())
@settings(max_examples=25, deadline=None)
def test_gates_are_a_softmax_over_the_chosen_only(seed: int, k: int, linear: bool) -> None:
    """Check 7."""
    made = layer(seed, k, router="linear" if linear else "sparsity")
    with torch.no_grad():
        _, info = made(normal(8, D, seed=seed + 1), return_hidden=True)
    wide = spread(info.gates, info.units, M)
    assert bool(((wide != 0).sum(-1) == k).all())
    assert torch.allclose(wide.sum(-1), torch.ones(8))
    best = info.scores.topk(k).values
    assert torch.equal(info.scores.gather(-1, info.units), best)
    assert torch.allclose(info.gates, best.softmax(-1))
    if not linear and k == 2:
        assert 1 / (1 + math.e**2) - 1e-6 <= float(info.gates.min())
        assert float(info.gates.max()) <= 1 / (1 + math.e**-2) + 1e-6


@torch.no_grad()
def test_the_order_of_units_in_an_expert_does_not_matter() -> None:
    """Check 9."""
    made, x = layer(bias=True), normal(10, D, seed=4)
    other = copy.deepcopy(made)
    assert other.encoder_bias is not None
    for j in range(M):
        order = torch.randperm(UNITS, generator=torch.Generator().manual_seed(j))
        for weight in (other.encoder, other.decoder, other.encoder_bias):
            weight[j] = weight[j][order]
    (y, info), (z, told) = made(x, return_hidden=True), other(x, return_hidden=True)
    assert torch.allclose(y, z, atol=1e-4)
    assert torch.allclose(info.scores, told.scores, atol=1e-6)
    assert torch.equal(info.units, told.units)
    assert torch.equal(info.l0, told.l0)


@torch.no_grad()
def test_no_tokens_and_one_token() -> None:
    made = layer(bias=True)
    assert made(torch.zeros(0, D)).shape == (0, D)
    y, info = made(torch.zeros(2, 0, D), return_hidden=True)
    assert y.shape == (2, 0, D)
    assert info.hidden.shape == (2, 0, M * UNITS)
    x = normal(5, D, seed=5)
    assert torch.allclose(made(x[2]), made(x)[2], atol=1e-5)


def test_bfloat16_keeps_scores_in_float32() -> None:
    made, x = layer(dtype=torch.bfloat16), normal(20, D, seed=6)
    y, info = made(x.bfloat16(), return_hidden=True)
    assert y.dtype == torch.bfloat16
    assert info.scores.dtype == info.gates.dtype == torch.float32
    assert torch.allclose(info.scores, sparsity_scores(x.bfloat16().float(), expert_statistics(made.encoder.float())))
    with torch.autocast("cpu", torch.bfloat16):
        plainly = layer()
        assert plainly.scores(x).dtype == torch.float32
        assert torch.equal(plainly.scores(x), sparsity_scores(x, expert_statistics(plainly.encoder)))


@torch.no_grad()
def test_kept_statistics_follow_the_weights() -> None:
    made, x = layer(), normal(3, D, seed=7)
    before = made.scores(x)
    assert made.statistics() is made.statistics()
    made.encoder.mul_(-1.0)
    assert torch.allclose(made.scores(x), -before, atol=1e-6)
    made.load_state_dict(layer(seed=1).state_dict())
    assert torch.equal(made.scores(x), layer(seed=1).scores(x))
    made.encoder.data = layer(seed=2).encoder.data
    assert torch.equal(made.scores(x), layer(seed=2).scores(x))
    made.encoder.data.mul_(2.0)  # behind torch's version counter: going to train mode and back reads the weights again
    made.train()
    assert torch.equal(made.eval().scores(x), sparsity_scores(x, expert_statistics(made.encoder)))


# -- the router -------------------------------------------------------------------------------------------------------


def test_scores_are_the_firing_probability_and_foresee_l0() -> None:
    """Check 3: r = −(2P − 1); Gaussian experts fire as foreseen for 95 % of the tokens, within three deviations."""
    units, width, experts = 256, 64, 8
    mean = 0.1 * normal(experts, 1, width, seed=1)
    encoder = mean + normal(experts, units, width, seed=2) * (0.5 + normal(experts, 1, width, seed=3).abs())
    x = normal(400, width, seed=4)
    known = expert_statistics(encoder)
    probability = firing_probability(x, known)
    assert torch.allclose(sparsity_scores(x, known), 1 - 2 * probability, atol=1e-6)
    error = (units * probability - true_l0(x, encoder)).abs() / units
    assert float((error < 3 * (probability * (1 - probability) / units).sqrt()).float().mean()) >= 0.95
    assert (
        float(torch.corrcoef(torch.stack([sparsity_scores(x, known).flatten(), probability.flatten()]))[0, 1]) < -0.999
    )


def test_statistics_are_over_units_per_input_dimension() -> None:
    encoder = torch.tensor([[[1.0, 5.0], [3.0, 5.0]], [[0.0, -2.0], [0.0, 2.0]]])
    known = expert_statistics(encoder, torch.tensor([[0.0, 2.0], [1.0, 1.0]]))
    assert known.mean.tolist() == [[2.0, 5.0], [0.0, 0.0]]
    assert known.variance.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert known.bias_mean.tolist() == [1.0, 1.0]
    assert known.bias_variance.tolist() == [1.0, 0.0]
    # m = 2 + 10 + 1, v = 1·1 + 0·4 + 1
    assert float(sparsity_scores(torch.tensor([1.0, 2.0]), known)[0]) == pytest.approx(-math.erf(13 / 2))
    assert float(sparsity_scores(torch.tensor([1.0, 0.5]), known)[1]) == pytest.approx(-math.erf(1 / math.sqrt(2)))


@given(seed=st.integers(0, 1000), scale=st.floats(0.05, 50))
@settings(max_examples=30, deadline=None)
def test_scores_ignore_the_length_of_x(seed: int, scale: float) -> None:
    """Check 4, in float64: the eps under the root shows where v is small."""
    known = expert_statistics(normal(M, UNITS, D, seed=seed, dtype=torch.float64))
    x = normal(6, D, seed=seed + 1, dtype=torch.float64)
    assert torch.allclose(sparsity_scores(scale * x, known), sparsity_scores(x, known), atol=1e-3)


@given(seed=st.integers(0, 1000), c=st.floats(0.05, 0.5), sign=st.sampled_from([1, -1]), j=st.integers(0, M - 1))
@settings(max_examples=30, deadline=None)
def test_units_turned_towards_x_lower_the_score(seed: int, c: float, sign: int, j: int) -> None:
    """Check 5: the variance stays, the mean moves by c·‖x‖²."""
    encoder = normal(M, UNITS, D, seed=seed, dtype=torch.float64)
    x = normal(D, seed=seed + 1, dtype=torch.float64)
    moved = encoder.clone()
    moved[j] += sign * c * x
    change = sparsity_scores(x, expert_statistics(moved)) - sparsity_scores(x, expert_statistics(encoder))
    assert float(change[j]) * sign < 0
    assert bool((change[torch.arange(M) != j] == 0).all())


def test_an_expert_without_variance() -> None:
    """Check 6: all units alike score −1 or 1 by the sign of their pre-activation; at 0 the score is 0."""
    row = normal(D, seed=1)
    encoder = torch.stack([row, -row, torch.zeros(D)])[:, None].expand(3, UNITS, D)
    encoder = encoder.clone().requires_grad_()
    scores = sparsity_scores(row, expert_statistics(encoder))
    assert scores.tolist() == [-1.0, 1.0, 0.0]
    scores.sum().backward()
    assert encoder.grad is not None
    assert bool(encoder.grad.isfinite().all())


def test_gradients_of_scores_and_layer() -> None:
    """Check 8, and the whole layer with its balance loss, against finite differences."""
    encoder = (0.5 * normal(3, 5, 4, dtype=torch.float64)).requires_grad_()
    bias = normal(3, 5, seed=1, dtype=torch.float64).requires_grad_()
    x = normal(6, 4, seed=2, dtype=torch.float64).requires_grad_()

    def scores(encoder: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return sparsity_scores(x, expert_statistics(encoder, bias))

    assert torch.autograd.gradcheck(scores, (encoder, bias, x))
    for kind in ({}, {"router": "linear", "activation": "gelu"}):
        kinds: Any = kind
        made = MoEXLayer(4, 3, 5, 2, bias=True, balance=0.5, **kinds).double()
        for index, weight in enumerate(made.parameters()):
            weight.data.copy_(normal(*weight.shape, seed=index, dtype=torch.float64))
        names = [name for name, _ in made.named_parameters()]

        def run(x: Tensor, *weights: Tensor, made: MoEXLayer = made, names: list[str] = names) -> Any:
            y, info = torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x, True))
            return y, info.aux_loss

        assert torch.autograd.gradcheck(run, (x, *made.parameters()))


def test_a_larger_gate_makes_its_expert_fire_less() -> None:
    """The regulariser: gradients reach the encoders of chosen experts through the gates, and fewer of their units fire."""
    made, x = layer().train(), 1 + 0.5 * normal(64, D, seed=8)
    _, info = made(x, return_hidden=True)
    favoured = info.units[0, 0]
    mine = (info.units == favoured).any(-1)
    spread(info.gates, info.units, M)[:, favoured].sum().backward()
    assert made.encoder.grad is not None
    touched = made.encoder.grad.abs().amax((1, 2)) > 0
    partners = torch.zeros(M, dtype=torch.bool).index_fill_(0, info.units[mine].unique(), True)
    assert torch.equal(touched, partners)
    with torch.no_grad():
        before = true_l0(x[mine], made.encoder)[:, favoured].float().mean()
        made.encoder += made.encoder.grad
        assert float(true_l0(x[mine], made.encoder)[:, favoured].float().mean()) < float(before) - 1


def test_routing_by_hand() -> None:
    scores = torch.tensor([[0.2, 0.2, -0.5], [0.9, -0.9, 0.0]], requires_grad=True)
    units = top_units(scores, 2)
    assert units.tolist() == [[0, 1], [0, 2]]
    assert top_units(scores, 2, shared=1).tolist() == [[0, 1], [0, 2]]
    assert top_units(scores, 1, shared=1).tolist() == [[0], [0]]
    assert load_shares(units, 3).tolist() == [1.0, 0.5, 0.5]
    gates = softmax_gates(scores, units)
    assert gates[0].tolist() == [0.5, 0.5]
    order, counts = group_by_unit(units, 3)
    assert counts == [2, 1, 1]
    assert (order // 2).tolist() == [0, 1, 0, 1]
    p = scores.softmax(-1)
    loss = balance_loss(p, units)
    mean = p.mean(0).tolist()
    assert float(loss.detach()) == pytest.approx(3 * (mean[0] + 0.5 * mean[1] + 0.5 * mean[2]))
    assert float(balance_loss(p, units, shared=1).detach()) == pytest.approx(2 * (0.5 * mean[1] + 0.5 * mean[2]))
    loss.backward()
    assert scores.grad is not None
    assert float(scores.grad.abs().sum()) > 0


@given(seed=st.integers(0, 1000), k=st.integers(1, M))
@settings(max_examples=25, deadline=None)
def test_balance_is_k_at_even_use_and_more_when_experts_are_crowded(seed: int, k: int) -> None:
    even = torch.stack([torch.arange(k).add(t) % M for t in range(M)])
    p = normal(M, M, seed=seed).softmax(-1)
    assert float(balance_loss(p, even)) == pytest.approx(k, rel=1e-5)
    likely = top_units(p.mean(0).expand(M, M), k)
    assert float(balance_loss(p, likely)) >= k - 1e-5


@pytest.mark.parametrize("call", [(0, 0), (4, 0), (1, 2), (2, -1)])
def test_routing_refuses(call: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="cannot choose"):
        top_units(torch.zeros(2, 3), *call)


def test_balance_refuses_other_tokens() -> None:
    with pytest.raises(InputError, match="not of the same tokens"):
        balance_loss(torch.zeros(3, 4), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    "sizes",
    [{"n_experts": 0}, {"k": 9}, {"k": 0}, {"d_expert": 0}, {"router": "x"}, {"activation": "x"}, {"balance": -1}],
)
def test_a_layer_refuses(sizes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        MoEXLayer(8, **{"d_expert": 4, **sizes})
    assert "\n" not in str(caught.value)


def test_a_layer_refuses_other_widths() -> None:
    with pytest.raises(InputError, match="width 12 cannot take a tensor"):
        layer()(torch.zeros(2, D + 1))


# -- up-cycling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_slices_are_disjoint_and_their_mean_is_the_dense_mlp() -> None:
    mlp = tiny_model("gpt2").transformer.h[0].mlp  # 64 channels, 128 units
    made = upcycle(mlp, 4, 32)
    assert torch.equal(made.encoder.flatten(0, 1), mlp.c_fc.weight.T)  # no noise where no unit is used twice
    made.k = 4
    made.encoder.sub_(made.encoder.mean(1, keepdim=True))  # equal gates
    assert made.encoder_bias is not None
    made.encoder_bias.zero_()
    x = normal(5, 64)
    dense = F.relu(x @ made.encoder.flatten(0, 1).T) @ mlp.c_proj.weight + mlp.c_proj.bias
    assert torch.allclose(made.eval()(x), dense, atol=1e-3)


@torch.no_grad()
def test_copies_get_noise_and_differ() -> None:
    mlp = tiny_model("gpt2").transformer.h[0].mlp
    made = upcycle(mlp, 3, 128, noise=0.01, seed=1)
    assert torch.equal(made.decoder, mlp.c_proj.weight.expand(3, -1, -1))
    shift = made.encoder - mlp.c_fc.weight.T
    assert 0.008 < float(shift.std() / mlp.c_fc.weight.std()) < 0.012
    assert torch.equal(made.encoder, upcycle(mlp, 3, 128, noise=0.01, seed=1).encoder)
    scores = made.scores(normal(4, 64))
    assert all(len(set(row)) == 3 for row in scores.tolist())
    tied = upcycle(mlp, 3, 128, noise=0.0).scores(normal(4, 64))
    assert torch.allclose(tied, tied[:, :1].expand(-1, 3), atol=1e-6)


def test_a_gated_mlp_hands_over_gate_and_down() -> None:
    mlp = tiny_model("llama").model.layers[0].mlp
    made = upcycle(mlp, 2, 64)
    assert made.encoder_bias is None
    assert torch.equal(made.encoder.flatten(0, 1), mlp.gate_proj.weight)
    assert torch.equal(made.decoder.flatten(0, 1), 2 * mlp.down_proj.weight.T)


def test_up_cycling_refuses() -> None:
    mlp = copy.deepcopy(tiny_model("gpt2").transformer.h[0].mlp)
    with pytest.raises(ModelError, match="Linear is not supported: no MLP"):
        dense_mlp(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="one MLP at a time; GPT2Block holds one as mlp"):
        dense_mlp(tiny_model("gpt2").transformer.h[0])
    with pytest.raises(InputError, match="noise"):
        upcycle(mlp, noise=-1.0)
    with pytest.raises(InputError, match="k <= n_experts"):
        upcycle(mlp, 2, k=3)
    mlp.c_fc.weight.data[0, 0] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        upcycle(mlp)


# -- whole models -----------------------------------------------------------------------------------------------------


def ids(count: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", list(CLASSES))
def test_a_model_is_replaced_trained_saved_and_loaded(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    name = fingerprint(dense)
    model = MoEX(n_experts=4).apply(dense)
    assert fingerprint(dense) == name
    assert not model.training
    kept = model.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in dense.state_dict().items() if ".mlp." not in key)
    layers = moe_layers(model)
    assert [one.d_expert for one in layers] == [64] * len(layers)
    assert torch.equal(layers[1].encoder, upcycle_of(dense, 1).encoder)
    before = [p.clone() for p in model.parameters()]
    batches = [ids(2, 17, seed) for seed in range(3)]
    done = train(model, batches, Plan(steps=3, warmup=1), penalty=router_penalty(model))
    assert all(0.0 < point["penalty"] < 0.02 * 4 * len(layers) for point in done.curve)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is type(model)
    assert back.config.to_dict().items() >= {"n_experts": 4, "d_expert": 64, "k": 2, "router": "sparsity"}.items()
    with torch.no_grad():
        assert torch.equal(back(ids()).logits, model(ids()).logits)
    new = model.generate(ids(1, 5), max_new_tokens=6, do_sample=False)
    assert torch.equal(new, back.generate(ids(1, 5), max_new_tokens=6, do_sample=False))


def test_gossamer_loads_a_folder_with_experts_in_a_fresh_process(tmp_path: Path) -> None:
    MoEX(n_experts=4).apply(tiny_model("gpt2")).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    code = "import sys, gossamer; print(type(gossamer.load(sys.argv[1]).model).__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MoEXForCausalLM", done.stderr


def upcycle_of(dense: Any, index: int) -> MoEXLayer:
    block = (dense.transformer.h if hasattr(dense, "transformer") else dense.model.layers)[index]
    return upcycle(block.mlp, 4, seed=index)


def test_decoding_with_the_cache_equals_reading_at_once() -> None:
    model = MoEX(n_experts=4).apply(tiny_model("gpt2"))
    tokens = ids(2, 10)
    with torch.no_grad():
        whole = model(tokens).logits
        cache, steps = None, []
        for t in range(10):
            out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-3, rtol=1e-3)


def test_attention_methods_stack_on_a_model_with_experts() -> None:
    model = MoEX(n_experts=4).apply(tiny_model("llama"))
    with torch.no_grad():
        plainly = model(ids(1, 40), use_cache=True).logits
        with make("quest", tokens=1000).attach(model):
            routed = model(ids(1, 40), use_cache=True).logits
    assert torch.allclose(routed, plainly, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("router", ["sparsity", "linear"])
def test_fresh_experts_are_seeded_and_narrow(router: str) -> None:
    dense = tiny_model("gpt2", initializer_range=0.02)
    one, two = (MoEX(router=router, start="fresh", seed=s).apply(dense) for s in (3, 3))
    other = MoEX(router=router, start="fresh", seed=4).apply(dense)
    first, same, differs = (moe_layers(model)[0] for model in (one, two, other))
    assert torch.equal(first.encoder, same.encoder)
    assert not torch.equal(first.encoder, differs.encoder)
    assert float(first.encoder.std()) == pytest.approx(0.02, rel=0.05)
    assert float(first.decoder.std()) == pytest.approx(0.01, rel=0.05)  # 0.02/√(2·2 layers)
    assert (first.router is None) is (router == "sparsity")


def test_transformers_own_loss_includes_the_balance() -> None:
    model = MoEX(n_experts=4, balance=5.0).apply(tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    tokens = ids()
    plainly = float(model(tokens, labels=tokens).loss)
    model.train()
    out = model(tokens, labels=tokens)
    assert float(out.loss.detach()) > plainly + 2 * 5.0
    out.loss.backward()
    with pytest.raises(ModelError, match="training mode before each step"):
        router_penalty(model)(0)
    model(tokens)
    copy.deepcopy(model)  # with a balance loss inside


def test_a_model_says_what_it_cannot_be() -> None:
    with pytest.raises(ModelError, match=r"of the MLPs of gpt2, llama, .* models; this is gemma"):
        MoEX().apply(tiny_model("gemma"))
    with pytest.raises(ModelError, match="this is Linear"):
        MoEX().apply(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="this is moe_x"):
        MoEX().apply(MoEX().apply(tiny_model("gpt2")))
    with pytest.raises(ModelError, match="has no MoE-X layers"):
        router_penalty(tiny_model("gpt2"))
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.inf
    with pytest.raises(ModelError, match="not finite"):
        MoEX().apply(broken)
    with pytest.raises(InputError, match="k=3 experts cannot be chosen of n_experts=2"):
        MoEX(n_experts=2, k=3)
    with pytest.raises(InputError, match="router"):
        MoEX(router="softmax")
    with pytest.raises(RecipeError, match="changes a model for good"):
        Recipe.of(MoEX()).attach(tiny_model("gpt2"))


def test_presets_are_the_papers_table() -> None:
    assert set(PRESETS) == {"chess", "fineweb-small", "fineweb-medium"}
    chess = preset("chess").config()
    assert (chess.n_layer, chess.n_head, chess.n_embd, chess.vocab_size, chess.n_positions) == (8, 8, 512, 32, 1023)
    assert (chess.n_experts, chess.k, chess.d_expert, chess.resid_pdrop) == (8, 2, 2048, 0.0)
    assert chess.n_experts * chess.d_expert == 16_384
    for one in PRESETS.values():  # equal active parameters
        assert one.config().k * one.config().d_expert == one.dense_units
    plan = preset("fineweb-medium").plan()
    assert (plan.steps, plan.warmup, plan.lr, plan.clip) == (100_000, 5000, 3e-4, 1.0)
    assert plan.rate(plan.steps - 1) == pytest.approx(3e-5)
    with pytest.raises(UnknownNameError, match="choose from chess"):
        preset("go")


# -- metrics ----------------------------------------------------------------------------------------------------------


def brute_coverage(hidden: Tensor, labels: Tensor) -> list[float]:
    found = []
    for label in labels.T.tolist():
        best = 0.0
        for unit in hidden.T.tolist():
            for tau in range(10):
                fired = [max(unit) > 0 and value > tau / 10 * max(unit) for value in unit]
                hits = sum(a and b for a, b in zip(fired, label, strict=True))
                of = sum(fired) + sum(label)
                best = max(best, 2 * hits / of if of else 0.0)
        found.append(best)
    return found


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_coverage_is_its_definition(seed: int) -> None:
    hidden = (normal(30, 7, seed=seed) * 8).round() / 8
    labels = normal(30, 4, seed=seed + 1) > 0.8
    found = best_f1_coverage(hidden, labels)
    want = brute_coverage(hidden, labels)
    assert found.f1.tolist() == pytest.approx(want)
    assert found.score == pytest.approx(sum(want) / 4)
    again = classifier_f1(hidden, labels, found, hidden.amax(0))
    present = labels.any(0)
    assert torch.allclose(again[present], found.f1[present])


def test_coverage_over_many_units_finds_the_planted_ones() -> None:
    labels = normal(200, 3) > 0.5
    hidden = normal(200, 1200, seed=1).clamp(min=0) * 0.1
    hidden[:, [5, 700, 1199]] = labels.float() * 2 + 0.3  # above τ = 0.2 exactly where the label holds
    found = best_f1_coverage(hidden, labels)
    assert found.unit.tolist() == [5, 700, 1199]
    assert found.score == 1.0
    assert found.threshold.tolist() == pytest.approx([0.2] * 3)


def test_a_board_is_rebuilt_from_precise_units() -> None:
    labels = normal(400, 6) > 0.7
    hidden = torch.cat([labels.float(), normal(400, 20, seed=1)], 1)
    hidden[:, 5] = (labels[:, 5] | (normal(400, seed=2) > 1.0)).float()  # half right: no rule
    rules = precise_rules(hidden[:300], labels[:300])
    predicted = reconstruct(hidden[300:], rules)
    assert torch.equal(predicted[:, :5], labels[300:, :5])
    assert not bool(rules.precise[:, 5, 5].any())
    assert 0.5 < board_f1(predicted, labels[300:]) < 1.0
    assert board_f1(labels, labels) == 1.0
    assert not bool(precise_rules(hidden[:300], labels[:300], min_count=301).precise.any())


def test_byte_labels_of_a_line() -> None:
    text = b"if x1:\n  y = 'A_b'  # (42)\nz"
    found = byte_labels(torch.tensor(list(text)))

    def where(name: str) -> str:
        return "".join(chr(c) for c, flag in zip(text, found[name].tolist(), strict=True) if flag)

    assert where("capital letter") == "A"
    assert where("digit") == "142"
    assert where("inside a number") == "2"
    assert where("newline") == "\n\n"
    assert where("after newline") == " z"
    assert where("indentation") == "  "
    assert where("comment") == "# (42)"
    assert where("start of a word") == "ixyA4z"
    assert where("inside a word") == "f1_b2"
    assert where("end of a word") == " : ')"
    assert where("quote") == "''"
    assert where("opening bracket") + where("closing bracket") == "()"
    assert where("vowel") == "iA"
    assert where("after space") == "xy='#("


def test_byte_labels_see_no_later_byte() -> None:
    tokens = ids(3, 40, seed=5)
    changed = tokens.clone()
    changed[:, 21:] = ids(3, 19, seed=6)
    whole, part = byte_labels(tokens), byte_labels(changed)
    assert all(torch.equal(whole[name][:, :21], part[name][:, :21]) for name in whole)


@pytest.mark.parametrize(
    ("hidden", "labels", "thresholds", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 1, dtype=torch.bool), (0.0,), "same N"),
        (torch.zeros(3, 2), torch.zeros(3, 1), (0.0,), "boolean"),
        (torch.zeros(0, 2), torch.zeros(0, 1, dtype=torch.bool), (0.0,), "same N"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.bool), (1.0,), "thresholds"),
        (torch.full((3, 2), math.nan), torch.zeros(3, 1, dtype=torch.bool), (0.0,), "not finite"),
    ],
)
def test_metrics_refuse(hidden: Tensor, labels: Tensor, thresholds: tuple[float, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        best_f1_coverage(hidden, labels, thresholds)


def test_metrics_refuse_other_things() -> None:
    hidden, labels = torch.ones(3, 2), torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(InputError, match="precision"):
        precise_rules(hidden, labels, precision=0.0)
    with pytest.raises(InputError, match="2 units"):
        reconstruct(torch.ones(3, 4), precise_rules(hidden, labels))
    with pytest.raises(InputError, match="alike"):
        board_f1(labels, labels[:2])
    with pytest.raises(InputError, match="0 to 255"):
        byte_labels(torch.tensor([256]))
