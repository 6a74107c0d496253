"""TOVA: token omission via attention (Oren et al., EMNLP 2024, arXiv 2401.06104).

    gone = argmin_k mean_h S_(t,h,k)

The cache is the state of a bounded multi-state recurrent network: at each step the token that the newest query attends
to least goes. The mean is over all query heads of the layer, so that all KV heads drop the same token, as in the paper;
``per_head=True`` lets each KV head decide by the mean over its own group.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from gossamer.cache.base import CacheMethod, EvictingPolicy, budget_of, protect, survivors
from gossamer.calibration import Calibration
from gossamer.hf import CachePolicy, LayerView, ModelShape
from gossamer.ops.attention_statistics import attention_row
from gossamer.patterns import Budget
from gossamer.registry import register


def last_query_scores(query: Tensor, key: Tensor, starts: Tensor | None, scale: float, per_head: bool) -> Tensor:
    """Attention of one query ``[batch, heads, d]`` to each row, averaged over the heads that decide together.

    Returns:
        float32 ``[batch, kv_heads, rows]``, the same for every head unless `per_head`.
    """
    received = attention_row(query, key, starts=starts, scale=scale) * (key.shape[1] / query.shape[1])
    return received if per_head else received.mean(1, keepdim=True).expand_as(received)


class TovaPolicy(EvictingPolicy):
    """Needs no memory: the newest query decides."""

    def __init__(self, method: Tova) -> None:
        super().__init__()
        self.method = method

    def evict(self, layer: LayerView, query: Tensor) -> None:
        """Drop what the block's last query attends to least."""
        method, kv = self.method, layer.kv
        budget = budget_of(method.budget, kv.length + kv.dropped)
        if kv.length <= budget:
            return
        key = layer.rows(kv.length)[0].to(query.device)
        scores = last_query_scores(query[:, :, -1], key, layer.starts, layer.scale, method.per_head)
        if query.shape[2] == 1:
            layer.runtime.stats.score_bytes += key.numel() * key.element_size()
        if not method.per_head:
            scores = scores[:, :1]  # one choice for all
        ids = survivors(protect(scores, starts=layer.starts), budget)
        layer.keep(ids.expand(-1, key.shape[1], -1))


@register("tova", slot="cache", family="cache", name="TOVA", baseline=True)
class Tova(CacheMethod):
    """Hold the cache at a budget: each step drops the token that the newest query attends to least.

    No sum, no window, one number to set. A prompt is read densely and cut to the budget by its last query, as in the
    authors' code. Forgets at once what one query does not look at. Cost of a step: the kept keys are read once more.

    >>> Tova(budget=128).per_head
    False
    """

    budget: Budget = Field(0.2, description="rows kept per KV head: a count, or a fraction of the tokens seen")
    per_head: bool = Field(False, description="each KV head drops its own token (the paper: one for all heads)")

    def cache_policy(self, model: nn.Module, calibration: Calibration | None) -> CachePolicy:
        """A policy without state."""
        return TovaPolicy(self)

    def held_rows(self, length: int) -> int:
        """The budget, once it is full."""
        return min(length, budget_of(self.budget, length))

    def io_bytes(self, length: int, shape: ModelShape, element_size: int) -> dict[str, int]:
        """The kept rows and the new one; their keys again, where one must go."""
        rows = self.held_rows(length - 1) + 1
        row = shape.kv_heads * shape.head_dim * element_size
        return {"rows": 2 * rows * row, "scores": rows * row if rows > budget_of(self.budget, length) else 0}
