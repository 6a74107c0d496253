"""Sparsing Law by its card: the rules, the search of one layer's threshold, and PPL-p%."""

import functools
import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.activations import sparsing_law_search as search
from gossamer.activations.sparsing_law import SparsingLaw, apply_neuron_thresholds, calibration_of
from gossamer.activations.sparsing_law_cett import (
    LayerSearch,
    Recording,
    cett,
    cett_rule,
    contributions,
    fat_rule,
    neuron_thresholds,
    token_errors,
    top_k_rule,
    zeros_rule,
)
from gossamer.activations.sparsing_law_compare import compare_rules
from gossamer.activations.sparsing_law_search import (
    Probe,
    bisect_knob,
    find_at_ppl,
    ppl_p_checkpoints,
    ppl_p_sparsity,
)
from gossamer.calibration import Calibration
from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import channels, mlp_views
from gossamer.models import tiny_model
from gossamer.ops import runs_natively
from gossamer.registry import make

KINDS = ["silu", "relu", "gpt2", "gemma"]


@functools.cache
def model_of(kind):
    small = {"hidden_size": 32, "intermediate_size": 48}
    if kind in ("silu", "relu"):
        return tiny_model("llama", hidden_act=kind, **small)
    return tiny_model(kind, **small)


@functools.cache
def ids_of(kind):
    """Text that the model itself wrote: on it the dense model is at its best, so that any error costs perplexity."""
    torch.manual_seed(0)
    start = torch.randint(1, 256, (48, 1))
    return model_of(kind).generate(start, max_new_tokens=47, do_sample=True, top_k=0, attention_mask=start > 0)


@functools.cache
def recording_of(kind):
    return Recording(model_of(kind), list(ids_of(kind)), candidates=4096)


@functools.cache
def probe_of(kind):
    return Probe(model_of(kind), list(ids_of(kind)), candidates=65_536)


def layer(tokens=20, neurons=16, channels=8, seed=0, relu=False):
    g = torch.Generator().manual_seed(seed)
    product, down = torch.randn(tokens, neurons, generator=g), torch.randn(neurons, channels, generator=g)
    return (product.relu() if relu else product), down


# -- the four rules ---------------------------------------------------------------------------------------------------


def test_each_rule_drops_what_it_says():
    gate = torch.tensor([[0.0, -0.3, 0.5, 0.2], [0.1, 0.0, -0.1, 0.0]])
    assert zeros_rule().mask(gate).tolist() == [[False, True, True, True], [True, False, True, False]]
    assert top_k_rule(2).mask(gate).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert fat_rule(0.3).mask(gate).tolist() == [[False, True, True, False], [False] * 4]
    assert torch.equal(fat_rule(0.0).mask(gate), zeros_rule().mask(gate))
    norms = torch.tensor([1.0, 1.0, 0.1, 10.0])
    assert cett_rule(0.3, norms).mask(gate).tolist() == [[False, False, False, True], [False] * 4]
    assert [rule.on for rule in (zeros_rule(), top_k_rule(1), fat_rule(0.1))] == ["gate"] * 3
    assert cett_rule(0.3, norms).on == "product"


