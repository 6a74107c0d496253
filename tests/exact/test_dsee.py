"""DSEE by its card: the update, its support, the masks, the heads, the task's file."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from gossamer.errors import CalibrationError, InputError, ModelError, OutputError
from gossamer.hf import matrices
from gossamer.models import tiny_model
from gossamer.patterns import choose
from gossamer.registry import make
from gossamer.weights.dsee import DSEE, trained_count
from gossamer.weights.dsee_layers import Adapted, Update, decompose, support
from gossamer.weights.dsee_tuning import can_cut, cut, head_scores, update_score

TOKENS = torch.randint(1, 60, (6, 24), generator=torch.Generator().manual_seed(0))
SMALL = DSEE(rank=3, entries=10, alpha=6.0)


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()


def a_model(family: str) -> nn.Module:
    return bert() if family == "bert" else tiny_model(family)


def tune(model: nn.Module, tuned, steps: int = 3, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to the rounding of another order of sums."""
    return float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


FAMILIES = ["llama", "gpt2", "bert"]


# ------------------------------------------------------------------------------------------------------------------ 1
@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_output_is_the_base_models_bit_for_bit(family):
    model = a_model(family)
    dense = logits(model)
    tuned = SMALL.adapt(model)
    assert torch.equal(logits(model), dense)
    assert torch.equal(model(TOKENS).logits, dense)
    tuned.remove()


# ------------------------------------------------------------------------------------------------------------------ 2
def test_the_support_keeps_its_size_and_nothing_outside_gets_a_gradient():
    torch.manual_seed(0)
    weight = torch.randn(8, 12, dtype=torch.float64)
    index = support(weight, 10, "random", generator=torch.Generator().manual_seed(1))
    update = Update(weight, 0, 3, 6.0, index, torch.Generator().manual_seed(0))
    with torch.no_grad():
        update.b.normal_()
        update.values.normal_()
    x = torch.randn(5, 12, dtype=torch.float64)
    wanted = torch.randn(5, 8, dtype=torch.float64)
    (update(x) * wanted).sum().backward()
    dense = (2.0 * wanted.T @ x)[index[0], index[1]]  # α/r = 2; the gradient of a dense S2 at Ω
    assert torch.allclose(update.values.grad, dense, atol=1e-12)
    for _ in range(4):
        with torch.no_grad():
            update.values.sub_(0.1 * update.values.grad)
        assert int((update.entries() != 0).sum()) == 10
        assert torch.equal((update.entries() != 0).nonzero().t(), index)


# ------------------------------------------------------------------------------------------------------------------ 3
@pytest.mark.parametrize("seed", range(3))
def test_one_outer_iteration_finds_the_spikes(seed):
    generator = torch.Generator().manual_seed(seed)
    low = 0.02 * torch.randn(96, 5, generator=generator) @ torch.randn(5, 96, generator=generator)
    places = torch.randperm(96 * 96, generator=generator)[:40]
    spikes = torch.zeros(96 * 96)
    spikes[places] = 2.0 * (torch.randint(2, (40,), generator=generator) * 2 - 1)
    weight = low + spikes.view(96, 96)
    found = support(weight, 40, outer_iters=1, generator=generator)
    assert torch.equal(found[0] * 96 + found[1], places.sort().values)
    later = support(weight, 40, outer_iters=12, generator=generator)  # the growing rank takes the spikes up
    assert len(set((later[0] * 96 + later[1]).tolist()) & set(places.tolist())) < 20


def test_the_decomposition_grows_by_five_to_its_cap_and_gets_nearer():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    errors = []
    for outer, cap, rank in ((1, None, 1), (2, None, 6), (3, None, 11), (9, 8, 8), (20, None, 30)):
        u, v, s = decompose(weight, outer, rank_cap=cap, generator=torch.Generator().manual_seed(1))
        assert u.shape == (40, rank)
        assert v.shape == (rank, 30)
        assert torch.allclose(u.T @ u, torch.eye(rank), atol=1e-5)
        assert bool(((s == 0) | (s.abs() >= 0.01)).all())
        assert float((weight - u @ v - s).abs().max()) < 0.01 + 1e-5
        errors.append(float((weight - u @ v).norm()))
    assert errors[0] > errors[1] > errors[2] > errors[4]


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from(["decompose", "magnitude", "random"]))
@settings(max_examples=30, deadline=None)
def test_a_support_has_exactly_its_entries_even_on_a_matrix_of_ties(rows, columns, share, kind):
    entries = int(share * rows * columns)
    index = support(torch.ones(rows, columns), entries, kind, generator=torch.Generator().manual_seed(0))
    assert index.shape == (2, entries)
    assert len(set(map(tuple, index.t().tolist()))) == entries


