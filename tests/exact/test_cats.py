"""CATS: thresholds against order statistics, masks against gathers by hand, fine-tuning under the hard mask."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.activations.cats import CATS, EDGES, cats, released_counts, released_threshold, weight_bytes
from gossamer.activations.finetune import finetune, near_threshold, warmup_factor
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import mlp_views, watch
from gossamer.models import LoRA, Plan, tiny_model
from gossamer.ops import NeuronWeights, sparse_mlp
from gossamer.patterns import MagnitudeSketch, exact_quantile, threshold_at
from gossamer.patterns.quantiles import TABLE
from gossamer.registry import make

BIN = 2 / (EDGES - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 2, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def gates(model: Any, tokens: Tensor) -> list[Tensor]:
    found: dict[int, list[Tensor]] = {}
    watch(model, tokens, {"mlp.gate": lambda layer, gate: found.setdefault(layer, []).append(gate.clone())})
    return [torch.cat(found[layer]) for layer in sorted(found)]


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens).logits
    return out


# -- the threshold ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 400), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_an_exact_threshold_drops_its_share(seed: int, count: int, share: float) -> None:
    """Check 3: within 1/N, on the sample itself."""
    a = F.silu(normal(count, seed=seed) * 2)
    t = exact_quantile(a, share)
    assert abs(float((cats(a, t) == 0).double().mean()) - share) <= 1 / count


@given(st.integers(0, 1000), st.integers(1, 400), st.floats(0.01, 0.99), st.floats(0.01, 3))
@settings(max_examples=60, deadline=None)
def test_the_released_threshold_is_the_quantile_rounded_down_to_a_bin(
    seed: int, count: int, share: float, spread: float
) -> None:
    """Check 4. Where k·N is a whole number the release goes to the next value (its cdf must exceed k), so k is in between."""
    share = (math.floor(share * count) + 0.5) / count
    a = F.silu(normal(count, seed=seed) * spread)
    exact = float(a.abs().sort().values[math.ceil(share * count) - 1])  # min t with F(t) ≥ k, by its definition
    found = float(released_threshold(released_counts(a), share))
    assert found <= exact + 1e-7
    if exact <= 1:
        assert exact - found <= BIN * 1.001
    else:
        assert found == 1, "it can't exceed its last edge"


def test_released_histogram_by_hand() -> None:
    counts = released_counts(torch.tensor([0.0, 0.0015, -0.0015, 0.5, -2.0]))
    assert counts.shape == (EDGES + 1,)
    assert counts.sum() == 5
    assert counts[EDGES] == 1, "beyond 1"
    assert counts[EDGES // 2] == 1, "the middle bin holds zero"
    assert counts[EDGES // 2 + 1] == 2
    # cdf: 1/5 up to the middle bin, 3/5 with the next; |a| = 0.0015 lies in [0.001003, 0.003009).
    assert float(released_threshold(counts, 0.1)) == 0, "the middle bin's left edge is below zero"
    assert float(released_threshold(counts, 0.3)) == pytest.approx(BIN / 2, rel=1e-4)
    assert float(released_threshold(counts, 0.2)) == pytest.approx(BIN / 2, rel=1e-4), "the cdf must exceed k"
    assert float(released_threshold(counts, 1.0)) == 1
    for bad in (counts[1:], torch.zeros(2, EDGES + 1, dtype=torch.int64)):
        with pytest.raises(InputError, match="bins"):
            released_threshold(bad, 0.5)


def test_tables_serve_every_share() -> None:
    sketch, values = MagnitudeSketch(), normal(20_000)
    sketch.add(values)
    table = sketch.table()
    assert table.shape == (TABLE,)
    assert bool((table.diff() >= 0).all())
    for share in (0.0, 0.001, 0.3, 0.5, 0.7, 1.0):
        assert float(threshold_at(table, share)) == pytest.approx(sketch.quantile(share))
    for share in (0.1234, 0.5555, 0.98765):
        dropped = float((values.abs() <= threshold_at(table, share)).double().mean())
        assert dropped == pytest.approx(share, abs=1e-3)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="share"):
            threshold_at(table, bad)
    with pytest.raises(InputError, match="tables"):
        threshold_at(table[1:], 0.5)
    with pytest.raises(InputError, match="needs values"):
        MagnitudeSketch().table()


# -- the MLP ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(2, 12), st.integers(1, 24), st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_masked_equals_gathered(seed: int, d: int, neurons: int, t: float) -> None:
    """Check 2 and 8: the formula, the gather by indices, and the operator; bytes are those of the rows touched."""
    x, gate, up, down = normal(1, d, seed=seed), *(normal(neurons, d, seed=seed + i) for i in (1, 2, 3))
    v = F.silu(x @ gate.T)
    m = v.abs() > t
    masked = (v * m * (x @ up.T)) @ down
    index = m[0].nonzero()[:, 0]
    gathered = (v[:, index] * (x @ up[index].T)) @ down[index]
    counts = torch.zeros(2, dtype=torch.int64)
    kernel = sparse_mlp(x, NeuronWeights(gate, up, down), threshold=torch.tensor(t), counts=counts)
    torch.testing.assert_close(masked, gathered, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kernel, gathered, atol=1e-5, rtol=1e-5)
    assert counts.tolist() == [len(index)] * 2
    touched = gate.numel() + up[index].numel() + down[index].numel()
    assert weight_bytes(d, neurons, len(index)) == 4 * touched == CATS().io_bytes(d, neurons, len(index), 4)


@given(st.integers(0, 200), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_kept_entries_are_unchanged_and_the_error_is_bounded(seed: int, t: float) -> None:
    """Check 6."""
    a = normal(50, seed=seed)
    kept = cats(a, t)
    assert torch.equal(kept[kept != 0], a[a.abs() > t])
    assert float((a - kept).norm()) <= t * math.sqrt(int((kept == 0).sum())) + 1e-6


# -- on a model -------------------------------------------------------------------------------------------------------

MODEL = tiny_model("llama")
TOKENS = ids(4, 64, seed=3)
LEARNED = CATS().calibrate(MODEL, TOKENS)


def test_nothing_dropped_is_dense_bit_for_bit() -> None:
    """Check 1."""
    dense = logits(MODEL, ids())
    with CATS(sparsity=0, mode="mask").attach(MODEL, LEARNED) as handle:
        assert torch.equal(logits(MODEL, ids()), dense)
        assert handle.report()["neurons_kept"] == 1


def test_everything_dropped_leaves_no_mlp() -> None:
    """Check 7: on the calibration sample k = 1 is above every gate; the output is exactly zero."""
    view = mlp_views(MODEL)[0]
    inputs: list[Tensor] = []
    watch(MODEL, TOKENS, {"mlp.input": lambda layer, x: inputs.append(x.clone()) if layer == 0 else None})
    with CATS(sparsity=1, mode="mask").attach(MODEL, LEARNED), torch.no_grad():
        for x in inputs:
            assert int(view.owner(x).count_nonzero()) == 0


def test_the_calibration_sample_is_dropped_as_asked() -> None:
    """Check 3 through the whole method: the sketch is a bin of a 2048th wide, and each layer has its own threshold."""
    sample = gates(MODEL, TOKENS)
    for share in (0.3, 0.5, 0.7, 0.9):
        thresholds = CATS(sparsity=share).thresholds(LEARNED)
        assert thresholds.shape == (2,)
        for gate, t in zip(sample, thresholds, strict=True):
            assert float((gate.abs() <= t).double().mean()) == pytest.approx(share, abs=1e-3)
            assert float(t) == pytest.approx(exact_quantile(gate, share), rel=1e-3)


def test_masks_are_nested_in_the_sparsity() -> None:
    """Check 5, for every token of other texts."""
    for gate, *ts in zip(
        gates(MODEL, ids()), *(CATS(sparsity=k).thresholds(LEARNED) for k in (0.2, 0.5, 0.8)), strict=True
    ):
        kept = [gate.abs() > t for t in ts]
        assert not bool((kept[2] & ~kept[1]).any())
        assert not bool((kept[1] & ~kept[0]).any())
        assert int(kept[2].sum()) < int(kept[1].sum()) < int(kept[0].sum())


def test_the_gate_is_judged_and_not_its_input_or_the_product() -> None:
    """SiLU is not monotone below −1.28: a gate of pre-activation −6 is nearly zero and goes, one of −1.3 stays."""
    view = mlp_views(MODEL)[0]
    x = normal(1, 3, view.channels)
    t = CATS().thresholds(LEARNED)[0]
    with torch.no_grad():
        gate, up = F.silu(view.gate(x)), view.up(x)
        want = view.down(torch.where(gate.abs() > t, gate * up, 0))
        with CATS(mode="mask").attach(MODEL, LEARNED):
            assert torch.equal(view.owner(x), want)
        with CATS().attach(MODEL, LEARNED):
            torch.testing.assert_close(view.owner(x), want, atol=1e-5, rtol=1e-5)


def test_compat_takes_the_released_histogram() -> None:
    sample = gates(MODEL, TOKENS)
    found = CATS(compat="released").thresholds(LEARNED)
    for gate, t in zip(sample, found, strict=True):
        assert float(t) == float(released_threshold(released_counts(gate), 0.5))
        exact = exact_quantile(gate, 0.5)
        assert exact - BIN * 1.01 <= float(t) <= exact
    assert not torch.equal(found, CATS().thresholds(LEARNED))


def test_bytes_of_a_step() -> None:
    """(3 − 2k)/3 of the weights, counted."""
    with CATS(sparsity=0.7).attach(MODEL, LEARNED) as handle, torch.no_grad():
        cache = MODEL(ids(1)).past_key_values
        MODEL(ids(1, 1), past_key_values=cache)
        report = handle.report()
        kept = [int(meter.totals[1][1]) for meter in handle.mlp.meters]  # type: ignore[union-attr]
    assert report["mlp_bytes_read"] == sum(weight_bytes(64, 128, k) for k in kept)
    assert report["mlp_bytes_dense"] == 2 * weight_bytes(64, 128, 128)
    share = report["neurons_kept"]
    assert report["mlp_bytes_read"] / report["mlp_bytes_dense"] == pytest.approx((1 + 2 * share) / 3)
    assert report["cats_target_sparsity"] == 0.7


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt2"])
def test_every_family(family: str) -> None:
    model = tiny_model(family)
    method = CATS(sparsity=0.6)
    calibration = method.calibrate(model, TOKENS)
    dense = logits(model, TOKENS)
    with method.attach(model, calibration) as handle:
        logits(model, TOKENS[:, :1])
        assert not torch.allclose(logits(model, TOKENS), dense, atol=1e-2)
        assert handle.mlp is not None
        dropped = [1 - (meter.share(False) or 0) for meter in handle.mlp.meters]
    # Layer 0 sees what it saw in calibration; later ones see what the mask before them left. SiLU's values pile up at its
    # minimum, −0.278, so that the one bin there holds nearly 1 % of qwen3's.
    assert dropped[0] == pytest.approx(0.6, abs=1e-2)
    assert all(0.4 < share < 0.8 for share in dropped)
    assert torch.equal(logits(model, TOKENS), dense)


@pytest.mark.parametrize("gated", [True, False])
def test_encoders_and_decoders(gated: bool) -> None:
    """T5 has both, with a dropout before `wo`; its four MLPs are masked alike."""
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens, method = TOKENS % 64, CATS(sparsity=0.6)
    calibration = method.calibrate(model, tokens)
    assert calibration.tensors["gate"].shape == (4, TABLE)
    with torch.no_grad():
        dense = model(tokens, decoder_input_ids=tokens).logits
        with method.attach(model, calibration) as handle:
            sparse = model(tokens, decoder_input_ids=tokens).logits
            shares = handle.report()["neurons_kept_by_layer"]
        assert not torch.equal(sparse, dense)
        assert torch.equal(model(tokens, decoder_input_ids=tokens).logits, dense)
    assert shares[0] == pytest.approx(0.4, abs=5e-3)
    assert all(0.2 < share < 0.6 for share in shares)


def test_bfloat16_and_int8() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    calibration = CATS().calibrate(model, TOKENS)
    whole = logits(model, ids())
    with CATS().attach(model, calibration) as handle:
        assert logits(model, ids()).dtype is torch.bfloat16
        assert 0.4 < handle.report()["neurons_kept"] < 0.6
    assert torch.equal(logits(model, ids()), whole)
    one = ids(1, 1)
    with CATS(mode="mask").attach(MODEL, LEARNED):
        want = logits(MODEL, one)
    with CATS(int8=True).attach(MODEL, LEARNED) as handle:
        got = logits(MODEL, one)
        assert handle.report()["mlp_bytes_dense"] == 2 * weight_bytes(64, 128, 128, element_size=1)
    assert 0 < float((got - want).abs().max()) < 0.1 * float(want.abs().max())


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def train_plan(steps: int = 30) -> Plan:
    return Plan(steps=steps, lr=1e-2, warmup=2)


def test_dropped_entries_give_no_gradient_to_their_gate() -> None:
    """The whole gradient is that of the masked formula: no straight-through estimator, none through the threshold."""
    model = copy.deepcopy(MODEL)
    view = mlp_views(model)[0]
    x = normal(1, 5, view.channels, seed=2)
    t = CATS(sparsity=0.8).thresholds(LEARNED)[0]
    with CATS(sparsity=0.8, mode="mask").attach(model, LEARNED):
        view.owner(x).square().sum().backward()
    found = {name: getattr(view, name).weight.grad.clone() for name in ("gate", "up", "down")}
    model.zero_grad()
    gate, up = F.silu(view.gate(x)), view.up(x)
    kept = (gate.abs() > t).float()
    view.down(gate * kept * up).square().sum().backward()
    for name, grad in found.items():
        torch.testing.assert_close(grad, getattr(view, name).weight.grad, atol=1e-5, rtol=1e-5)
    dead = kept[0].sum(0) == 0
    assert 0 < int(dead.sum()) < len(dead)
    for name in ("gate", "up"):
        assert int(found[name][dead].count_nonzero()) == 0
        assert bool((found[name][~dead].abs().sum(1) > 0).all())
    assert int(found["down"][:, dead].count_nonzero()) == 0


@pytest.mark.parametrize("lora", [LoRA(rank=4), None], ids=["lora", "full"])
def test_fine_tuning_recovers_under_the_mask(lora: LoRA | None, tmp_path: Any) -> None:
    model, method = tiny_model("llama"), CATS(sparsity=0.8)
    before = copy.deepcopy(model.state_dict())
    training, adapted = finetune(model, method, LEARNED, [ids(4, 33)] * 30, train_plan(), lora)
    assert training.final_loss < 0.6 * training.curve[0]["loss"]
    assert torch.equal(adapted.tensors["gate"], LEARNED.tensors["gate"]), "thresholds stay"
    assert adapted.facts["finetuned_steps"] == 30
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    if lora is None:
        assert len(changed) == len(before)
    else:
        assert {name.split(".")[-2] for name in changed} == set(lora.targets)
    assert model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    with pytest.raises(CalibrationError, match="another model"):
        method.attach(model, LEARNED)
    with method.attach(model, adapted):
        want = logits(model, ids())
        assert float(F.cross_entropy(want[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())) < training.curve[0]["loss"]
    # An ordinary checkpoint, to which the same calibration belongs.
    model.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    calibration = Calibration.load(adapted.save(tmp_path / "cats.safetensors"))
    with method.attach(loaded, calibration):
        torch.testing.assert_close(logits(loaded, ids()), want)


def test_adapters_start_at_the_model_merge_exactly_and_leave_no_trace() -> None:
    model = tiny_model("gpt2")
    before, dense = copy.deepcopy(model.state_dict()), logits(model, ids())
    adapters = LoRA(rank=3, dropout=0.5, targets=("c_fc", "c_attn")).attach(model)
    assert torch.equal(logits(model, ids()), dense), "B is zero at first"
    trained = list(adapters.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    with torch.no_grad():
        for p in trained:
            p.copy_(normal(*p.shape, seed=p.numel()) * 0.1)
    moved = logits(model, ids())
    assert not torch.allclose(moved, dense, atol=1e-2)
    adapters.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    adapters = LoRA(rank=3, alpha=6, targets=("c_fc",)).attach(model)
    low = model.transformer.h[0].mlp.c_fc.parametrizations.weight[0]
    with torch.no_grad():
        low.b.normal_(generator=torch.Generator().manual_seed(0))
    want = before["transformer.h.0.mlp.c_fc.weight"] + 2 * (low.b @ low.a).T
    model.train()
    adapters.merge()
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc.weight.detach(), want.detach())
    assert all(p.requires_grad for p in model.parameters())


def test_the_penalty_and_the_warm_up() -> None:
    a = torch.tensor([0.5, -1.1, 1.3, -3.0], requires_grad=True)
    loss = near_threshold(a, torch.tensor(1.0), "l2")
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.25 + 1.21) / 4)
    assert a.grad is not None
    assert torch.equal(a.grad, torch.tensor([0.25, -0.55, 0, 0]))
    assert [warmup_factor(step, 2) for step in range(5)] == [0.5, 0.5, 1, 1, 1]
    assert warmup_factor(0, 0) == 1
    shares = {}
    for penalty in (0.0, 50.0):
        model = tiny_model("llama")
        training, adapted = finetune(
            model,
            CATS(sparsity=0.5),
            LEARNED,
            [ids(4, 33)] * 20,
            train_plan(20),
            None,
            penalty=penalty,
            norm="l1",
            warmup=5,
        )
        with CATS(sparsity=0.5).attach(model, adapted) as handle:
            logits(model, ids())
            shares[penalty] = handle.report()["neurons_kept"]
        assert bool(training.curve[0]["penalty"]) is bool(penalty)
    assert shares[50.0] < shares[0.0] - 0.05, "fewer gates pass where small ones are pulled to zero"


def test_a_warm_up_masks_less_at_first() -> None:
    curves = {}
    for warmup in (0, 5):
        model = tiny_model("llama")
        plan = Plan(steps=1, lr=1e-9)
        curves[warmup] = finetune(model, CATS(sparsity=0.95), LEARNED, [ids(4, 33)], plan, None, warmup=warmup)[
            0
        ].curve[0]
    with CATS(sparsity=0.95, mode="mask").attach(MODEL, LEARNED) as handle:
        for half in (False, True):
            if half:
                policy: Any = handle.mlp.policy  # type: ignore[union-attr]
                policy.rules = [type(rule)(threshold=rule.threshold / 2) for rule in policy.rules]
            out = logits(MODEL, ids(4, 33)[:, :-1])
            loss = float(F.cross_entropy(out.flatten(0, 1), ids(4, 33)[:, 1:].flatten()))
            assert curves[5 if half else 0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert curves[0]["loss"] != pytest.approx(curves[5]["loss"], rel=1e-3)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InputError, match="cats: compat"):
        make("cats", compat="exact")
    with pytest.raises(ModelError, match="no MLP with known names"):
        CATS().calibrate(torch.nn.Linear(2, 2), ids())
    for bad in ({"rank": 0}, {"dropout": 1.0}, {"alpha": float("nan")}):
        with pytest.raises(InputError, match="LoRA needs"):
            LoRA(**bad)  # type: ignore[arg-type]
    model = tiny_model("llama")
    batches = [ids(2, 17)]
    with pytest.raises(ModelError, match=r"no layer called other: set LoRA\(targets"):
        finetune(model, CATS(), LEARNED, batches, Plan(steps=1), LoRA(targets=("other",)))
    with pytest.raises(ModelError, match="plain matrices"):
        LoRA(targets=("norm",)).attach(model)
    with pytest.raises(InputError, match="no thresholds of neurons"):
        finetune(model, make("top-k-neurons"), LEARNED, batches, Plan(steps=1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ended after 1 of 2"):
        finetune(model, CATS(), LEARNED, batches, Plan(steps=2), LoRA(rank=2))
    assert not model.training
    assert not any("forward" in module.__dict__ or hasattr(module, "parametrizations") for module in model.modules())
    with CATS().attach(model, LEARNED):
        assert bool(torch.isfinite(logits(model, ids())).all())
