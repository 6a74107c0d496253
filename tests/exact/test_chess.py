"""CHESS: channel thresholds against the sort of all scores and brute force, attention's masks by hand, stacks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.activations.cats import CATS
from gossamer.activations.chess import CHESS, MOMENTS, Moment, channel_thresholds, clamp_moment, importance, layer_bytes
from gossamer.activations.finetune import finetune
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, ModelError, RecipeError
from gossamer.hf import attention_projections, mlp_views, model_shape, watch
from gossamer.models import Plan, fingerprint, tiny_model
from gossamer.ops import NeuronWeights, channel_sparse_linear, sparse_mlp
from gossamer.patterns import exact_quantile
from gossamer.recipe import Recipe
from gossamer.registry import make

KINDS = st.sampled_from(MOMENTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 2, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def moment(up: Tensor, kind: Moment) -> Tensor:
    return (up.abs() if kind == "abs" else up.square()).mean(0)


def fit(gate: Tensor, m: Tensor, kind: Moment, share: float) -> tuple[float, Tensor]:
    """T and τ from the definition."""
    total = exact_quantile(importance(gate, m, kind), share)
    return total, channel_thresholds(torch.tensor(total), clamp_moment(m), kind)


# -- the formulas -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), KINDS, st.floats(0.5, 4))
@settings(max_examples=40, deadline=None)
def test_equal_moments_are_one_threshold(seed: int, kind: Moment, size: float) -> None:
    """Check 2: CHESS is then CATS with T/M, or √(T/M)."""
    gate, m = F.silu(normal(20, 6, seed=seed)), torch.full((6,), size)
    total, tau = fit(gate, m, kind, 0.5)
    assert torch.allclose(tau, tau[0].expand(6))
    assert float(tau[0]) == pytest.approx(total / size if kind == "abs" else (total / size) ** 0.5, rel=1e-5)
    assert float(tau[0]) == pytest.approx(exact_quantile(gate, 0.5), rel=1e-5)


@given(st.integers(0, 500), KINDS, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_pooled_quantile_drops_its_share(seed: int, kind: Moment, share: float) -> None:
    """Check 3: over all (token, channel) pairs, within 1/N; not for each channel."""
    gate, up = F.silu(normal(30, 7, seed=seed)).double().float(), normal(30, 7, seed=seed + 1) * torch.arange(1, 8)
    m = moment(up, kind)
    total = exact_quantile(importance(gate, m, kind), share)
    scores = importance(gate, m, kind)
    assert abs(float((scores <= total).double().mean()) - share) <= 1 / gate.numel()
    tau = channel_thresholds(torch.tensor(total), clamp_moment(m), kind)
    # The same set by τ, but for the entry at the threshold itself, which rounding of the division may tip.
    assert int(((gate.abs() > tau) != (scores > total)).sum()) <= 1


@given(st.integers(0, 500), KINDS, st.floats(0.1, 10), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_scale_covariance(seed: int, kind: Moment, c: float, i: int) -> None:
    """Check 4: a row of W_u times c divides τ_i by c when T is held; with a new T it ranks by |gate_i|·c·M_i."""
    gate, up = F.silu(normal(40, 6, seed=seed)), normal(40, 6, seed=seed + 1)
    scaled = up.clone()
    scaled[:, i] *= c
    total, tau = fit(gate, moment(up, kind), kind, 0.5)
    held = channel_thresholds(torch.tensor(total), clamp_moment(moment(scaled, kind)), kind)
    factor = torch.ones(6)
    factor[i] = c
    torch.testing.assert_close(held, tau / factor, rtol=1e-4, atol=1e-6)
    _, again = fit(gate, moment(scaled, kind), kind, 0.5)
    rank = (gate.abs() * factor * (moment(up, kind) if kind == "abs" else moment(up, kind).sqrt())).flatten()
    best = torch.zeros(240, dtype=torch.bool)
    best[rank.topk(120).indices] = True
    assert int(((gate.abs() > again).flatten() != best).sum()) <= 2


@pytest.mark.parametrize(("tokens", "channels"), [(3, 4), (2, 5), (4, 2)])
@pytest.mark.parametrize("drops", [1, 3, 5])
def test_no_other_mask_loses_less(tokens: int, channels: int, drops: int) -> None:
    """Check 5: among all masks with as many drops, "sq" minimises Σ gate²·M; by trying all."""
    gate, m = normal(tokens, channels, seed=1), normal(channels, seed=2).square() + 0.1
    size = tokens * channels
    _, tau = fit(gate, m, "sq", drops / size)
    dropped = gate.abs() <= tau * (1 + 1e-6)
    assert int(dropped.sum()) == drops
    cost = (gate.square() * m).flatten()
    best = min(float(cost[list(chosen)].sum()) for chosen in itertools.combinations(range(size), drops))
    assert float(cost[dropped.flatten()].sum()) == pytest.approx(best, rel=1e-6)


@given(st.integers(0, 500), st.floats(0.01, 3))
@settings(max_examples=30, deadline=None)
def test_sparse_products_equal_masked_dense_ones(seed: int, t: float) -> None:
    """Check 6: the sparse vector times a matrix, and the matrix times a vector with a sparse output."""
    x, w = normal(1, 12, seed=seed), normal(12, 9, seed=seed + 1)
    index = (x[0].abs() > t).nonzero()[:, 0]
    spvmm = x[:, index] @ w[index]
    counts = torch.zeros(2, dtype=torch.int64)
    kernel = channel_sparse_linear(x, w, torch.tensor(t), counts=counts)
    torch.testing.assert_close(spvmm, torch.where(x.abs() > t, x, 0) @ w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kernel, spvmm, atol=1e-5, rtol=1e-5)
    assert counts.tolist() == [len(index)] * 2
    gate, up, down = (normal(7, 12, seed=seed + i) for i in (2, 3, 4))
    tau = normal(7, seed=seed + 5).abs()
    v = F.silu(x @ gate.T)
    kept = (v[0].abs() > tau).nonzero()[:, 0]
    vmmsp = v[:, kept] * (x @ up[kept].T)
    masked = torch.where(v.abs() > tau, v * (x @ up.T), 0)
    torch.testing.assert_close(vmmsp, masked[:, kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        sparse_mlp(x, NeuronWeights(gate, up, down), threshold=tau), vmmsp @ down[kept], atol=1e-4, rtol=1e-4
    )


@given(st.integers(0, 500), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_both_moments_order_alike_where_one_follows_the_other(seed: int, c: float) -> None:
    """Check 8, with E[u²] = c·E|u|²: gate²·M is then a growing function of |gate|·M."""
    gate, m = F.silu(normal(15, 6, seed=seed)), normal(6, seed=seed + 1).abs() + 0.05
    a, b = importance(gate, m, "abs").flatten(), importance(gate, c * m.square(), "sq").flatten()
    torch.testing.assert_close(b, c * a.square(), rtol=1e-4, atol=1e-10)
    _, tau = fit(gate, m, "abs", 0.5)
    _, other = fit(gate, c * m.square(), "sq", 0.5)
    torch.testing.assert_close(tau, other, rtol=1e-4, atol=1e-6)


def test_dead_channels_are_finite() -> None:
    m = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    clamped = clamp_moment(m)
    assert float(clamped[0, 0]) == pytest.approx(1e-8)
    assert float(clamped[0, 1]) == 2
    for kind in MOMENTS:
        tau = channel_thresholds(torch.tensor([1.0, 0.0]), clamped, kind)
        assert bool(torch.isfinite(tau).all())
        assert float(tau[0, 0]) > 1e3
        assert tau[1].tolist() == [0, 0], "nothing to gain: all of a dead layer is kept"


# -- on a model -------------------------------------------------------------------------------------------------------

MODEL = tiny_model("llama")
TOKENS = ids(4, 64, seed=3)
LEARNED = CHESS().calibrate(MODEL, TOKENS)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens).logits
    return out


def taps(model: Any, tokens: Tensor, *names: str) -> dict[tuple[str, int], Tensor]:
    found: dict[tuple[str, int], list[Tensor]] = {}
    watchers: Any = {n: lambda layer, x, n=n: found.setdefault((n, layer), []).append(x.clone()) for n in names}
    watch(model, tokens, watchers)
    return {key: torch.cat(parts) for key, parts in found.items()}


def test_a_sparsity_of_zero_is_dense_bit_for_bit() -> None:
    """Check 1."""
    dense = logits(MODEL, ids())
    with CHESS(sparsity=0, parts="both", mode="mask").attach(MODEL, LEARNED):
        assert torch.equal(logits(MODEL, ids()), dense)


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_what_is_learned_is_the_definition(kind: Moment, share: float) -> None:
    """Both passes at once, from the activations themselves; check 3 on the whole method."""
    seen = taps(MODEL, TOKENS, "mlp.gate", "mlp.up")
    found = CHESS(sparsity=share, moment=kind).thresholds(LEARNED)
    assert found.shape == (2, 128)
    for layer in range(2):
        gate, up = seen["mlp.gate", layer], seen["mlp.up", layer]
        _, tau = fit(gate, moment(up.double(), kind).float(), kind, share)
        torch.testing.assert_close(found[layer], tau, rtol=2e-3, atol=0)
        dropped = (gate.abs() <= found[layer]).double()
        assert float(dropped.mean()) == pytest.approx(share, abs=2e-3)
        assert float(dropped.mean(0).std()) > 0.05, "channels are kept unequally on purpose"


def test_attention_is_masked_by_hand() -> None:
    """The query reads h where |h| > t_in, keys and values all of it; the output projection o where |o| > t_out."""
    method = CHESS(parts="attention", mode="mask")
    seen = taps(MODEL, TOKENS, "attention.input", "attention.output")
    t_in, t_out = (float(LEARNED.tensors[f"attention.{side}"][0, 500]) for side in ("input", "output"))
    for side, t in (("input", t_in), ("output", t_out)):
        assert t == pytest.approx(exact_quantile(seen[f"attention.{side}", 0], 0.5), rel=1e-3)
    query, output = attention_projections(MODEL)[0]
    key: Any = MODEL.model.layers[0].self_attn.k_proj
    x = seen["attention.input", 0][None, :9]
    o = seen["attention.output", 0][None, :9]
    with torch.no_grad():
        want = query(x * (x.abs() > t_in)), key(x), output(o * (o.abs() > t_out))
        with method.attach(MODEL, LEARNED):
            got = query(x), key(x), output(o)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[0], query(x), atol=1e-2)
    assert not torch.allclose(got[2], output(o), atol=1e-2)


def test_keys_and_values_see_the_whole_input() -> None:
    """Check 7: layer 0's cache is the dense model's, bit for bit; later layers' are not."""
    with torch.no_grad():
        dense = MODEL(ids()).past_key_values
        with CHESS(parts="both", mode="mask").attach(MODEL, LEARNED):
            sparse = MODEL(ids()).past_key_values
    for name in ("keys", "values"):
        assert torch.equal(getattr(sparse.layers[0], name), getattr(dense.layers[0], name))
        assert not torch.equal(getattr(sparse.layers[1], name), getattr(dense.layers[1], name))


