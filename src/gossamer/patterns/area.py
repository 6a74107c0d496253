"""How much of a prompt's causal attention is computed: the cost of a prefill method, on one scale for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def causal_pairs(length: int, new: int | None = None) -> int:
    """Pairs of a query and a key that it may read: the last `new` (default: all) of `length` positions.

    >>> causal_pairs(4), causal_pairs(4, 1)
    (10, 4)
    """
    before = 0 if new is None else length - new
    return (length * (length + 1) - before * (before + 1)) // 2


class AreaMeter:
    """Sums what a prefill policy computes; its `report` belongs into the policy's.

    >>> meter = AreaMeter()
    >>> meter.add(0, torch.tensor([0.25, 0.75]), batch=1, new=8, length=8)
    >>> meter.add(1, 1.0, batch=1, new=8, length=8, heads=2)
    >>> meter.report()
    {'prefill_area': 0.75, 'prefill_area_of_heads': {0: [0.25, 0.75], 1: [1.0, 1.0]}}
    """

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, int]] = {}

    def add(self, layer: int, share: Tensor | float, *, batch: int, new: int, length: int, heads: int = 1) -> None:
        """Count one call of a layer.

        Args:
            share: of the call's causal pairs, those that lie in what the kernel computes: ``[heads]``, or one for all `heads`.
                Pairs in the future, which kernels compute and mask at the diagonal, count for no method.
        """
        if not isinstance(share, Tensor):
            share = torch.full((heads,), share)
        causal = batch * causal_pairs(length, new)
        pairs, total = self.pairs.get(layer, (0.0, 0))
        self.pairs[layer] = pairs + share.double().cpu() * causal, total + causal

    def report(self) -> dict[str, Any]:
        """`prefill_area`: the share over all layers and heads (dense is 1), and `prefill_area_of_heads` by layer."""
        if not self.pairs:
            return {}
        shares = {layer: pairs / total for layer, (pairs, total) in sorted(self.pairs.items())}
        return {
            "prefill_area": float(torch.stack(list(shares.values())).mean()),
            "prefill_area_of_heads": {layer: share.tolist() for layer, share in shares.items()},
        }
