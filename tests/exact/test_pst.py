"""PST by its card: factors, mask, gradients, schedule, export."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from gossamer.errors import InputError, ModelError
from gossamer.hf import matrices
from gossamer.models import tiny_model
from gossamer.patterns import choose
from gossamer.registry import make
from gossamer.weights.learned_masks import LearnedMasks, MagnitudeMask, MovementMask, smallest_removed
from gossamer.weights.pst import PST, importance, sparsity_at

TOKENS = torch.randint(1, 256, (6, 24), generator=torch.Generator().manual_seed(0))


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()


def linear(outputs: int = 8, inputs: int = 12, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype), nn.Linear(outputs, 3, dtype=dtype))


def the_factors(model: nn.Module):
    return model[0].parametrizations.weight[0]


def fill(factors, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in factors.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


# ------------------------------------------------------------------------------------------------------------------ 1
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_at_step_zero_the_output_is_the_dense_one_bit_for_bit(family):
    model = bert() if family == "bert" else tiny_model(family)
    tokens = TOKENS % 60
    with torch.no_grad():
        dense = model(tokens).logits
        masks = PST().convert(model)
        assert torch.equal(model(tokens).logits, dense)
    logits = model(tokens).logits  # the path with gradients is another one
    assert torch.equal(logits, dense)
    assert logits.requires_grad
    masks.remove()


# ------------------------------------------------------------------------------------------------------------------ 2
@given(sparsity=st.floats(0.001, 0.999), outputs=st.integers(1, 9), inputs=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_every_matrix_loses_exactly_its_truncated_quota(sparsity, outputs, inputs):
    model = linear(outputs, inputs)
    masks = PST(weight_rank=2, mask_rank=2).convert(model)
    fill(the_factors(model))
    masks.set_sparsity(sparsity)
    zeros = int((~masks.masks()["0.weight"]).sum())
    assert zeros == int(outputs * inputs * sparsity)
    assert int((model[0].weight == 0).sum()) == zeros


def test_ties_are_broken_by_index_and_counts_stay_exact():
    mask = smallest_removed(torch.ones(3, 4), 5)
    assert mask.reshape(-1).tolist() == [True] * 7 + [False] * 5
    assert smallest_removed(torch.tensor([0.0, -0.0, 1.0]), 1).tolist() == [True, False, True]
    assert smallest_removed(torch.rand(2, 2), 0).all()
    assert not smallest_removed(torch.rand(2, 2), 4).any()


# ------------------------------------------------------------------------------------------------------------------ 3
def test_with_factors_at_zero_the_mask_is_the_magnitude_mask():
    model = tiny_model("llama")
    masks = PST().convert(model)
    masks.set_sparsity(0.7)
    found = masks.masks()
    masks.remove()
    scores = {m.name: m.weight.abs() for m in matrices(model)}
    shares = {n: int(s.numel() * 0.7) / s.numel() for n, s in scores.items()}
    wanted = choose(scores, shares)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert len(found) == len(wanted)


# ------------------------------------------------------------------------------------------------------------------ 4
@pytest.mark.parametrize("side", ["c", "r"])
def test_a_huge_column_or_row_part_removes_whole_columns_or_rows_first(side):
    model = linear(8, 12)
    masks = PST(weight_rank=1, mask_rank=1).convert(model)
    part = getattr(the_factors(model), side)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        part.copy_(1e4 * order)
    masks.set_sparsity(0.5)
    mask = masks.masks()["0.weight"]
    gone = ~mask.any(0) if side == "c" else ~mask.any(1)
    assert torch.equal(gone, order < len(part) // 2)
    assert int(mask.sum()) == 48


# ------------------------------------------------------------------------------------------------------------------ 5
@pytest.mark.parametrize("detached", [False, True])
def test_gradients_are_the_formulas(detached):
    model = linear(dtype=torch.float64)
    pst = PST(weight_rank=2, mask_rank=3, alpha1=0.7, alpha2=1.3, beta=0.5, detach_magnitude=detached)
    masks = pst.convert(model)
    f = the_factors(model)
    fill(f)
    masks.set_sparsity(0.6)
    weight = model[0].parametrizations.weight.original
    x, wanted = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    (model[0](x) * wanted).sum().backward()
    grad = wanted.T @ x  # G: of the product M ⊙ W_t
    updated = (weight + 0.5 * f.u @ f.v).detach()
    mask = masks.masks()["0.weight"].double()
    to_mask = grad * updated
    assert torch.allclose(f.a.grad, 0.7 * to_mask @ f.b.T, atol=1e-12)
    assert torch.allclose(f.b.grad, 0.7 * f.a.T @ to_mask, atol=1e-12)
    assert torch.allclose(f.r.grad, 1.3 * to_mask.sum(1), atol=1e-12)
    assert torch.allclose(f.c.grad, 1.3 * to_mask.sum(0), atol=1e-12)
    to_weight = grad * mask + (0 if detached else to_mask * updated.sign())
    assert torch.allclose(f.u.grad, 0.5 * to_weight @ f.v.T, atol=1e-12)
    assert torch.allclose(f.v.grad, 0.5 * f.u.T @ to_weight, atol=1e-12)
    assert weight.grad is None
    assert model[0].bias.grad is None


def test_a_step_of_the_full_importance_is_movement_pruning():
    model = linear(dtype=torch.float64)
    (matrix,) = [m for m in matrices(model) if m.name == "0.weight"]
    LearnedMasks.on(model, [matrix], lambda m: MovementMask(m.parameter.detach(), m.transposed), train_weights=True)
    score = the_factors(model).score
    x = torch.randn(4, 12, dtype=torch.float64)
    model[0](x).square().sum().backward()
    gradient = model[0].parametrizations.weight.original.grad
    torch.optim.SGD([score], lr=0.1).step()
    assert torch.allclose(score, -0.1 * gradient * model[0].weight, atol=1e-12)


def test_both_factors_of_the_importance_move_after_two_steps():
    model = linear()
    masks = PST(weight_rank=2, mask_rank=2).convert(model)
    before = {n: p.detach().clone() for n, p in the_factors(model).named_parameters()}
    optimizer = torch.optim.AdamW(masks.factors(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        optimizer.zero_grad()
        model[0](torch.ones(3, 12)).square().sum().backward()
        optimizer.step()
        moved = {n: not torch.equal(p, before[n]) for n, p in the_factors(model).named_parameters()}
        assert all(moved[n] for n in "vbrc")
        assert moved["a"] == moved["u"] == (step == 1)


# ------------------------------------------------------------------------------------------------------------------ 6
def test_the_schedule_by_hand():
    values = [sparsity_at(t, 1000, 0.9) for t in (0, 100, 250, 400, 550, 700, 701, 1000)]
    assert values == pytest.approx([0, 0, 0.5203, 0.7875, 0.8859, 0.9, 0.9, 0.9], abs=1e-4)


@given(
    final=st.floats(0.1, 0.99), start=st.floats(0, 0.09), warmup=st.floats(0, 0.5), cooldown=st.floats(0, 0.49),
    steps=st.integers(1, 300),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_schedule_never_falls_and_ends_at_the_final_value(final, start, warmup, cooldown, steps):
    values = [sparsity_at(t, steps, final, start, warmup, cooldown) for t in range(steps + 1)]
    assert values == sorted(values)
    assert values[0] >= start
    assert values[-1] == pytest.approx(final)


def test_the_scheduler_counts_steps_and_knows_when_a_checkpoint_may_be_chosen():
    model = linear()
    pst = PST(sparsity=0.9)
    schedule = pst.scheduler(masks := pst.convert(model), 10)
    counts, finals = [], []
    for _ in range(10):
        schedule.step()
        counts.append(int((~masks.masks()["0.weight"]).sum()))
        finals.append(schedule.final)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == int(96 * 0.9)
    assert finals == [False] * 7 + [True] * 3
    assert counts[6] == counts[-1]
    schedule.callback().on_optimizer_step(None, None, None)
    assert schedule.t == 11
    with pytest.raises(InputError, match="at least one step"):
        pst.scheduler(masks, 0)


# ------------------------------------------------------------------------------------------------------------------ 7
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_export_is_plain_gives_the_same_outputs_and_loads(family, tmp_path):
    model = bert() if family == "bert" else tiny_model(family)
    frozen = {m.name: m.parameter.detach().clone() for m in matrices(model)}
    tokens = TOKENS % 60
    masks = PST(sparsity=0.5, weight_rank=2, mask_rank=2).convert(model)
    optimizer = torch.optim.AdamW(masks.parameters(), lr=1e-2, weight_decay=0.0)
    masks.set_sparsity(0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).logits.square().mean().backward()
        optimizer.step()
    for name, before in frozen.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.parametrizations.weight.original, before)
    with torch.no_grad():
        wanted = model(tokens).logits
        kept = masks.export()
        assert torch.allclose(model(tokens).logits, wanted, atol=1e-6)
    for matrix in matrices(model):
        assert torch.equal(matrix.parameter == 0, ~kept[matrix.name])
        assert matrix.parameter.requires_grad
        assert int((~kept[matrix.name]).sum()) == int(matrix.parameter.numel() * 0.5)
    model.save_pretrained(tmp_path)
    cls = BertForSequenceClassification if family == "bert" else AutoModelForCausalLM
    with torch.no_grad():
        assert torch.allclose(cls.from_pretrained(tmp_path)(tokens).logits, wanted, atol=1e-6)


def test_remove_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    state, wanted = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    masks = PST().convert(model)
    masks.set_sparsity(0.9)
    masks.remove()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, state[n]) for n, a in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted


# ------------------------------------------------------------------------------------------------------------------ 8
def test_the_trained_count_is_the_formula_and_the_head_is_trained_too():
    model = bert()
    masks = PST(weight_rank=3, mask_rank=2).convert(model)
    layer = 4 * (32 + 32) + 2 * (32 + 64)
    assert sum(p.numel() for p in masks.factors()) == 2 * layer * (3 + 2 + 1)
    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("classifier", "bert.pooler")))
    assert sum(p.numel() for p in masks.parameters()) == 2 * layer * 6 + head
    assert not any(p.requires_grad for n, p in model.named_parameters() if "embeddings" in n or n.endswith("original"))


# --------------------------------------------------------------------------------------------------- and what else holds
def test_masked_entries_come_back():
    model = linear()
    masks = PST(weight_rank=2, mask_rank=2).convert(model)
    masks.set_sparsity(0.5)
    before = masks.masks()["0.weight"]
    with torch.no_grad():
        the_factors(model).r.copy_(torch.arange(8.0))
    assert bool((masks.masks()["0.weight"] & ~before).any())


def test_the_cached_weight_follows_every_change():
    model = linear()
    masks = PST(weight_rank=2, mask_rank=2).convert(model)
    factors = the_factors(model)
    with torch.no_grad():
        first = model[0].weight
        assert model[0].weight is first
        factors.v.add_(1.0)
        second = model[0].weight
        assert not torch.equal(first, second)
        masks.set_sparsity(0.5)
        assert int((model[0].weight == 0).sum()) == 48
        model[0].parametrizations.weight.original.mul_(2)
        assert not torch.equal(model[0].weight, second)


def test_a_saved_state_resumes():
    first, second = linear(), linear()
    masks = PST(weight_rank=2, mask_rank=2).convert(first)
    fill(the_factors(first))
    masks.set_sparsity(0.4)
    PST(weight_rank=2, mask_rank=2, seed=7).convert(second)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(torch.ones(1, 12)), second(torch.ones(1, 12)))


def test_bfloat16_and_autocast_rank_in_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    masks = PST(sparsity=0.5).convert(model)
    assert {p.dtype for p in masks.factors()} == {torch.float32}
    masks.set_sparsity(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS).logits.float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in masks.factors())
    kept = masks.export()
    assert kept.sparsity == pytest.approx(0.5)
    assert next(iter(model.parameters())).dtype == torch.bfloat16


def test_apply_learns_the_text_and_prunes_exactly():
    text = torch.arange(32).repeat(8, 1)  # the same block again and again
    dense, model = tiny_model("llama"), tiny_model("llama")
    applied = make("pst", sparsity=0.5, steps=40, batch=4, lr=5e-3).apply(model, text)
    one_shot = make("magnitude", sparsity=0.5, scope="matrix").apply(copy.deepcopy(dense)).model

    def loss(m):
        with torch.no_grad():
            return float(F.cross_entropy(m(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))

    assert loss(applied.model) < min(loss(dense), loss(one_shot))
    assert applied.facts["sparsity"] == pytest.approx(0.5)
    assert len(applied.facts["curve"]) == 40
    assert all(torch.equal(p == 0, ~m) for p, m in applied.masks.parameters(applied.model))
    again = make("pst", sparsity=0.5, steps=40, batch=4, lr=5e-3).apply(tiny_model("llama"), text)
    assert all(torch.equal(a, b) for a, b in zip(applied.model.parameters(), again.model.parameters(), strict=True))


def test_gradual_magnitude_and_movement_have_the_same_quota():
    for kind in (MagnitudeMask, MovementMask):
        model = linear()
        masks = LearnedMasks.on(
            model, matrices(model), lambda m, k=kind: k(m.parameter.detach(), m.transposed), train_weights=True
        )
        masks.set_sparsity(0.3)
        assert int((model[0].weight == 0).sum()) == int(96 * 0.3)
        assert model[0].bias.requires_grad
        assert model[1].weight.requires_grad


@pytest.mark.parametrize(
    "bad",
    [
        {"sparsity": 1.0},
        {"weight_rank": 0},
        {"warmup": 0.6, "cooldown": 0.4},
        {"initial": 0.5, "sparsity": 0.4},
        {"lr": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match="pst"):
        PST(**bad)


def test_bad_models_text_and_losses_get_one_line():
    with pytest.raises(ModelError, match="no matrix"):
        PST().convert(nn.LayerNorm(3))
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        PST().convert(broken)
    assert all(p.requires_grad for p in broken.parameters())
    with pytest.raises(InputError, match="token blocks"):
        PST().apply(tiny_model("llama"), torch.zeros(3))
    wild = tiny_model("llama")
    state = copy.deepcopy(wild.state_dict())
    with pytest.raises(InputError, match=r"not finite|NaN"):
        PST(lr=1e30, steps=20, batch=2).apply(wild, TOKENS)
    assert all(torch.equal(a, state[n]) for n, a in wild.state_dict().items())
    assert not wild.training
    with pytest.raises(InputError, match=r"0 \.\. 1"):
        PST().convert(linear()).set_sparsity(1.5)


def test_the_importance_by_hand():
    w = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -1.0]])
    score = importance(w, a, b, torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.25]), alpha1=2.0, alpha2=0.1)
    expected = [[1 + 2 + 1.05, 2 - 2 + 1.025], [3 + 4 + 2.05, 0 - 4 + 2.025]]
    assert torch.allclose(score, torch.tensor(expected))