def test_means_of_group_quantiles() -> None:
    method = CHESS(quantiles="mean", group=1)
    learned = method.calibrate(MODEL, TOKENS)
    seen = [taps(MODEL, TOKENS[i : i + 1], "mlp.gate", "mlp.up", "attention.input") for i in range(4)]
    m = torch.stack([moment(part["mlp.up", 0].double(), "sq") for part in seen]).mean(0).float()
    torch.testing.assert_close(learned.tensors["moment.sq"][0], m)
    totals = [exact_quantile(importance(part["mlp.gate", 0], m, "sq"), 0.5) for part in seen]
    inputs = [exact_quantile(part["attention.input", 0], 0.5) for part in seen]
    assert float(learned.tensors["scores.sq"][0, 500]) == pytest.approx(sum(totals) / 4, rel=2e-3)
    assert float(learned.tensors["attention.input"][0, 500]) == pytest.approx(sum(inputs) / 4, rel=2e-3)
    assert not torch.equal(learned.tensors["scores.sq"], LEARNED.tensors["scores.sq"])
    pooled = CHESS(quantiles="mean", group=4).calibrate(MODEL, TOKENS)
    assert all(torch.equal(value, LEARNED.tensors[name]) for name, value in pooled.tensors.items()), "one group is all"
    for other, calibration in ((CHESS(), learned), (method, LEARNED)):
        with pytest.raises(CalibrationError, match="calibrated with quantiles="):
            other.attach(MODEL, calibration)