def test_top_k_is_per_token():
    """Every token keeps k, also one whose gates are all small; the released code would keep none of it."""
    gate = torch.tensor([[10.0, 9.0, 8.0], [0.1, 0.3, 0.2]])
    assert top_k_rule(1).mask(gate).sum(-1).tolist() == [1, 1]


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_the_length_of_a_contribution_needs_no_vector(seed, scale):
    """Check 3."""
    product, down = layer(seed=seed)
    down = down * scale
    explicit = torch.linalg.vector_norm(product[:, :, None].double() * down.double(), dim=-1)
    got = contributions(product, torch.linalg.vector_norm(down, dim=-1)).double()
    assert float(((got - explicit).abs() / explicit.clamp_min(1e-30)).max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_neurons_is_the_mlp(kind):
    """``Σ n_i`` is the module's output, less its bias: what CETT divides by."""
    view = mlp_views(model_of(kind))[1]
    x = torch.randn(5, view.channels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        product = view.hidden(x)[1]
        bias = getattr(view.down, "bias", None)
        want = view.out(product) - (0 if bias is None else bias)
    down = recording_of(kind).layers[1].down
    torch.testing.assert_close(product @ down, want, atol=1e-5, rtol=1e-5)
    assert torch.allclose(recording_of(kind).layers[1].out_norms, view.down_norms)


def test_thresholds_of_neurons_that_write_nothing():
    assert neuron_thresholds(0.0, torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]
    found = neuron_thresholds(1.0, torch.tensor([0.0, 2.0, 1e-45]))
    assert bool(torch.isfinite(found).all())
    assert found[1] == 0.5
    assert cett_rule(1.0, torch.tensor([0.0])).mask(torch.tensor([[5.0]])).tolist() == [[False]]


# -- CETT (checks 1, 2, 4, 6, 7, 9) -----------------------------------------------------------------------------------


def test_cett_by_hand():
    """Two tokens, orthogonal outputs: a mean of ratios, not a ratio of sums."""
    product = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    dropped = torch.tensor([[True, False], [False, True]])
    assert cett(product, dropped, torch.eye(2)) == pytest.approx((3 / 5 + 40 / 50) / 2)
    silent = torch.cat([product, torch.zeros(1, 2)])
    assert cett(silent, torch.cat([dropped, dropped[:1]]), torch.eye(2)) == pytest.approx(0.7)
    assert cett(torch.zeros(2, 2), dropped, torch.eye(2)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_cett_rises_with_epsilon_to_one(kind):
    """Check 2: on a model's own activations, and exactly 1 where all is dropped."""
    for part in recording_of(kind).layers:
        top = float(contributions(part.product, part.out_norms).max()) * 1.001
        values = [cett(part.product, part.dropped(float(e)), part.down, part.whole) for e in torch.linspace(0, top, 25)]
        assert values[0] == 0
        assert values == sorted(values)
        assert values[-1] == 1.0


@given(seed=st.integers(0, 10_000), epsilons=st.lists(st.floats(0, 5), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_cett_never_falls_where_outputs_are_orthogonal(seed, epsilons):
    """Check 2 without exception: nothing cancels."""
    product, _ = layer(neurons=8, seed=seed)
    down = torch.diag(torch.rand(8, generator=torch.Generator().manual_seed(seed)) + 0.1)
    norms = torch.linalg.vector_norm(down, dim=-1)
    values = [cett(product, ~cett_rule(e, norms).mask(product), down) for e in sorted(epsilons)]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(values))


@given(seed=st.integers(0, 10_000), target=st.floats(0.0, 1.0), relu=st.booleans(), cold=st.booleans())
@settings(max_examples=80, deadline=None)
def test_the_threshold_is_just_below_the_crossing(seed, target, relu, cold):
    """Check 4, also where a search begins with what others left, and where few neurons make CETT fall at places."""
    product, down = layer(neurons=6, seed=seed, relu=relu)
    part = LayerSearch(product, down, count=513)
    if not cold:
        for other in (0.9, 0.01, 0.4, 0.1):
            part.find(other)
    index = part.find(target)
    fresh = LayerSearch(product, down, count=513)
    if index >= 0:
        assert fresh.cett_at(index) <= target
        assert fresh.epsilon(index) == fresh.candidates[index]
    else:
        assert fresh.epsilon(index) == 0.0
    if index + 1 < 513:
        assert fresh.cett_at(index + 1) > target
    assert fresh.candidates == sorted(fresh.candidates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [0.02, 0.1, 0.4])
def test_the_thresholds_of_a_model_hold_the_error(kind, c):
    """Check 4 on real activations, computed anew from the returned ε."""
    recording = recording_of(kind)
    indices = recording.indices(c)
    for part, index, epsilon in zip(recording.layers, indices, recording.epsilons(indices), strict=True):
        assert cett(part.product, part.dropped(epsilon), part.down) <= c + 1e-7
        assert cett(part.product, part.dropped(part.candidates[index + 1]), part.down) > c - 1e-7


def test_candidates_end_at_the_quantile():
    product, down = layer(500, 40, seed=3)
    part = LayerSearch(product, down, count=100)
    norms = contributions(product, part.out_norms)
    assert part.candidates[0] == pytest.approx(float(norms.min()))
    assert part.candidates[-1] == pytest.approx(float(norms.flatten().quantile(0.99)))
    assert part.find(2.0) == 99
    assert float(part.dropped(part.epsilon(99)).float().mean()) == pytest.approx(0.99, abs=1e-3)


def test_a_search_remembers():
    product, down = layer(50, 30)
    part = LayerSearch(product, down, count=65_536)
    first = part.find(0.3)
    spent = len(part.known)
    assert spent <= 13
    assert part.find(0.3) == first
    assert len(part.known) == spent
    part.find(0.3001)
    assert len(part.known) <= spent + 9


@given(seed=st.integers(0, 1000), targets=st.lists(st.floats(0.001, 0.99), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_a_search_ends_where_bisection_ends(seed, targets):
    """Where nothing cancels the crossing is one place, whatever was searched before."""
    product, _ = layer(seed=seed)
    part = LayerSearch(product, torch.eye(16), count=1025)
    for target in targets:
        low, high = -1, 1025
        while high - low > 1:
            middle = (low + high) // 2
            errs = cett(product, part.dropped(part.candidates[middle]), part.down)
            low, high = (low, middle) if errs > target else (middle, high)
        assert part.find(target) == low


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_masks_nothing(kind):
    """Check 1: at c = 0 only exact zeros go, so nothing of the output changes."""
    probe = probe_of(kind)
    recording = probe.recording
    epsilons = recording.epsilons(recording.indices(0.0))
    assert epsilons == [0.0] * len(recording.layers)
    for part in recording.layers:
        assert torch.equal(part.dropped(0.0), part.product == 0)
    run = probe.at("cett", 0.0)
    assert run.ppl_ratio == pytest.approx(1.0, abs=1e-6)
    assert run.ratio == 1.0 if kind != "relu" else 0.2 < run.ratio < 0.9


def test_a_first_candidate_that_errs_too_much_is_no_threshold():
    """The released code would read index -1, the largest threshold."""
    part = LayerSearch(torch.full((3, 2), 2.0), torch.eye(2), count=16)
    assert part.find(0.5) == -1
    assert part.epsilon(-1) == 0.0
    assert not part.dropped(0.0).any()


@given(seed=st.integers(0, 10_000), c=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_zeros_are_always_dropped(seed, c):
    """Check 6."""
    product, down = layer(seed=seed, relu=True)
    part = LayerSearch(product, down, count=257)
    assert bool(part.dropped(part.epsilon(part.find(c)))[product == 0].all())


@given(seed=st.integers(0, 10_000), c=st.floats(0.01, 0.9), power=st.integers(-6, 6))
@settings(max_examples=40, deadline=None)
def test_scale_between_the_matrices_is_nothing(seed, c, power):
    """Check 7: W_out[:, i]·k and W_in[i, :]/k leave D as it is (k a power of two, so that no rounding changes)."""
    product, down = layer(seed=seed)
    k = 2.0 ** (torch.arange(16) % 3 * power)
    one, two = LayerSearch(product, down, 513), LayerSearch(product / k, down * k[:, None], 513)
    index = one.find(c)
    assert two.find(c) == index
    assert torch.equal(one.dropped(one.epsilon(index)), two.dropped(two.epsilon(index)))


@given(seed=st.integers(0, 10_000), epsilon=st.floats(0, 4))
@settings(max_examples=40, deadline=None)
def test_errors_keep_the_triangle_inequality(seed, epsilon):
    """Check 9, token by token."""
    product, down = layer(seed=seed)
    part = LayerSearch(product, down, 16)
    dropped = part.dropped(epsilon)
    bound = (contributions(product, part.out_norms) * dropped).sum(-1)
    assert bool((token_errors(product, dropped, down) <= bound * (1 + 1e-5)).all())


def test_a_recording_holds_the_dense_activations():
    """The searches see what the MLPs compute, and the layers' thresholds do not depend on each other."""
    model, ids = model_of("silu"), ids_of("silu")
    recording = recording_of("silu")
    seen = []
    hook = mlp_views(model)[1].down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    torch.testing.assert_close(recording.layers[1].product, seen[0].flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert recording.tokens == ids.numel()
    ratio = recording.activation_ratio(recording.epsilons(recording.indices(0.2)))
    assert ratio.shape == (2, ids.numel())
    assert 0 < float(ratio.mean()) < 1


# -- PPL-p% (check 5) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_price_is_met_and_a_higher_one_buys_more(kind):
    """Check 5."""
    probe, ratios, cs = probe_of(kind), [], []
    for p in (0.01, 0.03, 0.1):
        c = find_at_ppl([probe], p, tolerance=1e-5)
        found = probe.measure(c)
        assert abs(found.run.ppl_ratio - (1 + p)) < 1e-3
        ratios.append(found.run.ratio)
        cs.append(c)
    assert cs == sorted(cs)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1]


def test_the_interface():
    model, ids = model_of("silu"), ids_of("silu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ppl_p_sparsity(model, ids, p=0.05, tolerance=1e-5)
    assert 0 < found.cett < 1
    assert len(found.layer_eps) == 2
    assert found.activation_ratio.shape == (2, ids.numel())
    assert float(found.activation_ratio.mean()) == pytest.approx(found.run.ratio, abs=0.05)
    with torch.no_grad():
        dense = model(ids).logits
        with apply_neuron_thresholds(model, found) as handle:
            sparse = model(ids).logits
            assert handle.report()["neurons_kept_by_layer"] == pytest.approx(found.run.kept, abs=1e-4)

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    assert math.exp(float(loss(dense))) == pytest.approx(found.ppl, rel=1e-4)
    assert math.exp(float(loss(sparse) - loss(dense))) == pytest.approx(found.run.ppl_ratio, abs=2e-4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_dropped(side):
    model, ids = model_of("silu"), ids_of("silu")[:4, :20]
    pad = torch.zeros(4, 7, dtype=ids.dtype)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.cat([pad, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pad], 1)
    want = ppl_p_sparsity(model, ids, 0.1, tolerance=1e-3, candidates=512)
    got = ppl_p_sparsity(model, padded, 0.1, mask=mask, tolerance=1e-3, candidates=512)
    assert got.layer_eps == want.layer_eps
    assert got.run == want.run
    assert torch.equal(got.activation_ratio, want.activation_ratio)


def test_checkpoints_share_one_c():
    """The mean of their ratios is 1 + p, and c lies between what each alone would get."""
    rows = [ids_of("silu"), ids_of("relu")]
    probes = [Probe(model_of(kind), list(row), 4096) for kind, row in zip(("silu", "relu"), rows, strict=True)]
    c = find_at_ppl(probes, 0.05, tolerance=1e-5)
    mean = sum(probe.at("cett", c).ppl_ratio for probe in probes) / 2
    assert mean == pytest.approx(1.05, abs=1e-3)
    alone = [find_at_ppl([probe], 0.05, tolerance=1e-5) for probe in probes]
    assert min(alone) - 1e-5 <= c <= max(alone) + 1e-5


def test_a_training_uses_the_c_of_its_end():
    models, ids = [model_of(kind) for kind in ("gemma", "relu", "silu")], ids_of("silu")[:8]
    settings_ = {"p": 0.05, "tolerance": 1e-4, "candidates": 512}
    found = ppl_p_checkpoints(models, ids, tuned=1, **settings_)
    alone = ppl_p_sparsity(models[-1], ids, **settings_)
    assert [part.cett for part in found] == [alone.cett] * 3
    assert found[-1].run == alone.run
    assert len({part.run.ratio for part in found}) == 3
    both = ppl_p_checkpoints(models[1:], ids, tuned=2, **settings_)
    assert sum(part.run.ppl_ratio for part in both) / 2 == pytest.approx(1.05, abs=3e-3)
    for tuned in (0, 4):
        with pytest.raises(InputError, match="tuned on 1 to 3"):
            ppl_p_checkpoints(models, ids, tuned=tuned)


def test_runs_that_differ_in_nothing_are_done_once(monkeypatch):
    probe = Probe(model_of("silu"), list(ids_of("silu")[:2]), 64)
    spent = []
    real = Probe.run
    monkeypatch.setattr(Probe, "run", lambda self, rules: spent.append(1) or real(self, rules))
    find_at_ppl([probe], 0.05, tolerance=1e-6)
    assert 1 < len(spent) < 15
    find_at_ppl([probe], 0.05, "top-k", tolerance=1e-6)
    assert len(spent) < 30


def test_rules_at_equal_perplexity_and_at_equal_ratio():
    probe = probe_of("silu")
    equal = compare_rules(probe, p=0.1)
    assert list(equal) == ["zeros", "top-k", "fat", "cett"]
    assert equal["zeros"].ppl_ratio == pytest.approx(1.0)
    assert equal["zeros"].ratio == 1.0
    for rule in ("fat", "cett"):
        assert equal[rule].ppl_ratio == pytest.approx(1.1, abs=5e-3)
    assert equal["cett"].ratio < equal["fat"].ratio
    assert equal["cett"].ratio < equal["top-k"].ratio
    same = compare_rules(probe, ratio=0.5)
    assert same["top-k"].ratio == 0.5
    for rule in ("fat", "cett"):
        assert same[rule].ratio == pytest.approx(0.5, abs=2e-3)
    assert same["cett"].ppl_ratio < min(same["top-k"].ppl_ratio, same["fat"].ppl_ratio)


def test_zeros_of_a_relu_cost_nothing():
    found = compare_rules(probe_of("relu"), p=0.05, tolerance=1e-2)["zeros"]
    assert found.ppl_ratio == pytest.approx(1.0, abs=1e-6)
    recording = probe_of("relu").recording
    share = recording.nonzero / (recording.tokens * 48)
    assert found.ratio_by_layer == pytest.approx(share.tolist(), abs=1e-3)
    assert found.ratio < 0.9


def test_fat_uses_one_epsilon_for_all_layers():
    probe = probe_of("silu")
    _, make_rules = probe.setting("fat", 0.4)
    thresholds = {float(rule.threshold) for rule in make_rules()}
    assert len(thresholds) == 1
    gates = torch.cat([mlp.hidden(x)[0].flatten() for mlp, x in inputs_of("silu")]).abs()
    assert float((gates <= thresholds.pop()).float().mean()) == pytest.approx(0.4, abs=2e-3)


def inputs_of(kind):
    model, caught = model_of(kind), []
    views = mlp_views(model)
    hooks = [v.owner.register_forward_pre_hook(lambda _, args, v=v: caught.append((v, args[0]))) for v in views]
    with torch.no_grad():
        model(ids_of(kind))
    for hook in hooks:
        hook.remove()
    return caught


# -- the method -------------------------------------------------------------------------------------------------------


@functools.cache
def learned(kind="silu"):
    return SparsingLaw(p=0.05, tolerance=1e-4, candidates=4096).calibrate(model_of(kind), ids_of(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["mask", "auto"])
def test_attach_drops_below_the_thresholds(kind, mode, tmp_path):
    model, ids = model_of(kind), ids_of(kind)
    calibration = Calibration.load(learned(kind).save(tmp_path / "c.safetensors"))
    assert calibration.facts["ppl_ratio"] == pytest.approx(1.05, abs=2e-3)
    assert 0 < calibration.facts["activation_ratio"] < 1
    view = mlp_views(model)[0]
    theta, epsilon = calibration.tensors["threshold.0"], calibration.tensors["epsilon"]
    torch.testing.assert_close(theta, epsilon[0] / view.down_norms)
    with torch.no_grad():
        dense = model(ids).logits
        x = torch.randn(1, 3, view.channels, generator=torch.Generator().manual_seed(1))
        product = view.hidden(x)[1]
        want = view.out(torch.where(product.abs() > theta, product, 0))
        with SparsingLaw(p=0.05, mode=mode).attach(model, calibration) as handle:
            torch.testing.assert_close(view.owner(x), want, atol=1e-5, rtol=1e-5)
            sparse = model(ids).logits
            assert 0 < handle.report()["neurons_kept"] < 1
        assert not torch.equal(sparse, dense)
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("kind", ["silu", "gpt2"])
def test_decode_steps_read_only_what_is_kept_of_the_output_matrix(kind, monkeypatch):
    """One operator call for each MLP and step, with the columns of dropped neurons unread."""
    model, ids = model_of(kind), ids_of(kind)[:2]
    calls, real = [], channels.run_native
    monkeypatch.setattr(channels, "run_native", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    results, kept = {}, {}
    with torch.no_grad():
        for mode in ("mask", "auto"):
            with SparsingLaw(mode=mode).attach(model, learned(kind)) as handle:
                cache = model(ids[:, :-1], use_cache=True).past_key_values
                results[mode] = model(ids[:, -1:], past_key_values=cache).logits
                report = handle.report()
                kept[mode] = report["neurons_kept_by_layer"]
    native = runs_natively(torch.zeros(1))  # without the kernels decode steps are masked
    assert calls == [(2, 48)] * len(mlp_views(model)) * native
    torch.testing.assert_close(results["auto"], results["mask"], atol=1e-4, rtol=1e-4)
    assert kept["auto"] == kept["mask"]
    matrices = 3 if mlp_views(model)[0].gated else 2
    dense = report["mlp_bytes_dense"]
    assert dense * (1 - 1 / matrices) < report["mlp_bytes_read"] < dense


def test_a_model_in_bfloat16():
    """Its loss is coarse, so the price is met roughly; the thresholds hold in its own dtype."""
    torch.manual_seed(0)
    model = tiny_model("llama").bfloat16()
    ids = model.generate(torch.arange(1, 17)[:, None], max_new_tokens=31, do_sample=True, top_k=0)
    calibration = SparsingLaw(p=0.1, tolerance=1e-3, candidates=512).calibrate(model, ids)
    assert calibration.facts["ppl_ratio"] == pytest.approx(1.1, abs=0.03)
    with torch.no_grad(), SparsingLaw().attach(model, calibration) as handle:
        assert bool(model(ids).logits.isfinite().all())
        assert handle.report()["neurons_kept"] == pytest.approx(calibration.facts["activation_ratio"], abs=0.01)


def test_a_calibration_uses_so_many_tokens_at_most():
    few = SparsingLaw(p=0.1, tolerance=0.01, candidates=64, max_tokens=100)
    assert few.calibrate(model_of("silu"), ids_of("silu")).facts["tokens"] == 96
    few = SparsingLaw(p=0.1, tolerance=0.01, candidates=64, max_tokens=20)
    assert few.calibrate(model_of("silu"), ids_of("silu")).facts["tokens"] == 20


def test_progress_is_told():
    said = []
    SparsingLaw(tolerance=0.1, candidates=8).calibrate(
        model_of("silu"), ids_of("silu")[:2], lambda what, done, total: said.append((what, done <= total))
    )
    assert {what for what, _ in said} == {"reading the dense model", "cett: the sparsity that costs 1.0%"}
    assert all(fine for _, fine in said)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"p": 0.0}, "p"),
        ({"p": -0.01}, "p"),
        ({"p": math.nan}, "p"),
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": 1}, "tolerance"),
        ({"candidates": 1}, "candidates"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"mode": "fast"}, "mode"),
        ({"int8": True}, "int8"),
    ],
)
def test_bad_settings_are_one_line(change, name):
    with pytest.raises(InputError, match=name) as caught:
        make("sparsing-law", **change)
    assert "\n" not in str(caught.value)


def test_bad_tokens_are_refused():
    model, ids = model_of("silu"), ids_of("silu")
    for bad, mask, message in (
        (ids[0], None, "integer matrix"),
        (ids.float(), None, "integer matrix"),
        (ids[:0], None, "integer matrix"),
        (ids[:, :1], None, "at least two"),
        (ids, ids[:, :3], "mask must have"),
        (ids, torch.zeros_like(ids), "at least two"),
    ):
        with pytest.raises(InputError, match=message):
            ppl_p_sparsity(model, bad, mask=mask)
    with pytest.raises(InputError, match="integer matrix"):
        SparsingLaw().calibrate(model, ids.float())
    for p in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="p above 0"):
            find_at_ppl([probe_of("silu")], p)
    with pytest.raises(InputError, match="at least one model"):
        find_at_ppl([], 0.01)
    for ratio in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="share of neurons"):
            compare_rules(probe_of("silu"), ratio=ratio)
    with pytest.raises(InputError, match="needs validation tokens"):
        compare_rules(model)
    with pytest.raises(InputError, match="tolerance"):
        bisect_knob(lambda x: True, 0.0)
    with pytest.raises(InputError, match="two candidates"):
        LayerSearch(*layer(), count=1)


def test_models_that_cannot_be_measured():
    ids = ids_of("silu")
    with pytest.raises(CalibrationError, match="eval"):
        ppl_p_sparsity(tiny_model("llama").train(), ids)
    for headless in (tiny_model("llama").model, torch.nn.Linear(2, 2)):
        with pytest.raises(ModelError, match="no causal language model"):
            ppl_p_sparsity(headless, ids)
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ModelError, match="no causal language model"):
        ppl_p_sparsity(transformers.T5ForConditionalGeneration(config).eval(), ids)
    bare = tiny_model("llama")
    for block in bare.model.layers:
        block.mlp = torch.nn.Identity()
    with pytest.raises(ModelError, match="no MLP"):
        ppl_p_sparsity(bare, ids)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
def test_weights_that_are_not_finite(value, name):
    broken = tiny_model("llama")
    getattr(broken.model.layers[1].mlp, name).weight.data[0, 0] = value
    with pytest.raises(CalibrationError, match="not finite"):
        ppl_p_sparsity(broken, ids_of("silu"))
    assert not any("forward" in module.__dict__ for module in broken.modules())


def test_a_loss_that_is_not_finite():
    broken = tiny_model("llama")
    broken.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(CalibrationError, match="loss is not finite"):
        ppl_p_sparsity(broken, ids_of("silu"))


def test_calibrations_that_do_not_fit():
    method, good, model = SparsingLaw(), learned(), model_of("silu")
    short = {**good.tensors, "threshold.1": torch.zeros(3)}
    negative = {**good.tensors, "threshold.1": -torch.ones(48)}
    missing = {name: t for name, t in good.tensors.items() if name != "threshold.0"}
    for calibration, message in (
        (None, "gossamer calibrate sparsing-law"),
        (learned("gpt2"), "another model"),
        (Calibration("cats", good.fingerprint, good.tensors), "made for cats"),
        (Calibration(good.method, good.fingerprint, short), "no 48 thresholds for MLP 1"),
        (Calibration(good.method, good.fingerprint, negative), "no 48 thresholds for MLP 1"),
        (Calibration(good.method, good.fingerprint, missing), "no 48 thresholds for MLP 0"),
    ):
        with pytest.raises(CalibrationError, match=message) as caught:
            method.attach(model, calibration)
        assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="not finite"):
        Calibration(good.method, good.fingerprint, {"threshold.0": torch.full((48,), math.nan)})
    found = probe_of("silu").measure(0.1)
    with pytest.raises(CalibrationError, match="another model"):
        method.attach(tiny_model("llama"), calibration_of(model, found))


def test_search_names_are_complete():
    assert set(search.RULES) == {"zeros", "top-k", "fat", "cett"}


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_share_of_neurons_can_be_asked_for_instead_of_a_price(share):
    model, ids = model_of("silu"), ids_of("silu")
    method = SparsingLaw.with_share(share)
    calibration = method.calibrate(model, ids)
    assert calibration.facts["activation_ratio"] == pytest.approx(share, abs=0.02)
    with method.attach(model, calibration) as handle, torch.no_grad():
        model(ids)
        assert handle.report()["neurons_kept"] == pytest.approx(share, abs=0.02)
    with pytest.raises(InputError, match="share"):
        SparsingLaw(share=1.5)
    with pytest.raises(InputError, match="share of neurons"):
        search.sparsity_at_share(model, ids, 0.0)
