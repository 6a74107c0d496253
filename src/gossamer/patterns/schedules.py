"""Schedules: how much of the way is done at share x of the time, and stages put together from such ways.

Each shape maps 0 to 0 and 1 to 1 and never falls; a value that goes from a to b over n steps is ``ramp(t / n, a, b, shape)``.

    linear(x) = x                 cubic(x)  = 1 − (1 − x)³            (pruning: fast first, slow at the end)
    sine(x)   = ½[sin(−π/2 + πx) + 1]                                 (slow at both ends)
    cosine(x) = 1 − cos(πx/2)                                         (masks that are lifted: slow first)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from gossamer.errors import InputError

Shape = Callable[[float], float]


def _share(x: float) -> float:
    if not 0 <= x <= 1:  # a NaN too
        raise InputError(f"a schedule is a function on 0 .. 1, got {x:g}")
    return x


def linear(x: float) -> float:
    """At an even pace.

    >>> linear(0.25)
    0.25
    """
    return _share(x)


def cubic(x: float) -> float:
    """Fast first, slow at the end: ``1 − (1 − x)³``, the usual way to a final sparsity.

    >>> cubic(0.5)
    0.875
    """
    return 1 - (1 - _share(x)) ** 3


def sine(x: float) -> float:
    """Slow at both ends: half a sine wave, from its trough to its crest.

    >>> [round(sine(x), 3) for x in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.146, 0.5, 1.0]
    """
    return 0.5 * (math.sin(math.pi * (_share(x) - 0.5)) + 1)


def cosine(x: float) -> float:
    """Slow first: a quarter of a cosine wave; ``1 − cosine(x)`` is the usual share of what is still masked.

    >>> [round(cosine(x), 3) for x in (0.0, 0.5, 1.0)]
    [0.0, 0.293, 1.0]
    """
    return 1.0 if x == 1 else 1 - math.cos(0.5 * math.pi * _share(x))


SHAPES: dict[str, Shape] = {"linear": linear, "cubic": cubic, "sine": sine, "cosine": cosine}


def ramp(x: float, start: float, end: float, shape: Shape = linear) -> float:
    """The value at share x of the way from `start` to `end`: both ends exact, and never past them.

    >>> ramp(0.5, 1.0, 0.0, cubic)
    0.125
    """
    if x == 1:
        return end
    value = start + shape(x) * (end - start)
    return min(value, end) if end >= start else max(value, end)


@dataclass(frozen=True)
class SineStages:
    """A factor that rises in stages: 0 before `start`, flat at the first peak, then from peak to peak along half sine waves.

    ProSparse's λ (arXiv 2402.13516, algorithm 1). Equal peaks make a stage of constant value. After the last stage its
    peak stays.

    Attributes:
        peaks: λ₁ ≤ … ≤ λ_S, one for each stage, not negative.
        ends: T₁ < … < T_S, where the stages end, in steps (or in any other unit of time).
        start: T₀, up to which the factor is 0.

    Raises:
        InputError: not one end for each peak, ends that don't rise from `start`, peaks that fall, or values not finite.

    >>> stages = SineStages(peaks=(0.1, 0.5, 0.5), ends=(10, 30, 40))
    >>> [round(stages(t), 3) for t in (0, 10, 20, 30, 35, 100)]
    [0.1, 0.1, 0.3, 0.5, 0.5, 0.5]
    """

    peaks: tuple[float, ...]
    ends: tuple[float, ...]
    start: float = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "peaks", tuple(self.peaks))
        object.__setattr__(self, "ends", tuple(self.ends))
        if len(self.peaks) != len(self.ends) or not self.peaks:
            raise InputError(f"stages have one end for each peak, got {len(self.peaks)} peaks, {len(self.ends)} ends")
        if not all(math.isfinite(value) for value in (*self.peaks, *self.ends, self.start)):
            raise InputError("peaks and ends of stages must be finite")
        borders = (self.start, *self.ends)
        if self.start < 0 or any(a >= b for a, b in itertools.pairwise(borders)):
            raise InputError(f"stages must end one after the other, from {self.start:g} on; got {list(self.ends)}")
        if self.peaks[0] < 0 or any(a > b for a, b in itertools.pairwise(self.peaks)):
            raise InputError(f"peaks of stages must not be negative and must not fall, got {list(self.peaks)}")

    def __call__(self, t: float) -> float:
        """λ at time t (after so many steps, the current one counted)."""
        if not t >= 0:
            raise InputError(f"time must not be negative, got {t:g}")
        if self.start and t <= self.start:
            return 0.0
        if t <= self.ends[0]:
            return self.peaks[0]
        for i in range(1, len(self.ends)):
            if t <= self.ends[i]:
                x = (t - self.ends[i - 1]) / (self.ends[i] - self.ends[i - 1])
                return ramp(x, self.peaks[i - 1], self.peaks[i], sine)
        return self.peaks[-1]
