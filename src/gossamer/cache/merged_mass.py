"""The softmax mass of merged rows: one that stands for n tokens counts n times, by log(n) on its logit.

    softmax over  q·k_j · scale + log(n_j)

Where the members were identical, that is attention over the rows before they were merged. The bias rides in eight more
channels of the keys (one is used, the others keep rows aligned), against which every query holds 1, so that the same
operators serve attention and its statistics.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import ops
from gossamer.errors import InputError
from gossamer.hf import DecodePolicy, LayerView, PrefillPolicy, dense_attention

_EXTRA = 8


def widen(query: Tensor, key: Tensor, members: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are ``q·k + log(members) / scale``, in float32 and with eight more channels.

    Args:
        query: ``[batch, heads, …, d]``; key: ``[batch, kv_heads, n, d]``.
        members: float32 ``[batch, kv_heads, n]``, tokens that each row stands for, 1 or more.

    Raises:
        InputError: members of another shape or below 1.

    >>> q, k = widen(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2, 2), torch.tensor([[[1.0, 3.0]]]), scale=0.5)
    >>> [round(x, 3) for x in (q @ k.mT * 0.5).softmax(-1).flatten().tolist()]
    [0.25, 0.75]
    """
    if members.shape != key.shape[:-1] or not bool((members >= 1).all()):
        raise InputError(f"want members of 1 or more {list(key.shape[:-1])}, got {list(members.shape)}")
    bias = members.log() / scale
    one = F.pad(query.new_ones(*query.shape[:-1], 1, dtype=torch.float32), (0, _EXTRA - 1))
    row = F.pad(bias[..., None], (0, _EXTRA - 1))
    return torch.cat([query.float(), one], -1), torch.cat([key.float(), row], -1)


class Counted(Protocol):
    """A cache state that knows how many tokens each row stands for."""

    def counts(self, rows: int) -> Tensor | None:
        """float32 ``[batch, kv_heads, rows]``; None where all stand for one."""


class MassPolicy(DecodePolicy, PrefillPolicy):
    """Reads all rows, each with the mass of its members; for a cache policy whose state is `Counted`."""

    def decode(self, layer: LayerView, query: Tensor, length: int) -> Tensor:
        """Dense where nothing was merged yet."""
        members = _counts(layer, length)
        if members is None:
            return layer.dense_decode(query, length)
        key, value = (x.to(query.device) for x in layer.rows(length))
        layer.count(length * key.shape[0] * key.shape[1], length)
        wide, key = widen(query, key, members, layer.scale)
        value = F.pad(value.float(), (0, _EXTRA))
        out = ops.decode_attention(wide, key, value, starts=layer.starts, scale=layer.scale)
        return out[..., :-_EXTRA].to(query.dtype)

    def prefill(self, layer: LayerView, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A later block of a prompt, or the next turn."""
        members = _counts(layer, key.shape[2])
        if members is None:
            return dense_attention(query, key, value, layer.scale, starts=layer.starts, window=layer.window)
        wide, key = widen(query, key, members, layer.scale)
        out = dense_attention(wide, key, F.pad(value.float(), (0, _EXTRA)), layer.scale, starts=layer.starts)
        return out[..., :-_EXTRA].to(query.dtype)


def _counts(layer: LayerView, length: int) -> Tensor | None:
    state: Counted = layer.cache_state
    return state.counts(length)