def test_chess_is_nearer_to_dense_than_cats_where_up_is_unequal() -> None:
    """What it is for: at equal sparsity of one MLP, with the rows of up scaled unequally."""
    model = copy.deepcopy(MODEL)
    view: Any = mlp_views(model)[0]
    scales = torch.logspace(-1, 1, 128)
    with torch.no_grad():
        view.up.weight *= scales[torch.randperm(128, generator=torch.Generator().manual_seed(0))][:, None]
        x = taps(model, ids(8, 64, seed=9), "mlp.input")["mlp.input", 0][None]
        dense, errors = view.owner(x), {}
        for method in (CATS(), CHESS(), CHESS(moment="abs")):
            with method.attach(model, method.calibrate(model, TOKENS)) as handle:
                errors[str(method)] = float((view.owner(x) - dense).norm())
                assert handle.mlp is not None
                assert handle.mlp.meters[0].share(False) == pytest.approx(0.5, abs=0.03)
    cats, sq, absolute = errors.values()
    assert sq < 0.6 * cats
    assert absolute < 0.6 * cats


def test_bytes_of_a_layer() -> None:
    method, shape = CHESS(parts="both", sparsity=0.5), model_shape(MODEL)
    with method.attach(MODEL, LEARNED) as handle, torch.no_grad():
        cache = MODEL(ids(1)).past_key_values
        MODEL(ids(1, 1), past_key_values=cache)
        report = handle.report()
    width, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = (64 * width, width * 64, 2 * 64 * narrow)
    want = sum(
        layer_bytes((64, 128), sizes, (n, q, o))
        for n, q, o in zip(
            report["neurons_kept_by_layer"],
            report["channels_kept_by_layer"][::2],
            report["channels_kept_by_layer"][1::2],
            strict=True,
        )
    )
    dense_kv = 2 * sizes[2] * 4
    assert report["mlp_bytes_read"] + report["channel_bytes_read"] + dense_kv == pytest.approx(want)
    assert report["channel_bytes_dense"] == 2 * 4 * (sizes[0] + sizes[1])
    assert layer_bytes((64, 128), sizes, element_size=1) == 3 * 64 * 128 + sum(sizes)


