"""TokenSelect's packed positions: keys without their rotary positions, beside a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.hf import LayerView
from gossamer.hf.cache import Derived
from gossamer.hf.rotary import Rotary


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
