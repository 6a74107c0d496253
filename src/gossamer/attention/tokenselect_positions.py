"""TokenSelect's packed positions: a model's rotary embedding as rotations by any position, and keys without theirs."""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.hf import LayerView
from gossamer.hf.cache import Derived
from gossamer.hf.views import attention_views


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` channels of `x` ``[…, d]`` (halves paired) in float32; the dtype is kept."""
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary].float(), x[..., rotary:]
    half = rotary // 2
    rotated = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    out = (turned * cos + rotated * sin).to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


class Rotary:
    """A model's own rotary embedding, as rotations by any position.

    Raises:
        ModelError: the model has none that can be undone (none at all, other layouts, frequencies that vary).
    """

    def __init__(self, model: nn.Module) -> None:
        views = attention_views(model)
        inside = views[0].module
        found = [m for m in model.modules() if hasattr(m, "rotary_emb") and any(x is inside for x in m.modules())]
        name = type(model).__name__
        advice = "use positions='original'"
        if not found or not all(getattr(view.module, "use_rope", True) for view in views):
            raise ModelError(f"tokenselect: {name} has no rotary positions in every layer to pack: {advice}")
        self.module: Any = cast(Any, found[-1]).rotary_emb
        kinds: Any = getattr(self.module, "rope_type", "default")
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise ModelError(f"tokenselect: {name} changes its rotary frequencies with the length: {advice}")
        config: Any = model.config
        config = config.get_text_config(decoder=True)
        by_type = "layer_type" in inspect.signature(self.module.forward).parameters
        self.types: list[str] | None = list(config.layer_types) if by_type else None
        self.scale: dict[int, float] = {}
        self.near: dict[str, tuple[Tensor, Tensor]] = {}  # tables of the positions 0, 1, 2, … so far
        try:
            same = self._same_layout(inside)
        except (TypeError, RuntimeError, ValueError, IndexError):
            same = False
        if not same:
            raise ModelError(f"tokenselect: {name} rotates its keys in a layout that cannot be packed: {advice}")

    def tables(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 ``[*positions, rotary channels]`` of this layer, without the model's scaling of them."""
        cos, sin = self._call(layer, positions.reshape(1, -1))
        if layer not in self.scale:
            self.scale[layer] = float(self._call(layer, positions.new_zeros(1, 1))[0][0, 0, 0])
        shape = (*positions.shape, cos.shape[-1])
        return (cos / self.scale[layer]).view(shape), (sin / self.scale[layer]).view(shape)

    def first(self, layer: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`tables` of the positions 0 … count−1, kept for the next step."""
        kind = "" if self.types is None else self.types[layer]
        if kind not in self.near or len(self.near[kind][0]) < count or self.near[kind][0].device != device:
            self.near[kind] = self.tables(layer, torch.arange(count, device=device))
        cos, sin = self.near[kind]
        return cos[:count], sin[:count]

    def move(self, x: Tensor, layer: int, old: Tensor, new: Tensor) -> Tensor:
        """`x` ``[…, d]``, rotated for the positions `old`, as it would be at `new` (shapes that fit ``x.shape[:-1]``)."""
        (c0, s0), (c1, s1) = self.tables(layer, old), self.tables(layer, new)
        return turn(x, c1 * c0 + s1 * s0, s1 * c0 - c1 * s0)

    def undo(self, x: Tensor, layer: int, old: Tensor) -> Tensor:
        """`x` ``[…, d]`` before its rotation for the positions `old`: RoPE is orthogonal, its inverse turns back."""
        cos, sin = self.tables(layer, old)
        return turn(x, cos, -sin)

    def _call(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        kind = () if self.types is None else (self.types[layer],)
        cos, sin = self.module(like, positions, *kind)
        return cos, sin

    def _same_layout(self, attention: nn.Module) -> bool:
        """Whether the family's own function turns channels as `turn` does."""
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        device = next(attention.parameters()).device
        cos, sin = self._call(0, torch.tensor([[0, 3, 70]], device=device))
        x = torch.linspace(-1, 1, cos.shape[-1], device=device).repeat(1, 1, 3, 1)
        return apply is not None and torch.allclose(apply(x, x, cos, sin)[0], turn(x, cos[:, None], sin[:, None]))


class PlainKeys(Derived):
    """Un-rotated keys of a layer's first `rows` rows."""

    plain: Tensor | None = None  # [B, Hkv, capacity, d]

    def extend(self, layer: LayerView, rotary: Rotary) -> None:
        """Un-rotate the keys of the rows from `rows` on; `rows` itself is the caller's to move."""
        kv = layer.kv
        if self.rows >= kv.length and self.plain is not None:
            return
        if self.plain is None or self.plain.shape[2] < kv.length:
            old = self.plain
            with torch.inference_mode(False):  # to be written in any mode
                like = kv.key_rows(0, 1)
                self.plain = like.new_empty(kv.batch, kv.heads, kv.capacity, like.shape[3])
            if old is not None:
                self.plain[:, :, : self.rows] = old[:, :, : self.rows]
        key = kv.key_rows(self.rows, kv.length)
        at = kv.positions[:, :, self.rows :] if kv.dropped else torch.arange(self.rows, kv.length)
        self.plain[:, :, self.rows : kv.length] = rotary.undo(key, layer.index, at.to(key.device))


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` ``[B, n]`` of `x` ``[B, Hkv, S, d]``, the same for every head."""
    if ids.shape[0] == 1:
        return x.index_select(2, ids[0])
    return x.gather(2, ids.long()[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