# ------------------------------------------------------------------------------------------------------------------ 4
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["ABS", "AB", "W", "WAB", "WABS", "NABS", "random"])
def test_each_group_loses_exactly_its_share_and_updates_are_not_masked(family, mode):
    model = a_model(family)
    tuned = SMALL.adapt(model)
    tune(model, tuned, 2)
    before = {p.name: u.delta().detach().clone() for p, u in tuned.updates()}
    masks = tuned.prune(0.3, 0.15, mode)
    gone, sizes = {True: 0, False: 0}, {True: 0, False: 0}
    for piece in tuned._pieces:
        layer = tuned._layers[piece.name]
        rows = layer.mask[piece.start : piece.stop]
        group = piece.role in ("q", "v")
        gone[group] += int((~rows).sum())
        sizes[group] += rows.numel()
    assert gone == {True: round(0.3 * sizes[True]), False: round(0.15 * sizes[False])}
    shares = tuned.masked_shares()
    assert shares == {"update": gone[True] / sizes[True], "other": gone[False] / sizes[False]}
    assert set(masks) == {m.name for m in matrices(a_model(family))}
    assert all(torch.equal(u.delta(), before[p.name]) for p, u in tuned.updates() if p.role == "v")


def test_a_cap_spares_a_layer_whose_update_barely_moved():
    model = bert()
    tuned = SMALL.adapt(model)
    tune(model, tuned, 2)
    with torch.no_grad():
        for piece, update in tuned.updates():
            if piece.layer == 0:
                update.b.mul_(1e-6)
                update.values.mul_(1e-6)
    assert tuned.prune(0.5, 0.1).shares()["bert.encoder.layer.0.attention.self.query.weight"] == 1.0
    capped = tuned.prune(0.5, 0.1, cap=0.6).shares()
    assert capped["bert.encoder.layer.0.attention.self.query.weight"] == pytest.approx(0.6, abs=1e-3)
    assert tuned.masked_shares()["update"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------------ 5
def test_abs_with_the_weight_as_its_update_is_the_magnitude_mask():
    weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    zero, generator = torch.zeros(6, 7), torch.Generator()
    score = update_score("ABS", weight, weight, zero, generator)
    assert torch.equal(choose({"w": score}, 0.4)["w"], choose({"w": weight.abs()}, 0.4)["w"])
    assert torch.equal(score, update_score("W", weight, zero, zero, generator))


def test_modes_by_hand():
    weight, low, entries = torch.tensor([[2.0, -1.0]]), torch.tensor([[-3.0, 0.5]]), torch.tensor([[0.0, 4.0]])
    expected = {
        "W": [2, 1], "AB": [3, 0.5], "ABS": [3, 4.5], "WAB": [1, 0.5], "WABS": [1, 3.5], "NABS": [1 / 3, 1 / 4.5],
    }  # fmt: skip
    for mode, values in expected.items():
        assert torch.allclose(
            update_score(mode, weight, low, entries, torch.Generator()), torch.tensor([values], dtype=torch.float32)
        )


# ------------------------------------------------------------------------------------------------------------------ 6
@pytest.mark.parametrize("family", FAMILIES)
def test_the_unmerged_forward_is_the_dense_one_and_the_merged_model_loads(family, tmp_path):
    model = a_model(family)
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    tuned.prune(0.3, 0.3)
    tune(model, tuned)
    for layer in tuned._layers.values():
        assert isinstance(layer, Adapted)
        x = torch.randn(4, layer.weight.shape[1])
        dense = layer.weight * layer.mask + layer.delta()
        with torch.no_grad():
            assert torch.allclose(layer(x), F.linear(x, dense, layer._bias()), atol=1e-5)
    wanted, flops = logits(model), tuned.flops()
    assert flops["unmerged"] < flops["merged"] < flops["dense"]
    kept = tuned.merge()
    assert near(logits(model), wanted)
    assert all(torch.equal(p != 0, m) for p, m in kept.parameters(model))
    model.save_pretrained(tmp_path)
    cls = BertForSequenceClassification if family == "bert" else AutoModelForCausalLM
    assert near(logits(cls.from_pretrained(tmp_path)), wanted)


# ------------------------------------------------------------------------------------------------------------------ 7
def test_heads_are_scored_by_the_rows_of_their_updates():
    model = tiny_model("llama")
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    parts = {(p.layer, p.role): u for p, u in tuned.updates()}
    scores = []
    for layer in range(2):
        q = (parts[layer, "q"].low_rank() + parts[layer, "q"].entries()).abs()
        v = (parts[layer, "v"].low_rank() + parts[layer, "v"].entries()).abs()
        scores.append(
            [float((q[32 * g : 32 * g + 32].sum() + v[16 * g : 16 * g + 16].sum()).detach()) for g in range(2)]
        )
    assert tuned.prune_heads(1) == {layer: [int(s[0] > s[1])] for layer, s in enumerate(scores)}
    assert head_scores(torch.ones(6, 2), 3).tolist() == [4, 4, 4]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "bert"])
