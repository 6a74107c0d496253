"""Block SpMM on CPUs: the card's properties. Those of the kernel are in tests/parity/test_ops_sparse_linear.py."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import matrices
from gossamer.models import tiny_model
from gossamer.ops import block_sparsity, pack, sparse_linear
from gossamer.ops.sparse_linear import quantize_rows_to_uint8
from gossamer.patterns.criteria import momentum
from gossamer.weights.cpu_block_spmm import CPUBlockSpMM, activation_range, last_hidden_state, sparsity_at

SMALL = {"steps": 12, "every": 2, "cooldown": 4, "batch": 2, "lr": 1e-3}


def text(seed=0):
    return torch.randint(1, 250, (6, 12), generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.floats(0, 0.99), st.sampled_from(["exp", "cos", "linear", "cube"]))
def test_schedules_start_dense_and_end_at_the_target(n, target, decay):
    values = [sparsity_at(i, n, target, decay) for i in range(n + 1)]
    assert values[0] == 0
    assert values[-1] == target
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    if decay == "exp" and n > 1:
        steps = [(1 - b) / (1 - a) for a, b in itertools.pairwise(values)]
        assert max(steps) - min(steps) < 1e-9
    if decay == "cube":
        assert values[n // 2] == pytest.approx(target * (n // 2 / n) ** 3)
    if decay == "cos":
        assert values[n // 2] == pytest.approx(target * (1 - math.cos(math.pi * (n // 2) / n / 2)))


def test_a_constant_product_gives_ten_times_it():
    weight, gradient, score = torch.tensor([[2.0, -1.0]]), torch.tensor([[-1.5, 3.0]]), None
    for _ in range(200):
        score = momentum(score, weight, gradient)
    torch.testing.assert_close(score, torch.full((1, 2), 30.0))


@pytest.mark.parametrize("criterion", ["snip_momentum", "magnitude"])
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_zeros_come_in_whole_blocks_as_many_as_asked(criterion, target):
    model = tiny_model("llama").eval()
    applied = CPUBlockSpMM(sparsity=target, criterion=criterion, **SMALL).apply(model, text())
    kept = [(m.weight.view(m.weight.shape[0] // 4, 4, -1) != 0).sum(1) for m in matrices(model)]
    blocks = torch.cat([k.flatten() for k in kept])
    assert set(blocks.tolist()) == {0, 4}
    assert abs(int((blocks == 0).sum()) - target * len(blocks)) <= 1
    assert all(block_sparsity(m.weight) <= 0.98 for m in matrices(model))
    assert applied.masks.sparsity == pytest.approx(target, abs=1e-3)
    assert applied.facts["final_loss"] > 0


def test_no_matrix_is_emptied():
    """One matrix is worth nothing: it goes up to the cap, and the others lose the rest."""
    model = tiny_model("llama").eval()
    first = matrices(model)[0]
    first.write(first.weight * 1e-6)
    CPUBlockSpMM(sparsity=0.8, criterion="magnitude", cap=0.9, **SMALL).apply(model, text())
    count = first.weight.numel() // 4
    assert block_sparsity(first.weight) == int(0.9 * count) / count
    total = sum(m.weight.numel() for m in matrices(model))
    zeros = sum(int((m.weight == 0).sum()) for m in matrices(model))
    assert zeros == pytest.approx(0.8 * total, abs=8)


def test_what_is_gone_stays_gone_and_training_helps():
    tokens, dense = text(), tiny_model("llama").eval()
    goal = last_hidden_state(dense, tokens).detach()

    def error(**settings):
        model = tiny_model("llama").eval()
        masks = CPUBlockSpMM(sparsity=0.5, batch=4, **settings).apply(model, tokens).masks
        assert all((p[~mask] == 0).all() for p, mask in masks.parameters(model))
        return float((last_hidden_state(model, tokens) - goal).square().mean().detach())

    assert error(steps=80, every=10, cooldown=40, lr=2e-3) < 0.7 * error(steps=1, every=1, cooldown=0, lr=1e-9)


def test_the_same_seed_gives_the_same_model_and_flags_come_back():
    first, second = (tiny_model("llama").eval() for _ in range(2))
    first.lm_head.weight.requires_grad_(False)
    for model in (first, second):
        CPUBlockSpMM(sparsity=0.7, **SMALL).apply(model, text())
    assert not first.lm_head.weight.requires_grad
    assert second.model.layers[0].mlp.up_proj.weight.requires_grad
    assert all(p.grad is None for p in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@torch.no_grad()
def test_8_bits_are_within_a_quantum_of_what_they_stand_for():
    """Zero-point folding: the product of rounded inputs and weights, with scales, is what comes out."""
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(9, 64) + 0.7
    scale, zero = activation_range(float(x.min()), float(x.max()))
    packed = pack(weight, "4x1", int8=True, act_scale=scale, act_zero=zero)
    q, _, _ = quantize_rows_to_uint8(x, packed)
    back = (q.double() - zero) * packed.act_scale.double()
    exact = back @ (packed.integers().double() * packed.scale[:, None].double()).T
    got = sparse_linear(x, packed)
    quantum = (packed.scale * packed.act_scale).max()
    assert (got.double() - exact).abs().max() < quantum
    assert (back - x.double()).abs().max() <= scale / 2 + 1e-6


@torch.no_grad()
def test_what_is_added_comes_before_the_activation():
    packed = pack(torch.eye(4), "4x1", int8=True)
    x, added = torch.tensor([[2.55, 0.0, 0.0, 0.0]]), torch.tensor([[-3.0, 1.0, -1.0, 0.0]])
    torch.testing.assert_close(sparse_linear(x, packed, None, "relu", added), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@torch.no_grad()
def test_the_runtime_takes_layers_from_the_threshold_on():
    model = tiny_model("llama").eval()
    method = CPUBlockSpMM(sparsity=0.8, criterion="magnitude", **SMALL)
    with torch.enable_grad():
        method.apply(model, text())
    tokens = text(1)
    before = model(tokens).logits
    sparse = [m.name for m in matrices(model) if block_sparsity(m.weight) >= 0.7]
    calibration = method.calibrate(model, text())
    for chosen, tolerance in ((None, 0.2), (calibration, 0.3)):
        with method.attach(model, chosen) as handle:
            assert handle.report()["sparse_layers"] == len(sparse)
            assert 0 < (model(tokens).logits - before).abs().mean() < tolerance * before.abs().mean()
        assert torch.equal(model(tokens).logits, before)
    with CPUBlockSpMM(int8=False, least=0.0).attach(model) as handle:
        assert handle.report()["dense_layers"] == 0
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)


def test_calibrations_save_and_belong_to_a_model(tmp_path):
    model = tiny_model("llama").eval()
    method = CPUBlockSpMM(sparsity=0.9, **SMALL)
    method.apply(model, text())
    calibration = method.calibrate(model, text())
    loaded = Calibration.load(calibration.save(tmp_path / "ranges.safetensors"))
    assert {k: v.tolist() for k, v in loaded.tensors.items()} == {k: v.tolist() for k, v in calibration.tensors.items()}
    with pytest.raises(CalibrationError, match="another model"):
        method.attach(tiny_model("gpt2").eval(), loaded)
    with pytest.raises(CalibrationError, match="made for quest"):
        method.attach(model, Calibration("quest", calibration.fingerprint, {}))


def test_bad_input():
    model = tiny_model("llama").eval()
    with pytest.raises(InputError, match="token blocks"):
        CPUBlockSpMM().apply(model)
    with pytest.raises(InputError, match="leave none"):
        CPUBlockSpMM(steps=5, cooldown=5).apply(model, text())
    with pytest.raises(InputError, match="sparsity"):
        CPUBlockSpMM(sparsity=1.0)
    with pytest.raises(InputError, match="a schedule wants"):
        sparsity_at(3, 2, 0.5)
    with pytest.raises(CalibrationError, match="not finite"):
        activation_range(-math.inf, 1.0)
    with pytest.raises(ModelError, match="apply it first"):
        gossamer.make("cpu-block-spmm").attach(model)
    matrices(model)[0].parameter.data[0, 0] = math.nan
    with pytest.raises(ModelError, match="loss is not finite"):
        CPUBlockSpMM(**SMALL).apply(model, text())
    assert activation_range(0.0, 0.0) == (1.0, 0)

    class Odd(nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ModelError, match="no last hidden state"):
        last_hidden_state(Odd(), text())
