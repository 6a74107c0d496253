"""SnapKV: compress the prompt by what its last window attends to (Li et al., NeurIPS 2024, arXiv 2404.14469).

    score_k = pool_k( Σ_(q in window) S_(q,k) )

The last `window` tokens stay; of the rest, the highest scores fill the budget. Pooling along the tokens keeps the
neighbours of a hit. After the prompt nothing is dropped. Scores are summed over the query heads of a group, so that each
KV head keeps rows of its own (the released code repeats the keys and lets every query head choose).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.cache.base import CacheMethod, EvictingPolicy, budget_of, protect, survivors
from gossamer.calibration import Calibration
from gossamer.hf import CachePolicy, LayerView
from gossamer.ops.attention_statistics import attention_columns
from gossamer.patterns import Budget
from gossamer.registry import register


def window_scores(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    scale: float,
    kernel_size: int,
    pooling: Literal["avg", "max"],
) -> Tensor:
    """Attention that each row gets from the window's queries ``[batch, heads, w, d]``, pooled over the rows before it.

    Returns:
        float32 ``[batch, kv_heads, rows]``; infinite for the window's own rows, which stay.
    """
    window = query.shape[2]
    received = attention_columns(query, key, starts=starts, scale=scale)[:, :, : key.shape[2] - window]
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    pooled = pool(received, kernel_size, stride=1, padding=kernel_size // 2) if received.shape[2] else received
    return F.pad(pooled, (0, window), value=float("inf"))


class SnapPolicy(EvictingPolicy):
    """Cuts each block once; generated tokens stay."""

    def __init__(self, method: SnapKV) -> None:
        super().__init__()
        self.method = method

    def evict(self, layer: LayerView, query: Tensor) -> None:
        """Keep the window and the rows that it attends to most."""
        method, kv = self.method, layer.kv
        budget = budget_of(method.budget, kv.length + kv.dropped)
        if query.shape[2] == 1 or kv.length <= budget:
            return
        window = query[:, :, -min(method.window, budget) :]
        key = layer.key_rows(0, kv.length).to(query.device)
        scores = window_scores(window, key, layer.starts, layer.scale, method.kernel_size, method.pooling)
        layer.keep(survivors(protect(scores, starts=layer.starts), budget))


@register("snapkv", slot="cache", family="cache", name="SnapKV", baseline=True)
class SnapKV(CacheMethod):
    """Compress the prompt once, to the tokens that its last window attends to; generated tokens all stay.

    For long prompts whose question stands at the end, and short answers. The prompt itself is read densely; scoring costs
    `window` rows of it, generation nothing. Every block of more than one token counts as a prompt (a chunk of one, a
    turn), so a prompt read in chunks is compressed after each. Memory grows again with what is generated.

    >>> SnapKV(budget=1024).window
    32
    """

    budget: Budget = Field(0.2, description="rows kept per KV head: a count, or a fraction of the tokens seen")
    window: int = Field(32, ge=1, description="last tokens, which choose and stay")
    kernel_size: int = Field(5, ge=1, le=255, description="rows pooled together; odd")
    pooling: Literal["avg", "max"] = Field("avg", description="how they are pooled")

    @model_validator(mode="after")
    def _fits(self) -> SnapKV:
        if self.kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd")
        if isinstance(self.budget, int) and self.budget < self.window:
            raise ValueError(f"the window of {self.window} rows stays, so the budget must be at least that")
        return self

    def cache_policy(self, model: nn.Module, calibration: Calibration | None) -> CachePolicy:
        """A policy without state."""
        return SnapPolicy(self)

    def held_rows(self, length: int) -> int:
        """The budget, after a prompt of this length."""
        return min(length, budget_of(self.budget, length))
