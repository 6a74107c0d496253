"""What the page's plots are drawn from: a mark for each row, and the data that page.js reads."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gossamer.measure.report.findings import Metric, Value, centre, is_dense, metrics, noise, of_quality, task_names
from gossamer.measure.report.numbers import KL_FLOOR, percent
from gossamer.measure.results import Comparison, MethodResult, Selection, Spread

# Base64 characters that the pictures may take, so that a page stays below 6 MB with plotly.js in it.
PICTURE_BYTES = 800_000
# Okabe and Ito's colours, in an order that keeps neighbours apart, and as many marker shapes as there may be rows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
_SHAPES = ("circle", "diamond", "triangle-up", "square", "triangle-down", "pentagon", "hexagon", "star")
_DENSE_COLOUR = "#5b6570"
_BASELINE_SHAPES = tuple(f"{shape}-open" for shape in _SHAPES)


# Marks: one shape and colour a row, the same in every plot and table


def marks_of(comparison: Comparison) -> list[tuple[str, str]]:
    """Plotly symbol and colour of each row: filled for methods, open for baselines, grey for dense."""
    marks, shape, dense = [], 0, 0
    for row in comparison.methods:
        if is_dense(row):
            marks.append((("x-thin-open", "cross-thin-open", "asterisk-open")[dense % 3], _DENSE_COLOUR))
            dense += 1
            continue
        shapes = _BASELINE_SHAPES if row.baseline else _SHAPES
        marks.append((shapes[shape % len(shapes)], _COLOURS[shape % len(_COLOURS)]))
        shape += 1
    return marks


def icon(mark: tuple[str, str]) -> str:
    """The row's mark as a small SVG picture."""
    symbol, colour = mark
    is_open = symbol.endswith("-open")
    fill = "none" if is_open else colour
    return (
        f'<svg class=mark width="16" height="16" viewBox="0 0 16 16" aria-hidden="true" fill="{fill}" '
        f'stroke="{colour}" stroke-width="1.6">{_OUTLINES[symbol.removesuffix("-open")]}</svg>'
    )


def _polygon(corners: int, turn: float = 0.0, inner: float | None = None) -> str:
    """SVG points of a regular polygon (or star) in a 16-pixel box."""
    steps = corners if inner is None else 2 * corners
    points = []
    for i in range(steps):
        radius = 6.2 if inner is None or i % 2 == 0 else 6.2 * inner
        angle = 2 * math.pi * i / steps + turn - math.pi / 2
        points.append(f"{8 + radius * math.cos(angle):.1f},{8 + radius * math.sin(angle):.1f}")
    return " ".join(points)


_OUTLINES = {
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<rect x="3.5" y="3.5" width="9" height="9"/>',
    "diamond": f'<polygon points="{_polygon(4)}"/>',
    "triangle-up": f'<polygon points="{_polygon(3)}"/>',
    "triangle-down": f'<polygon points="{_polygon(3, math.pi)}"/>',
    "pentagon": f'<polygon points="{_polygon(5)}"/>',
    "hexagon": f'<polygon points="{_polygon(6)}"/>',
    "star": f'<polygon points="{_polygon(5, inner=0.45)}"/>',
    "x-thin": '<path d="M4 4L12 12M12 4L4 12"/>',
    "cross-thin": '<path d="M8 2.5V13.5M2.5 8H13.5"/>',
    "asterisk": '<path d="M4 4L12 12M12 4L4 12M8 2.5V13.5M2.5 8H13.5"/>',
}


# What the script draws


