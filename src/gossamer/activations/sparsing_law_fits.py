"""The sparsing laws: how the activation ratio A goes with training tokens, and with a model's width over its depth.

    ReLU:  A(D) = exp(−c·D^α + b) + A₀      falls to A₀           D = tokens / 10⁹
    SiLU:  A(D) = −c / D^α + A₀             rises to A₀           α, c, A₀ > 0
    shape: A₀(w) = a + s·min(w, w₀)         w = hidden size / layers; linear, then flat

The laws are fitted by Levenberg–Marquardt least squares in float64, from several starts: given α (and A₀) what is left is
linear, so each start is a linear solution on a grid. Positive parameters are fitted by their logarithms. Leave the points of
the warm-up out.

law = fit_activation_law(tokens, ratios, kind="silu"); law.limit, law.r2, law([1e9, 1e10])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import InputError

Kind = Literal["relu", "silu"]

_ALPHAS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
# A₀ of a start, as a share of the least ratio seen.
_LIMITS = (0.3, 0.6, 0.8, 0.9, 0.97, 0.995)
_STARTS = 5


@dataclass(frozen=True)
class ActivationLaw:
    """A fitted or published law; call it with numbers of tokens.

    Attributes:
        kind: `relu` (falling) or `silu` (rising).
        alpha, c: of the formulas above.
        limit: A₀, the ratio after endless training.
        b: of the falling law.
        r2: share of the points' variance that it explains; None for a published one.

    >>> law = ActivationLaw("silu", alpha=0.5, c=0.1, limit=0.4)
    >>> [round(a, 3) for a in law([1e9, 4e9]).tolist()]
    [0.3, 0.35]
    """

    kind: Kind
    alpha: float
    c: float
    limit: float
    b: float = 0.0
    r2: float | None = None

    def __call__(self, tokens: Tensor | Sequence[float]) -> Tensor:
        """Activation ratio after so many tokens, float64."""
        power = (torch.as_tensor(tokens, dtype=torch.float64) / 1e9) ** self.alpha
        if self.kind == "relu":
            return torch.exp(-self.c * power + self.b) + self.limit
        return -self.c / power + self.limit


#: The paper's fits at PPL-1%, by size and activation: literature, not measured here.
PUBLISHED: dict[tuple[str, Kind], ActivationLaw] = {
    ("0.1B", "relu"): ActivationLaw("relu", 0.101, 3.20, 0.0614, -0.0151),
    ("0.2B", "relu"): ActivationLaw("relu", 0.449, 0.286, 0.0674, -3.05),
    ("0.4B", "relu"): ActivationLaw("relu", 0.683, 0.0790, 0.0690, -3.46),
    ("0.8B", "relu"): ActivationLaw("relu", 1.01, 7.97e-3, 0.0721, -3.49),
    ("1.2B", "relu"): ActivationLaw("relu", 1.33, 9.03e-4, 0.0782, -3.89),
    ("2.4B", "relu"): ActivationLaw("relu", 1.53, 1.56e-4, 0.0648, -3.46),
    ("0.1B", "silu"): ActivationLaw("silu", 0.479, 0.102, 0.409),
    ("0.2B", "silu"): ActivationLaw("silu", 0.844, 0.208, 0.390),
    ("0.4B", "silu"): ActivationLaw("silu", 1.03, 0.420, 0.385),
    ("0.8B", "silu"): ActivationLaw("silu", 0.995, 0.562, 0.383),
    ("1.2B", "silu"): ActivationLaw("silu", 0.967, 0.538, 0.382),
}


def levenberg_marquardt(
    residuals: Callable[[Tensor], Tensor], start: Tensor, steps: int = 500, tolerance: float = 1e-15
) -> tuple[Tensor, float]:
    """Least squares from one start: (parameters, sum of squares), float64.

    The damping falls tenfold after a step that helped and rises tenfold after one that did not; the damped normal equations
    are scaled by their diagonal (Marquardt), so that parameters of any size move alike.

    Args:
        residuals: differentiable, ``[n_parameters] → [n_points]``.
        tolerance: stop where a step lowers the sum by less than this share.

    >>> x = torch.arange(4.0, dtype=torch.float64)
    >>> found, rest = levenberg_marquardt(lambda p: p[0] * x + p[1] - (2 * x + 1), torch.zeros(2, dtype=torch.float64))
    >>> [round(v, 6) for v in found.tolist()]
    [2.0, 1.0]
    """
    at, damping = start.double(), 1e-3
    value = residuals(at)
    cost = float(value @ value)
    for _ in range(steps):
        slope = torch.autograd.functional.jacobian(residuals, at)
        assert isinstance(slope, Tensor)
        normal, down = slope.T @ slope, slope.T @ value
        better = False
        while damping < 1e12 and not better:
            damped = normal + damping * torch.diag(normal.diagonal().clamp_min(1e-30))
            step, failed = torch.linalg.solve_ex(damped, -down)
            if not bool(failed):
                tried = residuals(at + step)
                new = float(tried @ tried)
                better = math.isfinite(new) and new < cost
            damping = damping / 10 if better else damping * 10
        if not better:
            break
        gain, cost, value, at = cost - new, new, tried, at + step
        if gain <= tolerance * cost:
            break
        damping = max(damping, 1e-12)
    return at, cost


def fit_activation_law(tokens: Sequence[float], ratios: Sequence[float], kind: Kind) -> ActivationLaw:
    """Fit a law to activation ratios in the course of a training, warm-up left out.

    Args:
        tokens: tokens seen, all different, above 0.
        ratios: A at each, in 0 … 1.
        kind: the law: `relu` falls (4 parameters), `silu` rises (3).

    Raises:
        InputError: too few points, lengths that differ, numbers out of range, or an unknown kind.
    """
    x, y = torch.tensor(tokens, dtype=torch.float64), torch.tensor(ratios, dtype=torch.float64)
    needed = {"relu": 4, "silu": 3}.get(kind)
    if needed is None:
        raise InputError(f"there are the laws relu and silu, not {kind!r}")
    if x.dim() != 1 or x.shape != y.shape or len(x) < needed or len(x.unique()) < len(x):
        raise InputError(f"the {kind} law needs at least {needed} points of different tokens, each with one ratio")
    if not bool(torch.isfinite(x).all() and (x > 0).all() and (y >= 0).all() and (y <= 1).all()):
        raise InputError("tokens must be above 0 and finite, activation ratios between 0 and 1")
    d = x / 1e9
    starts = _falling_starts(d, y) if kind == "relu" else _rising_starts(d, y)

    def curve(q: Tensor) -> Tensor:
        # q = ln α, ln c, ln A₀ (, b): what must be positive cannot be otherwise
        power = d ** q[0].exp()
        if kind == "relu":
            return torch.exp(-q[1].exp() * power + q[3]) + q[2].exp()
        return -q[1].exp() / power + q[2].exp()

    total = float(((y - y.mean()) ** 2).sum())
    best, rest = starts[0], math.inf
    for start in starts:
        found, cost = levenberg_marquardt(lambda q: curve(q) - y, start)
        if cost < rest:
            best, rest = found, cost
        if rest <= 1e-20 * total:  # points without noise: nothing is left to find
            break
    alpha, c, limit = best[:3].exp().tolist()
    r2 = 1 - rest / total if total > 0 else 0.0
    return ActivationLaw(kind, alpha, c, limit, float(best[3]) if kind == "relu" else 0.0, r2)


def _rising_starts(d: Tensor, y: Tensor) -> list[Tensor]:
    """Given α, A is linear in c and A₀."""
    ranked = []
    for alpha in _ALPHAS:
        columns = torch.stack([-(d**-alpha), torch.ones_like(d)], 1)
        c, limit = torch.linalg.lstsq(columns, y).solution.clamp_min(1e-9).tolist()
        error = float(((columns @ torch.tensor([c, limit], dtype=torch.float64) - y) ** 2).sum())
        ranked.append((error, [math.log(alpha), math.log(c), math.log(limit)]))
    return [torch.tensor(q, dtype=torch.float64) for _, q in sorted(ranked)[:_STARTS]]


def _falling_starts(d: Tensor, y: Tensor) -> list[Tensor]:
    """Given α and A₀, ln(A − A₀) is linear in c and b."""
    least, ranked = max(float(y.min()), 1e-6), []
    for alpha in _ALPHAS:
        for share in _LIMITS:
            limit = least * share
            columns = torch.stack([-(d**alpha), torch.ones_like(d)], 1)
            above = (y - limit).clamp_min(1e-9).log()
            c, b = torch.linalg.lstsq(columns, above).solution.tolist()
            c = max(c, 1e-9)
            error = float(((torch.exp(-c * d**alpha + b) + limit - y) ** 2).sum())
            ranked.append((error, [math.log(alpha), math.log(c), math.log(limit), b]))
    ranked = [r for r in ranked if math.isfinite(r[0])]
    return [torch.tensor(q, dtype=torch.float64) for _, q in sorted(ranked)[:_STARTS]]


@dataclass(frozen=True)
class ShapeLaw:
    """Limit ratio against width over depth: ``flat + slope·min(w − bend, 0)``.

    Attributes:
        slope: of the linear part. flat: the ratio beyond the bend. bend: w₀. r2: share of variance explained.

    >>> law = ShapeLaw(slope=0.0005, flat=0.08, bend=114.0, r2=1.0)
    >>> [round(a, 3) for a in law([54, 114, 200]).tolist()]
    [0.05, 0.08, 0.08]
    """

    slope: float
    flat: float
    bend: float
    r2: float

    def __call__(self, shapes: Tensor | Sequence[float]) -> Tensor:
        """Ratio at these widths over depths, float64."""
        w = torch.as_tensor(shapes, dtype=torch.float64)
        return self.flat + self.slope * (w - self.bend).clamp_max(0)


def fit_shape_law(shapes: Sequence[float], ratios: Sequence[float]) -> ShapeLaw:
    """The continuous linear-then-flat fit with the least squares, exactly.

    For each place of the bend, a line through the points before it and a level through those after it are fitted apart; where
    they meet between the right points that is the best bend there, else the best one is a point.

    Raises:
        InputError: fewer than four points, lengths that differ, equal shapes, or numbers that are not finite.
    """
    w, y = torch.tensor(shapes, dtype=torch.float64), torch.tensor(ratios, dtype=torch.float64)
    if w.dim() != 1 or w.shape != y.shape or len(w) < 4 or len(w.unique()) < len(w):
        raise InputError("the law of width over depth needs at least four different shapes, each with one ratio")
    if not bool(torch.isfinite(w).all() and torch.isfinite(y).all()):
        raise InputError("shapes and ratios must be finite")
    order = w.argsort()
    w, y = w[order], y[order]
    ones, found = torch.ones_like(w), []

    def consider(bend: float) -> None:
        columns = torch.stack([(w - bend).clamp_max(0), ones], 1)
        slope, flat = torch.linalg.lstsq(columns, y).solution.tolist()
        rest = float(((columns @ torch.tensor([slope, flat], dtype=torch.float64) - y) ** 2).sum())
        found.append((rest, slope, flat, bend))

    for k in range(2, len(w)):
        slope, start = torch.linalg.lstsq(torch.stack([w[:k], ones[:k]], 1), y[:k]).solution.tolist()
        meet = (float(y[k:].mean()) - start) / slope if slope else math.inf
        if float(w[k - 1]) <= meet <= float(w[k]):
            consider(meet)
        consider(float(w[k - 1]))
    consider(float(w[-1]))
    rest, slope, flat, bend = min(found)
    total = float(((y - y.mean()) ** 2).sum())
    return ShapeLaw(slope, flat, bend, 1 - rest / total if total > 0 else 0.0)
