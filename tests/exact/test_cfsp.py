"""CFSP's card, check by check, and the structured baselines it is compared with."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import mlp_views
from gossamer.models import tiny_model
from gossamer.models.reshaped import Reshaped
from gossamer.registry import make
from gossamer.weights.cfsp import adapter_ranks, block_shares, change, fine_score
from gossamer.weights.neuron_baselines import fluctuation_score, magnitude_score, wanda_score
from gossamer.weights.neurons import cut_neurons, global_widths, neuron_facts, rounded_width, top_neurons
from gossamer.weights.recovery import Recovery

TOKENS = torch.randint(1, 256, (4, 40), generator=torch.Generator().manual_seed(0))
GATED = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.floats(0, 0.9),
    st.floats(0, 4),
)
def test_shares_keep_what_was_asked_for(importance, ratio, a):
    shares, s = block_shares(importance, ratio, a)
    assert math.fsum(shares) / len(shares) == pytest.approx(1 - ratio, abs=1e-9)
    assert all(0 <= share <= 1 + 1e-12 for share in shares)
    raw = [1 / (1 + math.exp(-a * 13.1072 * (i - math.fsum(importance) / len(importance)))) for i in importance]
    mean = math.fsum(raw) / len(raw)
    if (1 - ratio) * max(raw) / mean >= 1 and max(raw) - mean > 1e-6:
        assert max(shares) == pytest.approx((1 - ratio) + ratio / 1.05, abs=1e-6)
    order = sorted(range(len(importance)), key=lambda i: importance[i])
    assert all(shares[i] <= shares[j] + 1e-9 for i, j in itertools.pairwise(order))
    assert len(s) == len(importance)


def test_equal_importance_is_a_uniform_cut():
    assert block_shares([0.3] * 5, 0.2)[0] == pytest.approx([0.8] * 5)
    assert block_shares([0.3] * 5, 0.0)[0] == pytest.approx([1.0] * 5)
    with pytest.raises(InputError, match="finite"):
        block_shares([math.nan], 0.2)
    with pytest.raises(InputError, match="ratio"):
        block_shares([0.5], 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_released_score_is_the_activation_norm(seed):
    generator = torch.Generator().manual_seed(seed)
    down, up, gate = (torch.randn(*size, generator=generator) for size in ((6, 20), (20, 6), (20, 6)))
    norm = torch.rand(20, generator=generator) + 0.1
    score = fine_score(down, up, gate, norm)
    assert torch.allclose(score, 3 / 6 * norm.double(), rtol=1e-12, atol=0)
    assert torch.allclose(fine_score(down, up, gate, norm, c=2.0), 3 / 6 * norm.double() ** 2, rtol=1e-12, atol=0)
    row = fine_score(down, up, gate, norm, norm_axis="row")
    assert not torch.equal(row.argsort(), score.argsort())
    # With constant up and gate, only the relative |W_down| · ‖A‖ differs between neurons, and ‖A‖ outside it.
    ones = torch.ones(20, 6)
    relative = down.double().abs() * norm.double()
    relative = (relative / relative.sum(1, keepdim=True)).mean(0)
    assert torch.equal(fine_score(down, ones, ones, norm, norm_axis="row", c=0.0).argsort(), relative.argsort())
    assert torch.allclose(fine_score(down, ones, ones, norm, norm_axis="row"), (relative + 2 / 20) * norm.double())


def test_other_scores_by_hand():
    down, up, gate = torch.tensor([[3.0, -1.0], [4.0, 0.0]]), torch.ones(2, 2), torch.ones(2, 2)
    norm = torch.tensor([2.0, 5.0])
    assert fine_score(down, up, gate, norm, "mag_base").tolist() == magnitude_score(down).tolist() == [5.0, 1.0]
    assert fine_score(down, up, gate, norm, "wanda_base").tolist() == wanda_score(down, norm).tolist() == [7.0, 2.5]
    assert fine_score(down, up, gate, norm, "one_a").tolist() == [2.0, 5.0]
    assert fine_score(down, up, gate, norm, "one_wa", "row").tolist() == pytest.approx(
        [(6 / 11 + 1) / 2 * 2, (5 / 11) / 2 * 5]
    )
    assert fluctuation_score(down, norm).tolist() == [50.0, 5.0]


def test_changes_by_hand():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert change(x, x).tolist() == [0.0] * 7
    assert change(x, -x).tolist() == pytest.approx([1.0] * 7)
    assert change(x, 3 * x).tolist() == pytest.approx([0.0] * 7, abs=1e-6)
    assert change(x, torch.zeros_like(x)).tolist() == [0.5] * 7
    y = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    cosine = torch.nn.functional.cosine_similarity(x, y)
    assert torch.allclose(change(x, y), cosine.arccos() / math.pi, atol=1e-6)
    assert torch.allclose(change(x, y, "cosine"), 1 - cosine, atol=1e-6)
    assert torch.allclose(change(x, y, "mse"), (x - y).square().mean(1))
    assert torch.allclose(change(x, y, "mae"), (x - y).abs().mean(1))
    assert change(x, y, "constant").tolist() == [0.0] * 7


def test_blocks_that_do_nothing_or_turn_round():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert [f.change for f in neuron_facts(model, TOKENS, change)] == [0.0, 0.0]


def test_statistics_are_those_of_what_down_reads():
    model = tiny_model("llama")
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].detach())
    )
    logits(model)
    handle.remove()
    a = seen[0].double()
    facts = neuron_facts(model, TOKENS, change)[1]
    assert torch.allclose(facts.norm, (a.square().sum((0, 1)) / 4).sqrt(), rtol=1e-4)
    assert torch.allclose(facts.mean, a.mean((0, 1)), atol=1e-4)
    assert torch.allclose(facts.variance, a.flatten(0, 1).var(0, correction=0), rtol=1e-3)
    hidden = model(TOKENS, output_hidden_states=True).hidden_states
    wanted = change(hidden[0].flatten(0, 1), hidden[1].flatten(0, 1)).mean()
    assert neuron_facts(model, TOKENS, change)[0].change == pytest.approx(float(wanted.detach()), abs=1e-4)


def test_more_of_the_same_text_changes_nothing():
    one = make("cfsp", round_to=1).apply(tiny_model("llama"), TOKENS).facts
    two = make("cfsp", round_to=1).apply(tiny_model("llama"), torch.cat([TOKENS, TOKENS])).facts
    assert one["shares"] == pytest.approx(two["shares"], abs=1e-12)
    assert one["widths"] == two["widths"]


@pytest.mark.parametrize("norm_axis", ["column", "row"])
@pytest.mark.parametrize("family", GATED)
def test_the_cut_model_is_the_masked_one(family, norm_axis):
    dense, cut = tiny_model(family), tiny_model(family)
    facts = make("cfsp", sparsity=0.3, round_to=8, norm_axis=norm_axis).apply(cut, TOKENS).facts
    found = neuron_facts(dense, TOKENS, change)
    assert facts["importance"] == pytest.approx([f.change for f in found])
    for view, small, fact, share in zip(mlp_views(dense), mlp_views(cut), found, facts["shares"], strict=True):
        score = fine_score(view.down.weight, view.up.weight, view.gate.weight, fact.norm, norm_axis=norm_axis)
        width = int((128 * share + 4) // 8) * 8
        order = sorted(range(128), key=lambda j: (-float(score[j].detach().float()), j))
        mask = torch.zeros(128).index_fill(0, torch.tensor(order[:width]), 1.0)
        assert small.neurons == width
        assert small.neurons % 8 == 0
        with torch.no_grad():
            view.down.weight.mul_(mask)
    assert torch.allclose(logits(cut), logits(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slug", ["cfsp", "wanda-sp", "flap", "magnitude-sp"])
def test_nothing_cut_is_the_same_model(slug):
    model = tiny_model("llama", intermediate_size=100)  # no multiple of the step
    before = logits(model)
    facts = make(slug, sparsity=0.0, round_to=32).apply(model, TOKENS).facts
    assert facts["widths"] == [100, 100]
    assert facts["neurons_removed"] == 0
    assert torch.allclose(logits(model), before, atol=1e-6)


@given(st.floats(0, 2000), st.integers(1, 2000), st.integers(1, 256))
def test_rounded_widths(exact, neurons, step):
    width = rounded_width(min(exact, neurons), neurons, step)
    assert 1 <= width <= neurons
    assert width == neurons or width % step == 0 or width == min(step, neurons)
    if step < width < neurons - step:
        assert abs(width - exact) <= max(1.0, step / 2 + 1e-5)


def test_ties_keep_exactly_as_many_as_asked_for_and_the_earlier_ones():
    assert top_neurons(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    assert top_neurons(torch.ones(9), 4).tolist() == [0, 1, 2, 3]


def test_global_competition_is_between_standardised_scores():
    scores = [torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 1000.0, 2000.0, 3000.0])]
    assert global_widths(scores, 0.5) == [2, 2]
    assert sum(global_widths([torch.tensor([0.0, 0.0, 9.0]), torch.rand(5)], 0.5)) == 4


def test_flap_replaces_a_constant_neuron_without_loss():
    model = tiny_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, 10:74] = 0  # these neurons always give act(bias)
            block.mlp.c_fc.bias[10:74] = torch.linspace(-1, 1, 64)
    before = logits(model)
    facts = make("flap", sparsity=0.5, spread="uniform").apply(model, TOKENS).facts
    assert facts["widths"] == [64, 64]
    assert torch.allclose(logits(model), before, atol=1e-4)
    llama = tiny_model("llama")
    make("flap", sparsity=0.25).apply(llama, TOKENS)
    assert llama.model.layers[0].mlp.down_proj.bias is not None


def test_one_width_for_all_is_a_plain_model():
    model = tiny_model("llama")
    make("magnitude-sp", sparsity=0.25).apply(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.intermediate_size == 96
    cut_neurons(model, [torch.arange(96), torch.arange(90)])
    assert isinstance(model, Reshaped)
    cut_neurons(model, [torch.arange(90), torch.arange(90)])
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "reshaped")


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=32), st.integers(1, 16))
def test_ranks_sum_to_those_of_uniform_adapters(s, mean_rank):
    ranks = adapter_ranks(s, mean_rank)
    assert sum(ranks) == mean_rank * len(s)
    exact = [mean_rank * len(s) * v / math.fsum(s) for v in s]
    assert all(abs(r - e) <= 1 for r, e in zip(ranks, exact, strict=True))


def test_recovery_trains_more_where_it_matters_more():
    tokens = torch.randint(1, 20, (24, 24), generator=torch.Generator().manual_seed(0))
    method = make("cfsp", sparsity=0.5, round_to=8, recovery=Recovery(steps=30, rank=4, lr=3e-3, batch=4))
    facts = method.apply(tiny_model("llama"), tokens).facts
    assert facts["recovery"]["loss"]["after"] < 0.9 * facts["recovery"]["loss"]["before"]
    assert sum(facts["recovery"]["ranks"]) == 8
    more = facts["importance"][0] > facts["importance"][1]
    assert (facts["recovery"]["ranks"][0] >= facts["recovery"]["ranks"][1]) == more


def test_what_cannot_be_cut_is_named_in_one_line():
    with pytest.raises(InputError, match="token blocks"):
        make("cfsp").apply(tiny_model("llama"))
    with pytest.raises(ModelError, match="with a gate"):
        make("cfsp").apply(tiny_model("gpt2"), TOKENS)
    with pytest.raises(ModelError, match="cannot be cut"):
        make("flap").apply(torch.nn.Linear(2, 2), TOKENS)
    with pytest.raises(CalibrationError, match="eval"):
        make("wanda-sp").apply(tiny_model("llama").train(), TOKENS)
    broken = tiny_model("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        make("cfsp").apply(broken, TOKENS)
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        make("magnitude-sp").apply(broken)
    with pytest.raises(InputError, match="as many lists"):
        cut_neurons(tiny_model("llama"), [torch.arange(3)])
    for ids in (torch.tensor([128]), torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([-1])):
        with pytest.raises(InputError, match="distinct"):
            cut_neurons(tiny_model("llama"), [torch.arange(3), ids])


@pytest.mark.parametrize(
    ("slug", "bad"),
    [
        ("cfsp", {"sparsity": 1.0}),
        ("cfsp", {"metric": "taxi"}),
        ("cfsp", {"norm_axis": "both"}),
        ("cfsp", {"round_to": 0}),
        ("flap", {"spread": "some"}),
    ],
)
def test_settings_out_of_range_are_refused(slug, bad):
    with pytest.raises(InputError, match=slug):
        make(slug, **bad)
