"""SPDF: the card's exact checks on masks, training, the switch, FLOPs and checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from gossamer.errors import InputError, ModelError, OutputError, UnknownNameError
from gossamer.hf import matrices
from gossamer.models import MaskHolder, Plan, block_batches, byte_model, language_loss, tiny_model, train
from gossamer.patterns import Masks
from gossamer.registry import make
from gossamer.weights.spdf import (
    SPDF,
    finetune,
    forward_flops,
    initialize,
    model_flops,
    static_random_masks,
    train_flops,
    training_bytes,
)
from gossamer.weights.spdf_pretrain import SparsePretrain

TOKENS = torch.randint(0, 256, (6, 17), generator=torch.Generator().manual_seed(0))
PLAN = Plan(steps=6, lr=1e-3, warmup=2, weight_decay=0.1)
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt(**overrides: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, **NO_DROPOUT, **overrides}
    return byte_model("gpt2", **sizes)


def batches(steps: int = PLAN.steps) -> list[torch.Tensor]:
    return list(block_batches(TOKENS, 2, steps))


# -- masks (1, 2) -----------------------------------------------------------------------------------------------------


@given(st.floats(0, 0.99), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_every_matrix_has_its_exact_count_and_a_mask_of_its_own(sparsity, seed):
    model = gpt()
    masks = static_random_masks(model, sparsity, seed)
    for matrix in matrices(model):
        n = matrix.parameter.numel()
        assert int((~masks[matrix.name]).sum()) == round(sparsity * n)
    assert set(masks) == {m.name for m in matrices(model)}  # embeddings, head, norms and biases are dense
    again = static_random_masks(gpt(), sparsity, seed)
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    if 0.2 < sparsity < 0.8:
        assert masks["transformer.h.0.mlp.c_fc.weight"].ne(masks["transformer.h.1.mlp.c_fc.weight"]).any()
        assert masks.cosine(static_random_masks(gpt(), sparsity, seed + 1)) == pytest.approx(1 - sparsity, abs=0.03)


def test_the_mask_holds_at_every_step_and_does_not_depend_on_training():
    model = gpt()
    masks = static_random_masks(model, 0.75, 3)

    def check(step: int) -> None:
        for matrix in matrices(model):
            gone = ~masks[matrix.name]
            assert int((matrix.parameter == 0).sum()) == round(0.75 * gone.numel())
            assert not bool(matrix.parameter[gone].any())

    SparsePretrain(model, masks, PLAN).run(batches(), after_step=check)
    after = static_random_masks(model, 0.75, 3)
    assert all(torch.equal(masks[n], after[n]) for n in masks)


# -- training (3, 4, 8) -----------------------------------------------------------------------------------------------


def test_no_sparsity_is_ordinary_training_bit_for_bit():
    plain, held = gpt(), gpt()
    train(plain, batches(), PLAN)
    SparsePretrain(held, static_random_masks(held, 0.0), PLAN).run(batches())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True))


def test_the_norm_that_is_clipped_is_that_of_active_and_dense_weights():
    model = gpt()
    masks = static_random_masks(model, 0.75)
    masks.apply(model)
    free = copy.deepcopy(model)
    language_loss(free, TOKENS).backward()
    wanted = torch.cat([(p.grad * masks[n] if n in masks else p.grad).flatten() for n, p in free.named_parameters()])
    holder = MaskHolder(model, masks)
    language_loss(model, TOKENS).backward()
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert float(found) == pytest.approx(float(wanted.norm()), rel=1e-5)
    everything = torch.cat([p.grad.flatten() for p in free.parameters()])
    assert float(everything.norm()) > float(found)
    holder.release()


# -- the switch (5, 8) ------------------------------------------------------------------------------------------------


def test_at_the_switch_nothing_changes_and_one_step_later_the_zeros_have_moved():
    model = gpt()
    masks = static_random_masks(model, 0.75)
    run = SparsePretrain(model, masks, PLAN)
    run.run(batches())
    sparse = copy.deepcopy(model)
    masks.apply(sparse)
    with torch.no_grad():
        before = sparse(TOKENS).logits
        assert torch.equal(before, model(TOKENS).logits)
    probe = copy.deepcopy(model)
    language_loss(probe, batches()[0]).backward()
    dense, kept = copy.deepcopy(model), copy.deepcopy(model)
    finetune(dense, batches(1), Plan(steps=1, lr=1e-3, warmup=0))
    finetune(kept, batches(1), Plan(steps=1, lr=1e-3, warmup=0), masks)
    for name, mask in masks.items():
        moving = ~mask & (probe.get_parameter(name).grad.abs() > 1e-8)
        assert bool(moving.any())
        assert bool(dense.get_parameter(name)[moving].all())
        assert not bool(kept.get_parameter(name)[~mask].any())
    # A fresh optimizer: its first step of Adam is lr in size, whatever phase 1 left.
    step = (dense.transformer.wte.weight - model.transformer.wte.weight).detach().abs().max()
    assert float(step) == pytest.approx(1e-3, rel=0.01)


# -- FLOPs and bytes (6, 7) -------------------------------------------------------------------------------------------


def test_the_flops_are_the_cards():
    def reduction(layers: int, width: int, sparsity: float) -> float:
        return forward_flops(layers, width, 2048, 50257) / forward_flops(layers, width, 2048, 50257, sparsity)

    assert reduction(24, 2048, 0.75) == pytest.approx(2.494, abs=1e-3)
    assert reduction(12, 768, 0.75) == pytest.approx(1.653, abs=1e-3)
    assert reduction(24, 2048, 0.5) == pytest.approx(1.67, abs=0.01)
    assert 1 / reduction(32, 4096, 0.9) == pytest.approx(0.19, abs=0.005)


def test_variable_spdf_costs_a_third_of_dense_training():
    shape, tokens, more = (32, 4096, 2048, 50257), 62523 * 1040 * 2048.0, 20e9
    spent = train_flops(*shape, tokens, 0.9) + train_flops(*shape, more)
    assert spent / train_flops(*shape, tokens) == pytest.approx(0.34, abs=0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_of_a_model_count_its_matrices_attention_and_head(family):
    model = tiny_model(family)
    masks = static_random_masks(model, 0.5)
    gone = sum(m.parameter.numel() for m in matrices(model)) / 2
    assert model_flops(model, 10) - model_flops(model, 10, masks) == 2 * gone
    assert model_flops(model, 20) - model_flops(model, 10) == 4 * 10 * 64 * 2
    assert model_flops(gpt(), 16) == forward_flops(2, 32, 16, 256)


def test_sparse_storage_holds_moments_of_active_parameters_only(tmp_path):
    model = gpt()
    masks = static_random_masks(model, 0.75)
    run = SparsePretrain(model, masks, PLAN)
    run.run(batches(2), until=2)
    run.save(tmp_path)
    active = sum(p.numel() for p in model.parameters()) - (masks.total - masks.kept)
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert sum(file.get_tensor(k).numel() for k in file.keys() if k.startswith(f"{kind}/")) == active  # noqa: SIM118
    assert training_bytes(model, masks) == 16 * active + masks.total // 8


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_with_dropout_too(tmp_path):
    def new() -> Any:
        return gpt(resid_pdrop=0.2)

    whole, first = new(), new()
    masks = static_random_masks(whole, 0.5)
    torch.manual_seed(0)
    SparsePretrain(whole, masks, PLAN).run(batches())
    torch.manual_seed(0)
    run = SparsePretrain(first, masks, PLAN)
    run.run(batches()[:3], until=3)
    run.save(tmp_path)
    torch.manual_seed(99)
    resumed = new()
    again = SparsePretrain.load(tmp_path, resumed)
    assert (again.done, again.plan) == (3, PLAN)
    assert all(torch.equal(again.masks[n], masks[n]) for n in masks)
    again.run(batches()[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_without_masks_or_of_another_model_is_refused(tmp_path):
    model = gpt()
    run = SparsePretrain(model, static_random_masks(model, 0.5), PLAN)
    run.save(tmp_path / "run")
    with pytest.raises(ModelError, match="another model"):
        SparsePretrain.load(tmp_path / "run", gpt(num_hidden_layers=1))
    (tmp_path / "run" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="checkpoint"):
        SparsePretrain.load(tmp_path / "run", gpt())
    (tmp_path / "run" / "masks.safetensors").unlink()
    with pytest.raises(InputError, match="masks"):
        SparsePretrain.load(tmp_path / "run", gpt())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        run.save(tmp_path / "file")


# -- initial weights and the method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_new_weights_are_a_truncated_normal_with_smaller_outputs(family):
    model = tiny_model(family, hidden_size=128, num_hidden_layers=3)
    initialize(model, seed=4)
    narrow = 0.8796  # standard deviation of a normal cut at two of its own
    for matrix in matrices(model):
        std = 0.02 / 6**0.5 if matrix.role in ("o", "down") else 0.02
        assert float(matrix.weight.abs().max()) <= 2 * std
        assert float(matrix.weight.std()) == pytest.approx(std * narrow, rel=0.05)
    other = tiny_model(family, seed=7, hidden_size=128, num_hidden_layers=3)
    initialize(other, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            assert bool((parameter == (0 if name.endswith("bias") else 1)).all())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_method_pretrains_on_text_and_its_model_loads_without_this_library(family, tmp_path):
    settings: dict[str, Any] = {"steps": 8, "batch": 3, "lr": 3e-3}
    applied = make("spdf", **settings).apply(tiny_model(family), TOKENS)
    facts = applied.facts
    assert facts["sparsity"] == pytest.approx(0.75)
    assert facts["sparsity_of_the_model"] < 0.75
    assert Masks.of(applied.model, 0.5).sparsity == pytest.approx(0.75)
    assert facts["final_loss"] < facts["curve"][0]["loss"]
    assert facts["tokens"] == 8 * 3 * 16
    applied.model.save_pretrained(tmp_path)
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, applied.model(TOKENS).logits)
    variable = make("spdf", **settings, dense_steps=4).apply(tiny_model(family), TOKENS)
    assert variable.masks is None
    assert not Masks.of(variable.model, 0.5)
    assert facts["training_flops_ratio"] < variable.facts["training_flops_ratio"] < 1


def test_a_prompt_does_not_count_in_fine_tuning():
    model = gpt()
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:].clone()
    targets[:, :8] = -100
    with torch.no_grad():
        logits = model(inputs).logits[:, 8:]
        wanted = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 8:].flatten())
    training = finetune(model, [(inputs, targets)], Plan(steps=1, lr=1e-9, warmup=0))
    assert training.curve[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_what_it_cannot_do_is_said_in_one_line():
    for wrong in ({"sparsity": 1.0}, {"steps": 0}, {"lr": 0.0}, {"warmup": 1.0}):
        with pytest.raises(InputError, match="spdf"):
            make("spdf", **wrong)
    with pytest.raises(InputError, match="token blocks"):
        make("spdf").apply(gpt())
    with pytest.raises(ModelError, match="no configuration"):
        initialize(nn.Linear(2, 2))
    with pytest.raises(InputError, match="sparsity"):
        static_random_masks(gpt(), 1.5)
    with pytest.raises(InputError, match="FLOPs"):
        forward_flops(0, 1, 1, 1)
    with pytest.raises(UnknownNameError, match="recipes"):
        SPDF.published("gpt4")
    with pytest.raises(ModelError, match="another model"):
        SparsePretrain(gpt(), Masks({"w": torch.ones(2, 2)}), PLAN)
    broken = gpt()
    broken.transformer.wte.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        make("spdf", steps=2, batch=6, fresh=False).apply(broken, torch.zeros_like(TOKENS))