def test_one_calibration_serves_all_parts_moments_and_sparsities() -> None:
    for settings_ in ({"parts": "mlp"}, {"parts": "both", "moment": "abs", "sparsity": 0.77}, {"parts": "attention"}):
        with CHESS(**settings_).attach(MODEL, LEARNED) as handle:
            assert bool(torch.isfinite(logits(MODEL, ids())).all())
            assert handle.report()["chess_target_sparsity"] == settings_.get("sparsity", 0.5)


# -- stacks -----------------------------------------------------------------------------------------------------------


def stacked(model: Any, recipe: Recipe, steps: int = 5) -> tuple[Tensor, dict[str, Any]]:
    """Logits of single steps after a prompt, and the report."""
    with recipe.attach(model) as handle, torch.no_grad():
        cache = model(ids(1, 40), use_cache=True).past_key_values
        tokens = ids(1, steps, seed=40).split(1, dim=1)
        outs = [model(token, past_key_values=cache, use_cache=True).logits for token in tokens]
        return torch.cat(outs, 1), handle.report()


def test_cats_on_the_mlps_and_chess_on_attention() -> None:
    cats_learned = CATS().calibrate(MODEL, TOKENS)
    recipe = Recipe.of((CATS(mode="mask"), cats_learned), (CHESS(parts="attention", mode="mask"), LEARNED))
    both, report = stacked(MODEL, recipe)
    assert 0.3 < report["neurons_kept"] < 0.7
    assert 0.3 < report["channels_kept"] < 0.7
    assert report["cats_target_sparsity"] == report["chess_target_sparsity"] == 0.5
    gathered, _ = stacked(
        MODEL, Recipe.of((CATS(), cats_learned), (CHESS(parts="attention"), LEARNED), make("native-linear"))
    )
    torch.testing.assert_close(gathered, both, atol=1e-4, rtol=1e-4)
    alone = [
        stacked(MODEL, Recipe.of(part))[0] for part in ((CATS(), cats_learned), (CHESS(parts="attention"), LEARNED))
    ]
    assert not any(torch.allclose(both, one, atol=1e-2) for one in alone)
    text = recipe.to_yaml()
    assert "parts: attention" in text
    for clash in (CHESS(), CHESS(parts="both"), make("top-k-neurons")):
        with pytest.raises(RecipeError, match="both take the slot activations: choose one"):
            Recipe.of((CATS(), cats_learned), (clash, LEARNED))
    with pytest.raises(RecipeError, match=r"both take the slot activations\.attention"):
        Recipe.of((CHESS(parts="both"), LEARNED), (CHESS(parts="attention"), LEARNED))


