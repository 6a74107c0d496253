"""One-shot pruning by its parts, the matrices it finds, and the block-by-block runner."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, InputError, ModelError
from gossamer.hf import block_list, blocks, matrices
from gossamer.models import FAMILIES, tiny_model
from gossamer.registry import make
from gossamer.weights.prune import gram_matrices

TOKENS = torch.randint(1, 256, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_matrices_are_those_of_the_blocks_in_every_family(family):
    model = tiny_model(family)
    found = matrices(model)
    layers = model.config.num_hidden_layers
    roles = [m.role for m in found if m.layer == 0]
    assert roles == (["qkv", "o", "up", "down"] if family == "gpt2" else ["q", "k", "v", "o", "gate", "up", "down"])
    assert len(found) == layers * len(roles)
    for matrix in found:
        assert matrix.weight.shape[1] == (
            64 if matrix.role in ("q", "k", "v", "qkv", "gate", "up") else matrix.weight.shape[1]
        )
        assert torch.equal(matrix.unview(matrix.weight), matrix.parameter)


def test_a_cnn_prunes_all_but_its_last_layer():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    assert [m.role for m in matrices(model)] == ["conv"]
    assert matrices(model)[0].weight.shape == (4, 9)
    with pytest.raises(ModelError, match="no matrix"):
        matrices(nn.BatchNorm2d(3))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_run_one_by_one_make_what_the_model_makes(family):
    model = tiny_model(family)
    with torch.no_grad():
        wanted = [model.base_model(t[None], output_hidden_states=True).hidden_states for t in TOKENS]
    for stage in blocks(model, TOKENS):
        for hidden, all_hidden in zip(stage.inputs, wanted, strict=False):
            assert torch.allclose(hidden, all_hidden[stage.index], atol=1e-4)


def test_a_stage_sees_what_was_pruned_before_it():
    model = tiny_model("llama")
    inputs = []
    for stage in blocks(model, TOKENS):
        inputs.append(stage.inputs[0].clone())
        if stage.index == 0:
            with torch.no_grad():
                for matrix in stage.matrices:
                    matrix.parameter.zero_()
    assert torch.equal(inputs[0], inputs[1])  # a block of zeros passes its input on


def test_blocks_refuse_what_they_cannot_run():
    with pytest.raises(CalibrationError, match="token blocks"):
        list(blocks(tiny_model("llama"), torch.zeros(3)))
    with pytest.raises(CalibrationError, match="eval"):
        list(blocks(tiny_model("llama").train(), TOKENS))
    with pytest.raises(ModelError, match="blocks"):
        block_list(nn.Linear(2, 2))


@pytest.mark.parametrize("slug", ["magnitude", "random-weights", "wanda", "sparsegpt"])
@pytest.mark.parametrize("structure", ["element", "2:4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_sparsity_is_exact_and_the_masks_are_the_zeros(slug, structure, family):
    model = tiny_model(family)
    applied = make(slug, sparsity=0.5, structure=structure).apply(model, TOKENS)
    assert applied.facts["sparsity"] == pytest.approx(0.5)
    for matrix in matrices(applied.model):
        zeros = matrix.parameter == 0
        assert torch.equal(zeros, ~applied.masks[matrix.name])
        if structure == "2:4":
            assert bool((matrix.view(applied.masks[matrix.name]).reshape(-1, 4).sum(1) == 2).all())


def test_nothing_to_remove_leaves_the_logits_bit_for_bit():
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    make("magnitude", sparsity=0.0).apply(pruned)
    with torch.no_grad():
        assert torch.equal(dense(TOKENS).logits, pruned(TOKENS).logits)


def test_wanda_ranks_by_the_norms_of_inputs_in_every_row():
    model = tiny_model("llama")
    first = next(iter(blocks(model, TOKENS)))
    ((matrix, gram), *_) = gram_matrices(first)
    weight = matrix.weight.clone()
    applied = make("wanda", sparsity=0.25).apply(model, TOKENS)
    score = weight.abs() * gram.diagonal().sqrt().float()
    mask = applied.masks[matrix.name]
    assert bool(((~mask).sum(1) == 16).all())
    largest_removed = score.masked_fill(mask, -1).amax(1)
    assert bool((largest_removed <= score.masked_fill(~mask, 1e9).amin(1) * (1 + 1e-5)).all())


def test_sparsegpt_keeps_the_outputs_better_than_magnitude():
    outputs = {}
    with torch.no_grad():
        dense = tiny_model("llama")(TOKENS).logits
        for slug in ("magnitude", "sparsegpt"):
            model = make(slug, sparsity=0.5).apply(tiny_model("llama"), TOKENS).model
            outputs[slug] = float((model(TOKENS).logits - dense).norm())
    assert outputs["sparsegpt"] < outputs["magnitude"]


@pytest.mark.parametrize(
    ("slug", "settings"),
    [
        ("magnitude", {"sparsity": 1.0}),
        ("magnitude", {"structure": "cube"}),
        ("wanda", {"structure": "row"}),
        ("sparsegpt", {"damp": 0.0}),
    ],
)
def test_settings_out_of_range_are_refused(slug, settings):
    with pytest.raises(InputError, match=slug):
        make(slug, **settings)


def test_text_is_asked_for_in_one_line_and_broken_models_are_named():
    with pytest.raises(InputError, match="token blocks"):
        make("wanda").apply(tiny_model("llama"))
    with pytest.raises(InputError, match="token blocks"):
        make("sparsegpt").apply(tiny_model("llama"), torch.rand(2, 3))
    broken = tiny_model("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        make("sparsegpt").apply(broken, TOKENS)
    with pytest.raises(InputError, match="NaN"):
        make("magnitude").apply(broken)
