"""SparQ (Ribar et al., ICML 2024, arXiv 2312.04985): the channels where the query is large find the tokens.

Each step, per KV head with its group of query heads:

    C = top-r channels of Σ_group |q_c|                  chosen online, for this query
    ŝ[h, j] = softmax_j( Σ_{c ∈ C} q[h, c]·K[j, c] / τ ),   τ = √(d · Σ_C |q_c| / Σ |q_c|)
    I = top-k of ŝ;  o = attention over the rows in I

This is the baseline that Double Sparsity is compared with, and it stops there; the paper's last step, which blends in the
mean of all values by the mass left out, is no part of it. Channels are shared by a KV head's group, as in the paper's
code for grouped queries, so each key channel is read once. Rows are chosen per query head, as in Double Sparsity's
comparison; ``select_per="kv_head"`` is the paper's choice by the group's summed ŝ. Per query head neither softmax nor τ
changes the order, and they are left out.

The channels change with every query, so reading few of them saves bytes only if each lies contiguously: as in the paper, a
second copy of the keys is kept channel by channel, half as much memory again as the cache.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer import ops
from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.hf import DecodePolicy, LayerView, ModelShape, SelectingPolicy
from gossamer.hf.cache import Derived
from gossamer.patterns import Budget, resolve
from gossamer.registry import register

_CHUNK = 4096  # rows scored at a time


def top_channels(query: Tensor, kv_heads: int, r: int) -> Tensor:
    """The r channels with the largest ``Σ_group |q|``, int64 ``[batch, kv_heads, r]`` for `query` ``[batch, heads, d]``.

    >>> top_channels(torch.tensor([[[1.0, -5.0, 2.0], [0.0, 1.0, -3.0]]]), kv_heads=1, r=2).tolist()
    [[[1, 2]]]
    """
    mass: Tensor = query.unflatten(1, (kv_heads, -1)).float().abs().sum(2)
    return mass.topk(r, dim=-1).indices


def channel_scores(query: Tensor, channels: Tensor, columns: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Approximate logits from a few channels, and their temperature.

    Args:
        query: ``[batch, heads, d]``.
        channels: int64 ``[batch, kv_heads, r]``.
        columns: ``[batch, kv_heads, d, capacity]`` contiguous: the keys channel by channel, of which r are read.
        length: keys to score.

    Returns:
        ``Σ_C q·K`` float32 ``[batch, heads, length]``, and τ of the paper ``[batch, heads, 1]`` (for a scale of 1/√d).
    """
    batch, kv_heads, dim, capacity = columns.shape
    grouped = query.unflatten(1, (kv_heads, -1)).float()
    part = grouped.gather(3, channels[:, :, None].expand(-1, -1, grouped.shape[2], -1))
    share = part.abs().sum(-1, keepdim=True) / grouped.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    line = channels + torch.arange(batch * kv_heads, device=query.device).view(batch, kv_heads, 1) * dim
    lines, flat = line.flatten(), columns.view(-1, capacity)
    scores = grouped.new_empty(batch, kv_heads, grouped.shape[2], length)
    for start in range(0, length, _CHUNK):  # small copies stay in the processor's cache
        stop = min(start + _CHUNK, length)
        few = flat[:, start:stop].index_select(0, lines).view(batch, kv_heads, -1, stop - start)
        scores[..., start:stop] = part @ few.float()
    return scores.flatten(1, 2), (dim * share).sqrt().clamp_min(1e-12).flatten(1, 2)


class KeyColumns(Derived):
    """A copy of the keys, channel by channel ``[batch, kv_heads, d, capacity]``."""

    storage: Tensor | None = None

    def extend(self, key: Tensor, capacity: int, first: int = 0) -> Tensor:
        """Bring the copy up to date and return the storage; `key` ``[batch, kv_heads, rows, d]`` holds the rows from
        `first` on, none of them later than the first that is missing."""
        if self.storage is None or self.storage.shape[3] < capacity:
            old = self.storage
            with torch.inference_mode(False):  # written in any mode
                self.storage = key.new_empty(key.shape[0], key.shape[1], key.shape[3], capacity)
            if old is not None:
                self.storage[..., : self.rows] = old[..., : self.rows]
        rows = first + key.shape[2]
        if rows > self.rows:
            self.storage[..., self.rows : rows] = key[:, :, self.rows - first :].transpose(2, 3)
        self.rows = max(self.rows, rows)
        return self.storage


class SparQPolicy(SelectingPolicy):
    """Picks channels by the query, rows by those channels."""

    def __init__(self, method: SparQ) -> None:
        super().__init__(frozenset(method.dense_layers))
        self.method = method

    def open(self, layer: LayerView) -> KeyColumns:
        """No copy yet."""
        return KeyColumns()

    def budget(self, length: int) -> int:
        """Rows per selection."""
        return resolve(self.method.tokens, length)

    def channels(self, layer: LayerView) -> int:
        """r for this model."""
        dim = layer.runtime.shape.head_dim
        return min(resolve(self.method.channels, dim), dim)

    def score_bytes(self, layer: LayerView, length: int) -> int:
        """r channels of every key."""
        kv = layer.kv
        return self.channels(layer) * kv.batch * kv.heads * length * kv.dtype.itemsize

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rows with the highest approximate scores, per query head or by the group's summed probabilities."""
        kv, state = layer.kv, cast(KeyColumns, layer.state)
        key = layer.key_rows(min(state.rows, kv.length), kv.length)
        storage = state.extend(key.to(query.device), kv.capacity, min(state.rows, kv.length))
        channels = top_channels(query, kv.heads, self.channels(layer))
        scores, tau = channel_scores(query, channels, storage, length)
        if self.method.select_per == "kv_head":
            scores = scores * (layer.scale * query.shape[2] ** 0.5 / tau)
            if layer.starts is not None:
                padding = torch.arange(length, device=query.device) < layer.starts[:, None, None]
                scores = scores.masked_fill(padding, float("-inf"))
            scores = scores.softmax(-1).unflatten(1, (kv.heads, -1)).sum(2)
        return ops.select_topk(scores, self.budget(length), starts=layer.starts)


@register("sparq", slot="attention.decode", family="attention", name="SparQ", baseline=True)
class SparQ(AttentionMethod):
    """Score all tokens with the r channels in which this query is largest, then attend exactly to the best k.

    No calibration: what Double Sparsity finds offline, this finds for every query, and pays with a second copy of the keys.
    A step reads ``S·r`` elements per KV head to choose and ``2·k·d`` per selection.

    Paper: SparQ Attention: Bandwidth-Efficient LLM Inference, arXiv 2312.04985.

    >>> SparQ(tokens=256, channels=32).select_per
    'query_head'
    """

    tokens: Budget = Field(1 / 16, description="k, rows attended per selection: a count or a fraction of the context")
    channels: Budget = Field(1 / 4, description="r, channels of the score: a count or a fraction of head_dim")
    select_per: Literal["kv_head", "query_head"] = Field("query_head", description="heads that select for themselves")
    dense_layers: tuple[int, ...] = Field((0, 1), description="layers that read everything")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy with a channel-major copy of the keys per cache layer."""
        return SparQPolicy(self)

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """r channels of each key per KV head, and k rows per selection."""
        r = min(resolve(self.channels, shape.head_dim), shape.head_dim)
        heads = shape.heads if self.select_per == "query_head" else shape.kv_heads
        rows = min(resolve(self.tokens, length), length)
        return {
            "rows": rows * heads * 2 * shape.head_dim * element_size,
            "scores": length * r * shape.kv_heads * element_size,
        }