def page_data(comparison: Comparison, marks: list[tuple[str, str]]) -> dict[str, Any]:
    """Everything that page.js draws, JSON types only."""
    tasks = task_names(comparison)
    axes: list[tuple[Metric, str]] = [
        (metric, unit)
        for key, unit in (("kl", "log"), ("agreement", "percent"), ("perplexity", "number"))
        for metric in (metrics(comparison)[key],)
    ]
    axes += [(Metric(f"task:{task}", f"{task} accuracy", False, _task(task)), "percent") for task in tasks]
    if len(tasks) > 1:
        axes.append((Metric("tasks", "mean task accuracy", False, metrics(comparison)["tasks"].of), "percent"))
    costs = [(metrics(comparison)["bytes_read"], "bytes"), (metrics(comparison)["token_ms"], "ms")]

    def point(metric: Metric, row: MethodResult) -> list[float | None] | None:
        value = None if row.error is not None else metric.of(row)
        if value is None and row.error is None and is_dense(row):
            value = {"kl": 0.0, "agreement": 1.0}.get(metric.key)  # the reference itself
        if value is None or not math.isfinite(centre(value)):
            return None
        if isinstance(value, Spread):
            return [value.median, value.low, value.high]
        doubt = noise(value) if math.isfinite(noise(value)) else 0.0
        return [centre(value), centre(value) - doubt, centre(value) + doubt]

    rows = []
    for row, (symbol, colour) in zip(comparison.methods, marks, strict=True):
        rows.append(
            {
                "label": row.label,
                "dense": is_dense(row),
                "baseline": row.baseline,
                "symbol": symbol,
                "colour": colour,
                "points": {metric.key: point(metric, row) for metric, _ in [*axes, *costs]},
                "time": _time_parts(comparison, row),
            }
        )
    return {
        "context": comparison.context,
        "klFloor": KL_FLOOR,
        "rows": rows,
        "quality": [_axis(metric, unit) for metric, unit in axes],
        "cost": [_axis(metric, unit) for metric, unit in costs],
        "selections": _pictures(comparison),
    }


def _task(name: str) -> Callable[[MethodResult], Value | None]:
    return of_quality(lambda q: q.tasks.get(name))


def _axis(metric: Metric, unit: str) -> dict[str, Any]:
    return {"key": metric.key, "title": metric.title, "lowIsGood": metric.low_is_good, "unit": unit}


def _time_parts(comparison: Comparison, row: MethodResult) -> dict[str, Any] | None:
    cost = row.cost
    if row.error is not None or cost is None or cost.token_ms is None or not math.isfinite(cost.token_ms.median):
        return None
    least = None
    if comparison.bandwidth_gbs and cost.weight_bytes_read:
        least = (cost.weight_bytes_read + cost.bytes_read) / (comparison.bandwidth_gbs * 1e9) * 1e3
    parts: dict[str, float | None] = {"model": None, "attention": None, "overhead": None}
    if cost.attention_ms is not None:
        overhead = min(cost.overhead_ms or 0.0, cost.attention_ms.median)
        kernels = cost.attention_ms.median - overhead
        parts = {"model": cost.model_ms, "attention": kernels, "overhead": overhead}
    return {"total": cost.token_ms.median, **parts, "least": least}


def _pictures(comparison: Comparison) -> list[dict[str, Any]]:
    """Selections as 16-bit numbers; neighbouring bins are averaged where all together would be too large."""
    found = [(i, m.selection) for i, m in enumerate(comparison.methods) if m.selection is not None and m.error is None]
    found = [(i, s) for i, s in found if s.layers and s.heads and s.bins]
    merge, total = 1, sum(len(s.layers) * s.heads * s.bins for _, s in found)
    while total / merge * 8 / 3 > PICTURE_BYTES:
        merge *= 2
    return [_picture(i, comparison.methods[i].label, s, merge) for i, s in found]


def _picture(row: int, label: str, selection: Selection, merge: int) -> dict[str, Any]:
    density = np.nan_to_num(np.asarray(selection.density, dtype=np.float64)).clip(0, 1)
    mean = density.mean(axis=(0, 1))
    bins = density.shape[2]
    starts = list(range(0, bins, merge))
    sizes = np.diff([*starts, bins])
    merged = np.add.reduceat(density, starts, axis=2) / sizes
    stored = np.rint(merged * 65535).astype("<u2")
    summary = f"reads {percent(float(mean.mean()))} of the rows; {percent(float(mean[0]))} of the first stretch, "
    summary += f"{percent(float(mean[-1]))} of the last"
    if bins > 2:
        summary += f", {percent(float(mean[1:-1].mean()))} between"
    return {
        "row": row,
        "label": label,
        "summary": summary,
        "layers": selection.layers,
        "heads": selection.heads,
        "edges": [start / bins for start in starts] + [1.0],
        "merged": merge,
        "density": base64.b64encode(stored.tobytes()).decode("ascii"),
    }
