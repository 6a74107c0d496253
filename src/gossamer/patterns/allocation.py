"""How much of a budget each matrix gets: uniform, Erdős–Rényi (by shape), or by importance. Densities, then exact counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gossamer.errors import InputError

ErdosRenyi = Literal["er", "erk"]


def _check(shapes: Sequence[Sequence[int]], density: float) -> list[int]:
    if not shapes or not 0 <= density <= 1:
        raise InputError(f"a density in 0 .. 1 is shared among one matrix or more, got {density:g} and {len(shapes)}")
    return [math.prod(shape) for shape in shapes]


def capped_shares(weights: Sequence[float], sizes: Sequence[int], density: float, low: float = 0.0) -> list[float]:
    """Densities in proportion to `weights`, none above 1 nor below `low`, that keep `density` of all entries.

    What a full matrix can't take goes to the others in their proportion; if all are at a limit, the rest is spread evenly.

    >>> [round(d, 3) for d in capped_shares([3.0, 1.0, 1.0], [10, 10, 10], 0.6)]
    [1.0, 0.4, 0.4]
    """
    if len(weights) != len(sizes) or min(weights, default=0) < 0 or not all(map(math.isfinite, weights)):
        raise InputError("importances must be finite, not negative, and one for each matrix")
    if not 0 <= low <= density <= 1:
        raise InputError(f"a density must lie in {low:g} .. 1, got {density:g}")
    fixed: dict[int, float] = {}
    while True:
        free = [i for i in range(len(sizes)) if i not in fixed]
        budget = density * sum(sizes) - sum(share * sizes[i] for i, share in fixed.items())
        mass = sum(weights[i] * sizes[i] for i in free)
        if not free:
            return [fixed[i] for i in range(len(sizes))]
        if mass <= 0:
            rest = min(1.0, max(0.0, budget / sum(sizes[i] for i in free)))
            return [fixed.get(i, rest) for i in range(len(sizes))]
        factor = budget / mass
        over = [i for i in free if weights[i] * factor > 1]
        under = [i for i in free if weights[i] * factor < low]
        if not over and not under:
            return [fixed[i] if i in fixed else weights[i] * factor for i in range(len(sizes))]
        # One side at a time, the one that is further out, so that a matrix put at one limit could still have left it.
        excess = sum((weights[i] * factor - 1) * sizes[i] for i in over)
        lack = sum((low - weights[i] * factor) * sizes[i] for i in under)
        fixed |= dict.fromkeys(over, 1.0) if excess >= lack else dict.fromkeys(under, low)


def uniform(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """The same density everywhere.

    >>> uniform([(4, 4), (2, 8)], 0.5)
    [0.5, 0.5]
    """
    return [density] * len(_check(shapes, density))


def erdos_renyi(shapes: Sequence[Sequence[int]], density: float, kind: ErdosRenyi = "erk") -> list[float]:
    """Densities in proportion to ``Σ dims / Π dims``: small matrices stay denser (Mocanu et al. 2018; kernels: Evci et al. 2020).

    Args:
        shapes: ``[out, in]`` or ``[out, in, kh, kw]``.
        density: of all entries together; met exactly, matrices that would exceed 1 are full.
        kind: `er` looks at outputs and inputs only, `erk` at all dimensions.

    >>> [round(d, 3) for d in erdos_renyi([(100, 100), (10, 100)], 0.2)]
    [0.142, 0.781]
    """
    sizes = _check(shapes, density)
    dims = [shape[:2] if kind == "er" else shape for shape in shapes]
    return capped_shares([sum(d) / math.prod(d) for d in dims], sizes, density)


def by_importance(importance: Sequence[float], shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Densities in proportion to an importance of each matrix, none above 1, keeping `density` of all entries.

    >>> by_importance([1.0, 3.0], [(2, 2), (2, 2)], 0.5)
    [0.25, 0.75]
    """
    return capped_shares(importance, _check(shapes, density), density)


def whole_counts(shares: Sequence[float], sizes: Sequence[int], total: int | None = None) -> list[int]:
    """Integers next to ``shares * sizes`` that sum to `total` (default: the rounded sum), by the largest remainder.

    >>> whole_counts([0.5, 0.5, 0.5], [3, 3, 3])
    [2, 1, 1]
    """
    exact = [share * size for share, size in zip(shares, sizes, strict=True)]
    total = round(sum(exact)) if total is None else total
    counts = [min(size, math.floor(value + 1e-9)) for value, size in zip(exact, sizes, strict=True)]
    if not sum(counts) <= total <= sum(sizes):
        raise InputError(f"shares of {sum(exact):g} entries cannot be rounded to {total}")
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < total:
        for i in order:
            if sum(counts) < total and counts[i] < sizes[i]:
                counts[i] += 1
    return counts
