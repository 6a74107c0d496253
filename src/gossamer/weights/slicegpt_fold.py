"""Step 1 of SliceGPT: a model whose norms have no gain, and see a residual stream that is centred where they would centre it.

    LayerNorm models    embeddings E ← E − mean of each row;  writers W ← W − mean over outputs, b ← b − mean b
    every model         readers of a norm with gain α and shift β:  b ← b + W β,  W ← W diag(α)
    every norm          x · rsqrt(Σ x² / D + eps)

Products are made in float64. Gemma's gain is ``1 + weight``. The outputs do not change.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import InputError, ModelError
from gossamer.hf import Matrix, matrices
from gossamer.models.reshaped import PLACES, Places, linear_weight, replace_norm, set_embedding, set_linear

READ_FIRST = frozenset({"q", "k", "v", "qkv"})
READ_SECOND = frozenset({"gate", "up", "gate_up"})


def places_of(model: nn.Module) -> Places:
    """Where the model keeps its parts.

    Raises:
        ModelError: its family can't be sliced.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in PLACES or not hasattr(model, "lm_head"):
        raise ModelError(
            f"{kind} models cannot be sliced: it takes one norm before each sub-layer ({', '.join(PLACES)})"
        )
    if "shortcuts" in (getattr(config, "reshaped", None) or {}):
        raise ModelError("this model is sliced already: start from the whole one")
    if kind == "opt" and (
        not config.do_layer_norm_before
        or config.word_embed_proj_dim != config.hidden_size
        or getattr(config, "_remove_final_layer_norm", False)
    ):
        raise ModelError(
            "this OPT model cannot be sliced: its norms follow its sub-layers, or its embeddings are projected"
        )
    if getattr(config, "add_cross_attention", False):
        raise ModelError("models with cross-attention cannot be sliced")
    return PLACES[kind]


def stream_width(model: nn.Module, places: Places) -> int:
    """Width of the residual stream as the embeddings make it."""
    table: Any = model.get_submodule(places.embeddings[0])
    return int(table.weight.shape[1])


def readers(block_matrices: list[Matrix], places: Places) -> list[list[Matrix]]:
    """The matrices that read each norm of a block."""
    first = [m for m in block_matrices if m.role in READ_FIRST]
    second = [m for m in block_matrices if m.role in READ_SECOND]
    return [first + second] if len(places.norms) == 1 else [first, second]


def untie(model: Any) -> None:
    """Give the head a weight of its own, in place."""
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def gain_and_shift(norm: Any, is_gemma: bool) -> tuple[Tensor, Tensor | None]:
    """A norm's α and β, float64 ``[D]``."""
    weight = norm.weight.detach().double()
    shift = getattr(norm, "bias", None)
    return weight + 1 if is_gemma else weight, None if shift is None else shift.detach().double()


def absorb(module: Any, gain: Tensor, shift: Tensor | None) -> None:
    """Take a norm's gain and shift into a linear layer that reads it, in place."""
    weight = linear_weight(module).double()
    bias = None if module.bias is None else module.bias.detach().double()
    if shift is not None:
        bias = weight @ shift + (0 if bias is None else bias)
    set_linear(module, weight * gain, bias)


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Do all of this to a model, in place; its outputs stay.

    Raises:
        ModelError: its family can't be sliced.
        InputError: a weight is NaN or infinite.

    >>> from gossamer.models import tiny_model
    >>> model = tiny_model("gpt2")
    >>> before = model(torch.arange(9)[None]).logits
    >>> fold_norms(model)
    >>> torch.allclose(model(torch.arange(9)[None]).logits, before, atol=1e-4), type(model.transformer.ln_f).__name__
    (True, 'PlainNorm')
    """
    places = places_of(model)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinite values: a model like that cannot be sliced")
    width = stream_width(model, places)
    is_gemma = cast(Any, model).config.model_type == "gemma"
    by_block: dict[int, list[Matrix]] = {}
    for matrix in matrices(model):
        by_block.setdefault(matrix.layer, []).append(matrix)
    untie(model)
    if isinstance(model.get_submodule(places.final_norm), nn.LayerNorm):
        for name in places.embeddings:
            table = cast(Any, model.get_submodule(name))
            weight = table.weight.detach().double()
            set_embedding(table, weight - weight.mean(1, keepdim=True))
        for matrix in matrices(model, ("o", "down")):
            weight, bias = matrix.weight.double(), cast(Any, matrix.module).bias
            bias = None if bias is None else bias.double() - bias.double().mean()
            set_linear(matrix.module, weight - weight.mean(0), bias)
    for index, block in enumerate(cast(Any, model.get_submodule(places.blocks))):
        for name, group in zip(places.norms, readers(by_block[index], places), strict=True):
            gain, shift = gain_and_shift(getattr(block, name), is_gemma)
            for matrix in group:
                absorb(matrix.module, gain, shift)
            replace_norm(model, f"{places.blocks}.{index}.{name}", width)
    absorb(model.lm_head, *gain_and_shift(model.get_submodule(places.final_norm), is_gemma))
    replace_norm(model, places.final_norm, width)
