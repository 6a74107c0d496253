"""H2O: heavy hitters and a recent window (Zhang et al., NeurIPS 2023, arXiv 2306.14048).

A2SF's procedure with α = 1, the attention ever received, and half of the budget for the newest tokens.
"""

from __future__ import annotations

from pydantic import Field

from gossamer.cache.a2sf import A2SF
from gossamer.cache.base import Part
from gossamer.registry import register


@register("h2o", slot="cache", family="cache", name="H2O (heavy hitters + recent)", baseline=True)
class H2O(A2SF):
    """Hold the cache at a budget: half for the newest tokens, half for those with the most attention ever received.

    The baseline of every eviction method, and strong on prose. Early tokens have been summed longest, so what a long
    generation needs late may have gone. Settings and cost as in A2SF; the paper's own code reads a prompt densely
    (``prompt="block"``) where its evaluation drops row by row.

    >>> H2O(budget=64).plan(1000)
    (64, 32, 0)
    """

    alpha: float = Field(1.0, ge=1, le=1, description="no forgetting")
    recent: Part = Field(0.5, description="newest rows that can't go: a count, or a fraction of the budget")