def test_removed_heads_equal_zeroed_columns_and_are_cut_where_the_family_allows(family, tmp_path):
    model = a_model(family)
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    removed = tuned.prune_heads(1)
    masked = logits(model)
    tune(model, tuned, 2)
    after = logits(model)
    assert not torch.equal(after, masked)
    twin, twin_tuned = copy.deepcopy((model, tuned))
    twin_tuned.merge(cut_heads=False)
    zeroed = logits(twin)
    assert near(zeroed, after)
    tuned.merge()
    assert near(logits(model), zeroed)
    by_role = {(m.layer, m.role): m.weight.shape for m in matrices(model)}
    config = model.config
    if family in ("gpt2", "bert"):
        assert not can_cut(model)
        for name, mask in tuned.masks().items():
            assert mask.shape == model.get_parameter(name).shape
    else:
        left, size = config.num_key_value_heads, config.head_dim
        assert left == 1
        for layer in removed:
            assert by_role[layer, "k"][0] == by_role[layer, "v"][0] == size * left
            assert by_role[layer, "q"][0] == by_role[layer, "o"][1] == size * config.num_attention_heads
    model.save_pretrained(tmp_path)
    cls = BertForSequenceClassification if family == "bert" else AutoModelForCausalLM
    loaded = cls.from_pretrained(tmp_path)
    assert near(logits(loaded), after)
    if family != "bert":
        assert loaded.generate(TOKENS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_zeroed_columns_of_a_head_are_what_goes():
    model = bert()
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    twin, twin_tuned = copy.deepcopy((model, tuned))
    removed = tuned.prune_heads(2)
    twin_tuned.merge()
    with torch.no_grad():
        for layer, heads in removed.items():
            out = twin.bert.encoder.layer[layer].attention.output.dense.weight
            for head in heads:
                out[:, 8 * head : 8 * head + 8] = 0
    assert torch.allclose(logits(model), logits(twin), atol=1e-6)
    assert tuned.masked_shares()["update"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------------ 8
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_unchanged_after_both_stages(family):
    model = a_model(family)
    state = copy.deepcopy(model.state_dict())
    wanted = [p.requires_grad for p in model.parameters()]
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    tuned.prune(0.3, 0.3)
    tune(model, tuned)
    tuned.remove()
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) == (not name.startswith("classifier"))
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_the_trained_count_is_the_formula():
    model = bert()
    tuned = SMALL.adapt(model)
    assert sum(p.numel() for p in tuned.parameters()) == trained_count(2, 32, 32, 3, 10, head=32 * 2 + 2)
    assert trained_count(12, 768, 768, 16, 64, head=1538) == 592_898
    gpt = SMALL.adapt(tiny_model("gpt2"))
    assert sum(p.numel() for p in gpt.parameters()) == trained_count(2, 64, 64, 3, 10)


# --------------------------------------------------------------------------------------------------- and what else holds
def test_a_quarter_of_the_heads_is_a_twelfth_of_a_bert_layers_products():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    tuned.prune_heads(1)
    flops, added = tuned.flops(), 2 * trained_count(2, 32, 32, 3, 10)
    assert flops["dense"] == 2 * 2 * 12 * 32 * 32
    assert 1 - (flops["unmerged"] - added) / flops["dense"] == pytest.approx(1 / 12)


@pytest.mark.parametrize("heads", [0, 1])
def test_a_task_is_a_small_file_that_gives_the_same_outputs_on_the_base(heads, tmp_path):
    model = bert()
    tuned = SMALL.adapt(model)
    tune(model, tuned)
    if heads:
        tuned.prune_heads(heads)
    else:
        tuned.prune(0.3, 0.3)
    tune(model, tuned, 2)
    path = tuned.save_task(tmp_path / "tasks" / "one.safetensors")
    other = bert()
    with torch.no_grad():
        other.classifier.weight.normal_()
    again = SMALL.adapt(other)
    again.load_task(path)
    assert torch.equal(logits(other), logits(model))
    again.merge()
    tuned.merge()
    assert torch.equal(logits(other), logits(model))
    assert path.stat().st_size < 0.7 * 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(CalibrationError, match="another base"):
        SMALL.adapt(bert(1)).load_task(path)
    with pytest.raises(CalibrationError, match="other settings"):
        SMALL.model_copy(update={"rank": 4}).adapt(bert()).load_task(path)


def test_files_that_cannot_be_written_or_read(tmp_path):
    tuned = SMALL.adapt(bert())
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        tuned.save_task(tmp_path / "file" / "task.safetensors")
    with pytest.raises(InputError, match="no task"):
        tuned.load_task(tmp_path / "file")
    with pytest.raises(InputError, match="no task"):
        tuned.load_task(tmp_path / "missing")


def test_apply_learns_the_text_prunes_and_is_the_same_again():
    text = torch.arange(32).repeat(8, 1)
    settings_ = {"rank": 4, "entries": 16, "steps": 15, "steps_after": 15, "batch": 4, "lr": 5e-3, "ratio_other": 0.4}

    def loss(m):
        with torch.no_grad():
            return float(F.cross_entropy(m(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))

    start = loss(tiny_model("llama"))
    applied = make("dsee", **settings_).apply(tiny_model("llama"), text)
    assert loss(applied.model) < start
    assert applied.facts["masked"]["other"] == pytest.approx(0.4, abs=1e-4)
    assert applied.facts["flops"]["unmerged"] < applied.facts["flops"]["dense"]
    again = make("dsee", **settings_).apply(tiny_model("llama"), text)
    assert all(torch.equal(a, b) for a, b in zip(applied.model.parameters(), again.model.parameters(), strict=True))
    cut_off = make("dsee", **settings_, heads=1).apply(tiny_model("llama"), text)
    assert cut_off.facts["parameters"]["after"] < cut_off.facts["parameters"]["before"]
    assert cut_off.model.config.num_key_value_heads == 1


def test_bfloat16_models_are_tuned_in_float32_updates():
    model = tiny_model("llama").to(torch.bfloat16)
    tuned = SMALL.adapt(model)
    tune(model, tuned, 2)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    tuned.prune(0.3, 0.3)
    wanted = logits(model).float()
    tuned.merge()
    assert next(iter(model.parameters())).dtype == torch.bfloat16
    assert torch.allclose(logits(model).float(), wanted, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize("bad", [{"rank": 0}, {"ratio_update": 1.0}, {"mode": "AWS"}, {"support": "best"}, {"cap": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match="dsee"):
        DSEE(**bad)


def test_bad_models_and_orders_get_one_line():
    with pytest.raises(ModelError, match="query and value"):
        SMALL.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    broken = tiny_model("llama")
    broken.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"k_proj\.weight"):
        SMALL.adapt(broken)
    with pytest.raises(InputError, match="do not fit"):
        SMALL.model_copy(update={"entries": 10_000}).adapt(bert())
    model = tiny_model("llama")
    tuned = SMALL.adapt(model)
    with pytest.raises(InputError, match="tune before pruning"):
        tuned.prune()
    with pytest.raises(InputError, match="tune before removing"):
        tuned.prune_heads(1)
    with pytest.raises(InputError, match="between 1 and 1"):
        tuned.prune_heads(2)
    tuned.prune(0.1, 0.1, mode="W")  # needs no update
    with pytest.raises(InputError, match="0 .. 1".replace(".", r"\.")):
        tuned.prune(1.5, 0.1, mode="W")
    tuned.remove()
    with pytest.raises(InputError, match="as many heads"):
        cut(model, {0: [0]}, {})
    with pytest.raises(InputError, match="token blocks"):
        SMALL.apply(tiny_model("llama"))
    with pytest.raises(InputError, match="finite matrix"):
        decompose(torch.full((3, 3), torch.inf))


def test_an_interrupted_apply_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    state = copy.deepcopy(model.state_dict())

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DSEE(rank=2, entries=4, steps=2, batch=2).apply(model, TOKENS, stop)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, state[n]) for n, a in model.state_dict().items())
    assert not model.training
