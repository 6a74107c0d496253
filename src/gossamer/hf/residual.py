"""Cutting the residual stream of an RMSNorm decoder to k channels, exactly: a plain transformers model comes out.

writers (embedding, o_proj, down_proj)   W ← (D W)[keep]            D: what stands behind them, diag(g)(1 + L1 L0)
readers (q, k, v, gate, up, head)        W ← W[:, keep]
norms over the stream                    γ ← γ[keep]·√(d/k),  ε ← ε·d/k
config                                   hidden_size k, head_dim as it was, embedding and head untied

√(d/k) because a norm now averages k squares instead of d of which d − k are zero. Where a family norms queries and keys per
head, these norms get the same ε from the configuration; their inputs are multiplied by √(d/k), which makes up for it. Gemma
multiplies embeddings by √hidden_size, and its norms by 1 + γ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError


def writers(model: nn.Module) -> list[nn.Module]:
    """What writes to the residual stream: the embedding, then each block's attention and MLP output.

    Raises:
        ModelError: the model is no RMSNorm decoder of the Llama kind (Llama, Qwen, Mistral, Gemma).
    """
    base: Any = getattr(model, "model", None)
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    try:
        found = [
            base.embed_tokens,
            *(w for block in base.layers for w in (block.self_attn.o_proj, block.mlp.down_proj)),
        ]
        norms = [base.norm, *(block.input_layernorm for block in base.layers)]
    except AttributeError:
        found, norms = [], []
    fits = all(isinstance(w, nn.Linear | nn.Embedding) and width in w.weight.shape for w in found)
    if not found or not fits or not all(type(n).__name__.endswith("RMSNorm") for n in norms):
        raise ModelError(
            f"{type(model).__name__} is not supported: cutting hidden channels needs a decoder with RMSNorm, o_proj and down_proj "
            "(Llama, Qwen, Mistral, Gemma); convert LayerNorm models first"
        )
    return found


def norm_gain(weight: Tensor, keep: Tensor, plus_one: bool) -> Tensor:
    """γ ``[d]`` of the narrower norm: γ[keep]·√(d/k); `plus_one`: the norm multiplies by 1 + γ.

    >>> norm_gain(torch.ones(4), torch.tensor([0]), False).tolist(), norm_gain(torch.zeros(4), torch.tensor([0]), True).tolist()
    ([2.0], [1.0])
    """
    grow, shift = math.sqrt(len(weight) / len(keep)), float(plus_one)
    return (weight.double()[keep] + shift) * grow - shift


def adds_one(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + γ: read off what it makes of a row of ones."""
    with torch.no_grad():
        gain = norm(torch.ones_like(norm.weight)[None])[0].double()
        weight = norm.weight.double()
        return bool((gain - 1 - weight).abs().sum() < (gain - weight).abs().sum())


@torch.no_grad()
def cut_hidden(
    model: nn.Module,
    keep: Tensor,
    behind: Sequence[Tensor] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Any:
    """A new model of hidden size k; the old one stays as it is. Saves and loads with plain transformers.

    Args:
        model: a causal RMSNorm decoder (Llama, Qwen, Mistral, Gemma).
        keep: int64 ``[k]``, channels of the residual stream that stay.
        behind: D ``[d, d]`` of each of the model's `writers`; None: the identity everywhere.

    Raises:
        ModelError: the family is not supported.

    >>> from gossamer.models import tiny_model
    >>> small = cut_hidden(tiny_model("llama"), torch.arange(48))
    >>> small.config.hidden_size, small.config.head_dim, small.model.layers[0].self_attn.o_proj
    (48, 16, Linear(in_features=64, out_features=48, bias=False))
    """
    places, old = writers(model), cast(Any, model)
    keep = keep.sort().values
    width, count = old.config.hidden_size, len(keep)
    grow = math.sqrt(width / count)
    attention = old.model.layers[0].self_attn
    config = copy.deepcopy(old.config)
    config.hidden_size, config.head_dim, config.tie_word_embeddings = count, attention.head_dim, False
    config.rms_norm_eps = config.rms_norm_eps * width / count
    with torch.random.fork_rng(devices=[]):
        small: Any = type(model)(config).to(next(model.parameters()).dtype).eval()
    mixes = dict(zip((id(p) for p in places), behind, strict=True)) if behind is not None else {}
    modules, narrow = dict(model.named_modules()), dict(small.named_modules())
    plus_one = adds_one(old.model.norm)
    scaled = getattr(old.model.embed_tokens, "scalar_embed_scale", None)
    embed = 1.0 if scaled is None else scaled / small.model.embed_tokens.scalar_embed_scale
    headed = hasattr(attention, "q_norm")
    written = set()

    def write(name: str, what: str, value: Tensor) -> None:
        target = getattr(narrow[name], what)
        if target.shape != value.shape:
            raise ModelError(f"{type(model).__name__} is not supported: {name} does not follow the hidden size")
        target.copy_(value)
        written.add(f"{name}.{what}")

    for done, (name, module) in enumerate(modules.items()):
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        if not isinstance(weight, Tensor):
            continue
        progress("merging", done, len(modules))
        w, b = weight.double(), bias.double() if isinstance(bias, Tensor) else None
        mix = mixes.get(id(module))
        if isinstance(module, nn.Embedding):
            w = (w if mix is None else w @ mix.T.to(w.device))[:, keep] * embed
        elif any(module is p for p in places):
            if mix is not None:
                mix = mix.to(w.device)
                w, b = mix @ w, None if b is None else mix @ b
            w, b = w[keep], None if b is None else b[keep]
        elif isinstance(module, nn.Linear):
            w = w[:, keep]
            if headed and name.rpartition(".")[2] in ("q_proj", "k_proj"):
                w, b = w * grow, None if b is None else b * grow
        elif weight.shape == (width,) and type(module).__name__.endswith("RMSNorm") and not _per_head(name):
            w = norm_gain(weight, keep, plus_one)
        write(name, "weight", w)
        if b is not None:
            write(name, "bias", b)
    missing = {n for n, _ in small.named_parameters()} - written
    if missing:
        raise ModelError(f"{type(model).__name__} is not supported: {sorted(missing)[0]} is of an unknown kind")
    if getattr(old, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(old.generation_config)
    return small.to(next(model.parameters()).device)


def _per_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("q_norm", "k_norm")
