"""Sliding window: the cache holds the newest tokens, and the first ones if asked (`sinks`), and nothing between.

The control of every eviction method: what remains when no score is taken. (`streaming-llm` of the attention family reads
the same rows but keeps all.)
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.cache.base import CacheMethod, EvictingPolicy
from gossamer.calibration import Calibration
from gossamer.hf import CachePolicy, LayerView
from gossamer.registry import register


def window_rows(length: int, window: int, sinks: int, starts: Tensor | None, batch: int) -> Tensor:
    """Ids of the rows that stay, int64 ``[batch, window + sinks]``, ascending; of `length` rows, more than that.

    The sinks of a left-padded sequence stand behind its padding; a sequence with fewer real rows fills up with padding.

    >>> window_rows(8, 3, 1, torch.tensor([0, 2]), 2).tolist()
    [[0, 5, 6, 7], [2, 5, 6, 7]]
    """
    newest = torch.arange(length - window, length).expand(batch, -1)
    first = torch.zeros(batch, dtype=torch.int64) if starts is None else starts.long().cpu()
    # Sinks never reach into the window: what would, are the last rows of padding in front of them.
    sink = first.clamp_max(length - window - sinks)[:, None] + torch.arange(sinks)
    return torch.cat([sink, newest], 1)


class WindowPolicy(EvictingPolicy):
    """Drops the oldest rows behind the sinks."""

    def __init__(self, method: SlidingWindow) -> None:
        super().__init__()
        self.method = method

    def evict(self, layer: LayerView, query: Tensor) -> None:
        """Keep sinks and window."""
        kv, method = layer.kv, self.method
        if kv.length > method.window + method.sinks:
            rows = window_rows(kv.length, method.window, method.sinks, layer.starts, kv.batch)
            layer.keep(rows[:, None].expand(-1, kv.heads, -1).to(query.device))


@register("sliding-window", slot="cache", family="cache", name="Sliding window", baseline=True)
class SlidingWindow(CacheMethod):
    """Hold the newest `window` tokens, and the first `sinks`: bounded memory, nothing to compute, everything else forgotten.

    Without sinks most models break once their first tokens are gone (Xiao et al., ICLR 2024, arXiv 2309.17453); four
    sinks mend that. Positions keep counting all tokens, as for every eviction method here. Cost of a step: a copy of the
    kept rows.

    >>> SlidingWindow(window=256).held_rows(1000)
    256
    """

    window: int = Field(512, ge=1, description="newest tokens held")
    sinks: int = Field(0, ge=0, description="first tokens held")

    def cache_policy(self, model: nn.Module, calibration: Calibration | None) -> CachePolicy:
        """A policy without state."""
        return WindowPolicy(self)

    def held_rows(self, length: int) -> int:
        """Window and sinks."""
        return min(length, self.window + self.sinks)