@pytest.mark.parametrize("slug", ["cats", "chess"])
def test_an_activation_method_stacks_with_attention_and_fast_products(slug: str) -> None:
    made: Any = make(slug, **({"parts": "both"} if slug == "chess" else {}))
    learned = made.calibrate(MODEL, TOKENS)
    attention: Any = make("double-sparsity", tokens=8, dense_layers=())
    labels = attention.calibrate(MODEL, TOKENS)
    before = copy.deepcopy(MODEL.state_dict())
    dense, _ = stacked(MODEL, Recipe.of(make("dense")))
    whole: Any = make("double-sparsity", tokens=1.0, dense_layers=())
    nothing, _ = stacked(
        MODEL,
        Recipe.of((made.model_copy(update={"sparsity": 0.0}), learned), (whole, labels), make("native-linear")),
    )
    torch.testing.assert_close(nothing, dense, atol=1e-3, rtol=1e-3)
    got, report = stacked(MODEL, Recipe.of((made, learned), (attention, labels), make("native-linear")))
    assert bool(torch.isfinite(got).all())
    assert 0.3 < report["neurons_kept"] < 0.7
    assert report["rows_kept"] < 0.5
    assert report["native_linear_layers"] == (15 if slug == "cats" else 11), "masked projections keep their own kernel"
    assert report["mlp_bytes_read"] < report["mlp_bytes_dense"]
    again, _ = stacked(MODEL, Recipe.of(make("dense")))
    assert torch.equal(again, dense)
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())
    assert not any("forward" in module.__dict__ for module in MODEL.modules())


# -- families and bad input -------------------------------------------------------------------------------------------


def test_families_that_lack_a_part() -> None:
    """GPT-2 has neither gates nor a query matrix of its own; what a family has is learned and served."""
    plain = tiny_model("gpt2")
    with pytest.raises(ModelError, match="chess needs gated MLPs, and GPT2LMHeadModel has plain ones: use cats"):
        CHESS().calibrate(plain, TOKENS)
    with pytest.raises(ModelError, match="no separate query and output"):
        CHESS(parts="attention").calibrate(plain, TOKENS)
    import transformers

    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    fused = transformers.AutoModelForCausalLM.from_config(config).eval()
    learned = CHESS().calibrate(fused, TOKENS)
    with CHESS(sparsity=0.7).attach(fused, learned) as handle:
        logits(fused, ids())
        assert 0.2 < handle.report()["neurons_kept"] < 0.4
    with pytest.raises(CalibrationError, match=r"has no attention\.input"):
        CHESS(parts="attention").attach(fused, learned)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    opt = transformers.AutoModelForCausalLM.from_config(config).eval()
    method = CHESS(parts="attention")
    dense = logits(opt, ids())
    with method.attach(opt, method.calibrate(opt, TOKENS)):
        assert not torch.allclose(logits(opt, ids()), dense, atol=1e-4)


def test_calibrations_that_do_not_fit() -> None:
    tensors = {name: value for name, value in LEARNED.tensors.items() if name.startswith("attention")}
    without = Calibration("chess", fingerprint(MODEL), tensors, LEARNED.facts)
    with pytest.raises(CalibrationError, match="has no scores"):
        CHESS().attach(MODEL, without)
    with pytest.raises(CalibrationError, match="not finite"):
        Calibration("chess", "x", {"moment.sq": torch.tensor([float("inf")])})


def test_fine_tuning_under_channel_thresholds() -> None:
    model = tiny_model("llama")
    method = CHESS(sparsity=0.8)
    training, adapted = finetune(
        model, method, LEARNED, [ids(4, 33)] * 20, Plan(steps=20, lr=1e-2, warmup=2), None, penalty=0.1, warmup=3
    )
    assert training.final_loss < 0.6 * training.curve[0]["loss"]
    with method.attach(model, adapted) as handle:
        logits(model, ids())
        assert handle.report()["neurons_kept"] < 0.5
