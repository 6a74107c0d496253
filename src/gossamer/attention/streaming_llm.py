"""StreamingLLM: attention sinks and a recent window (Xiao et al., ICLR 2024, arXiv 2309.17453).

    kept = {0 … sinks−1} ∪ {S − recent … S−1}

What a step does not read it never reads later, so dropping those rows would give the same outputs; here they stay in
the cache and the saving is in reads. Positions are the original ones (the paper renumbers within its window so that
streams may outgrow the trained length; within that length the two differ little).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.attention.base import AttentionMethod
from gossamer.calibration import Calibration
from gossamer.hf import DecodePolicy, LayerView, ModelShape, SelectingPolicy
from gossamer.patterns import Budget, resolve
from gossamer.registry import register


def sinks_and_recent(starts: Tensor | None, batch: int, length: int, sinks: int, budget: int) -> tuple[Tensor, Tensor]:
    """Row ids of the first `sinks` real rows and the last ``budget − sinks`` of each sequence.

    Args:
        starts: int ``[batch]``, first real row of each sequence, or None for 0.

    Returns:
        ids int32 ``[batch, 1, budget]`` ascending, and counts int32 ``[batch, 1]`` (less where a sequence is shorter).

    >>> sinks_and_recent(None, 1, 10, sinks=2, budget=5)[0].tolist()
    [[[0, 1, 7, 8, 9]]]
    """
    first = torch.zeros(batch, 1, dtype=torch.int32) if starts is None else starts.view(batch, 1).to(torch.int32)
    slot = torch.arange(budget, dtype=torch.int32, device=first.device)
    real = length - first
    spread = torch.where(slot < sinks, first + slot, length - budget + slot)
    packed = first + slot  # sequences no longer than the budget keep all they have
    ids = torch.where(real > budget, spread, packed).clamp_max(length - 1)
    return ids[:, None].contiguous(), real.clamp_max(budget).to(torch.int32)


class StreamingPolicy(SelectingPolicy):
    """The same rows for every head."""

    def __init__(self, tokens: int | float, sinks: int, dense_layers: frozenset[int]) -> None:
        super().__init__(dense_layers)
        self.tokens, self.sinks = tokens, sinks
        self.made: tuple[int, int, Tensor | None, Tensor, Tensor] | None = None

    def budget(self, length: int) -> int:
        """Sinks and recent rows together."""
        return max(resolve(self.tokens, length), self.sinks + 1)

    def select(self, layer: LayerView, query: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The fixed pattern, shared by all KV heads and made once for all layers of a step."""
        batch, starts = query.shape[0], layer.starts
        if self.made is None or self.made[:2] != (length, batch) or self.made[2] is not starts:
            ids, counts = sinks_and_recent(starts, batch, length, self.sinks, self.budget(length))
            heads = layer.runtime.shape.kv_heads
            ids = ids.to(query.device).expand(-1, heads, -1).contiguous()
            self.made = length, batch, starts, ids, counts.to(query.device).expand(-1, heads).contiguous()
        return self.made[3], self.made[4]


@register(
    "streaming-llm", slot="attention.decode", family="attention", name="StreamingLLM (sinks + recent)", baseline=True
)
class StreamingLLM(AttentionMethod):
    """Read a few first tokens and the most recent ones, nothing between.

    Very cheap and blind to the middle of the context: the baseline that a selection must beat.

    >>> StreamingLLM(tokens=64).sinks
    4
    """

    tokens: Budget = Field(1 / 16, description="rows read per KV head, sinks included: a count or a fraction")
    sinks: int = Field(4, ge=0, description="first tokens always kept")
    dense_layers: tuple[int, ...] = Field((), description="layers that read everything")

    def decode_policy(self, model: nn.Module, calibration: Calibration | None) -> DecodePolicy:
        """A policy with the fixed pattern."""
        return StreamingPolicy(self.tokens, self.sinks, frozenset(self.dense_layers))

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """The window's rows once per KV head."""
        rows = min(max(resolve(self.tokens, length), self.sinks + 1), length)
        return {"rows": rows * shape.kv_heads * 2 * shape.head_dim * element_size, "scores": 0}
