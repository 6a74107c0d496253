"""One view of the attention blocks of every decoder family, so that methods need not know model classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError


@dataclass(frozen=True)
class ModelShape:
    """Sizes that methods and cost formulas need."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


def text_config(model: nn.Module) -> Any:
    """The decoder's own configuration, also of a multimodal model."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} is no transformers model: it has no config")
    return config.get_text_config(decoder=True)


def model_shape(model: nn.Module) -> ModelShape:
    """Layers, heads, KV heads and head size of a decoder.

    Raises:
        ModelError: the model is no decoder-only transformer.
    """
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is not supported: attention methods need a decoder-only transformer")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(layers, heads, kv_heads, head_dim)


@dataclass(frozen=True)
class AttentionView:
    """One attention block.

    Attributes:
        index: its layer.
        module: the attention module (calls the attention interface, has `layer_idx`).
        q_source, k_source: modules whose output is the query and key *before* rotary embedding: the projection, or
            the per-head norm behind it where the family has one. None where query, key and value come out of one
            fused matrix (GPT-2).
    """

    index: int
    module: nn.Module
    q_source: nn.Module | None
    k_source: nn.Module | None

    def project_query(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """Query ``[batch, heads, tokens, head_dim]`` of this layer for any `hidden` ``[batch, tokens, hidden_size]``.

        Used to guess a layer's query from an earlier layer's input.

        Raises:
            ModelError: the family's projection is fused.
        """
        module = cast(Any, self.module)
        if not hasattr(module, "q_proj"):
            raise ModelError(f"{type(module).__name__} has no separate query projection")
        query = module.q_proj(hidden).view(*hidden.shape[:-1], -1, module.head_dim)
        if hasattr(module, "q_norm"):
            query = module.q_norm(query)
        return rotate(query.transpose(1, 2), position_embeddings)

    def project_key_value(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Key and value ``[batch, kv_heads, tokens, head_dim]`` of this layer for its (normed) input, as it caches them.

        Used to compute rows again that were deleted.

        Raises:
            ModelError: the family's projection is fused.
        """
        module = cast(Any, self.module)
        if not hasattr(module, "k_proj") or not hasattr(module, "v_proj"):
            raise ModelError(f"{type(module).__name__} has no separate key and value projections")
        key, value = (p(hidden).view(*hidden.shape[:-1], -1, module.head_dim) for p in (module.k_proj, module.v_proj))
        if hasattr(module, "k_norm"):
            key = module.k_norm(key)
        return rotate(key.transpose(1, 2), position_embeddings), value.transpose(1, 2)


def rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotary embedding of `x` ``[batch, heads, tokens, head_dim]`` by (cos, sin) ``[batch, tokens, rotary]``; None: as it is."""
    if position_embeddings is None:
        return x
    cos, sin = (e.unsqueeze(1) for e in position_embeddings)
    rotary = cos.shape[-1]  # some families rotate only the first part of a head
    turned, rest = x[..., :rotary], x[..., rotary:]
    half = rotary // 2
    rotated = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    return torch.cat((turned * cos + rotated * sin, rest), dim=-1)


def attention_views(model: nn.Module) -> list[AttentionView]:
    """All self-attention blocks of a decoder, in layer order.

    Raises:
        ModelError: none were found, so this family cannot be served.
    """
    shape = model_shape(model)
    found: dict[int, AttentionView] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if (
            index is None
            or not type(module).__name__.endswith("Attention")
            or getattr(module, "is_cross_attention", False)
        ):
            continue
        q_source = getattr(module, "q_norm", None) or getattr(module, "q_proj", None)
        k_source = getattr(module, "k_norm", None) or getattr(module, "k_proj", None)
        found[index] = AttentionView(index, module, q_source, k_source)
    if sorted(found) != list(range(shape.layers)):
        raise ModelError(
            f"{type(model).__name__} is not supported: {len(found)} attention blocks found for {shape.layers} layers"
        )
    return [found[i] for i in range(shape.layers)]


def base_model(model: nn.Module) -> nn.Module:
    """The decoder below the language-model head: every call, direct or through `generate`, passes through it."""
    return cast(nn.Module, getattr(model, "base_model", model))


def with_hooks(hooks: list[tuple[nn.Module, Callable[..., None]]]) -> list[Any]:
    """Register forward hooks; the caller removes the handles that come back."""
    return [module.register_forward_hook(hook) for module, hook in hooks]
