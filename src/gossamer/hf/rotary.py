"""A model's rotary embedding, undone or moved to other positions: cached keys are stored rotated."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
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

    Args:
        model: a decoder-only transformers model.
        who: the method that asks, named in its errors.
        advice: what to do instead, the end of its errors.

    Raises:
        ModelError: the model has none that can be undone (none at all, other layouts, frequencies that vary).
    """

    def __init__(self, model: nn.Module, who: str = "rotary", advice: str = "use another model") -> None:
        views = attention_views(model)
        inside = views[0].module
        found = [m for m in model.modules() if hasattr(m, "rotary_emb") and any(x is inside for x in m.modules())]
        name = type(model).__name__
        if not found or not all(getattr(view.module, "use_rope", True) for view in views):
            raise ModelError(f"{who}: {name} has no rotary positions in every layer: {advice}")
        self.module: Any = cast(Any, found[-1]).rotary_emb
        kinds: Any = getattr(self.module, "rope_type", "default")
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise ModelError(f"{who}: {name} changes its rotary frequencies with the length: {advice}")
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
            raise ModelError(f"{who}: {name} rotates its keys in a layout that cannot be undone: {advice}")

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

    def plain(self, x: Tensor, layer: int, old: Tensor) -> Tensor:
        """`x` as it left its projection: `undo`, and without the model's scaling of the rotated channels (YaRN)."""
        cos, sin = self.tables(layer, old)
        return turn(x, cos / self.scale[layer], -sin / self.scale[layer])

    def rotated(self, x: Tensor, layer: int, new: Tensor) -> Tensor:
        """The inverse of `plain`: what the model itself makes of `x` at the positions `new`."""
        cos, sin = self.tables(layer, new)
        return turn(x, cos * self.scale[layer], sin * self.scale[layer])

    def of_width(self, width: int) -> Rotary:
        """The same base and scaling for heads of `width` channels (even), as a model with such heads would have it.

        Raises:
            ModelError: the family's embedding cannot be made at that width.
        """
        config = copy.deepcopy(self.module.config)
        other = copy.copy(self)
        try:
            config.head_dim = width
            device = next(iter(self.module.buffers())).device
            other.module, other.scale, other.near = type(self.module)(config).to(device), {}, {}
            made = other._call(0, torch.zeros(1, 1, dtype=torch.long, device=device))[0].shape[-1]
        except (TypeError, RuntimeError, ValueError, AttributeError, KeyError, StopIteration) as error:
            raise ModelError(f"{type(self.module).__name__} cannot be made {width} channels wide: {error}") from None
        if made > width:
            raise ModelError(
                f"{type(self.module).__name__} takes its width from elsewhere: use gates as wide as the heads"
            )
        return other

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
