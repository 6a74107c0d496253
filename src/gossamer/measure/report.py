"""A comparison for people: a table in the terminal, Markdown, and one HTML file with the pictures.

    table(comparison)
    html(comparison, "report.html")

Nothing is measured here, and nothing is shown that was not. Two values count as different when they lie at least two
standard errors of their difference apart; a tie earns no emphasis, and `remarks` says which ties there are.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gossamer.measure.results import (
    Comparison,
    Cost,
    Estimate,
    MethodResult,
    Quality,
    Selection,
    Spread,
    write_whole,
)

Value = Estimate | Spread | float

# A KL divergence below this is rounding, not method: it is shown as zero.
KL_FLOOR = 1e-6
# Base64 characters that the pictures may take, so that a page stays below 6 MB with plotly.js in it.
PICTURE_BYTES = 800_000

_ORACLES = frozenset({"exact-top-k"})
# The terminal's table: spaces between columns, the name's width worth dropping a column for, and what goes first.
_GAP = 2
_NAME_WIDTH = 20
_DISPENSABLE = ("perplexity", "held", "agreement", "tasks")
_SPELLED = {"perplexity": "perplexity", "held": "bytes held"}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as people read them


def human_bytes(count: float | None) -> str:
    """Three significant digits and a binary unit.

    >>> human_bytes(1536), human_bytes(0), human_bytes(None)
    ('1.50 KiB', '0 B', '–')
    """
    if count is None or not math.isfinite(count):
        return "–"
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = 0
    while power < len(units) - 1 and abs(count) >= 999.5:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{_significant(count)} {units[power]}"


def percent(share: float | None) -> str:
    """A share as per cent; one decimal below 10 %.

    >>> percent(0.0625), percent(0.987), percent(1.0)
    ('6.2 %', '98.7 %', '100 %')
    """
    if share is None or not math.isfinite(share):
        return "–"
    value = 100 * share
    if 0 < abs(value) < 0.095:
        return f"{value:.2g} %"
    return f"{value:.0f} %" if value >= 99.95 or value == 0 else f"{value:.1f} %"


def milliseconds(value: float | None) -> str:
    """Three significant digits, without a unit.

    >>> milliseconds(31.42), milliseconds(1234.5)
    ('31.4', '1234')
    """
    return "–" if value is None or not math.isfinite(value) else _significant(value)


def _significant(value: float) -> str:
    """Three significant digits, no exponent above a thousandth."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.2e}" if size < -4 else f"{value:.{max(0, 2 - size)}f}"


def _with_error(estimate: Estimate) -> tuple[str, str]:
    """Mean and standard error, both cut where the error's second digit stands; the error may be empty."""
    mean, error = estimate.mean, estimate.stderr
    if not math.isfinite(mean):
        return ("∞" if mean > 0 else "–"), ""
    if not math.isfinite(error) or error <= 0:
        return _significant(mean), ""
    if abs(mean) < 1e-4:
        return f"{mean:.1e}", f"{error:.0e}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:.{digits}f}", f"{error:.{digits}f}"


def _perplexity(mean: float) -> str:
    return f"{mean:.2f}" if mean < 100 else _with_error(Estimate(mean, 0.0, 1))[0]


def _kl(estimate: Estimate) -> tuple[str, str]:
    return ("0", "") if abs(estimate.mean) <= KL_FLOOR else _with_error(estimate)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# What differs and what does not


def noise(value: Value) -> float:
    """Standard error of a measured value; 0 for counted ones; NaN where it is unknown."""
    return value.stderr if isinstance(value, Estimate | Spread) else 0.0


def centre(value: Value) -> float:
    """The number itself."""
    if isinstance(value, Estimate):
        return value.mean
    return value.median if isinstance(value, Spread) else value


def differ(a: Value, b: Value) -> bool:
    """Whether the two lie at least two standard errors of their difference apart.

    An unknown error cannot show a difference. Estimates on the same prompts are treated as independent, which errs
    towards calling a difference noise.

    >>> differ(Estimate(1.0, 0.1, 9), Estimate(1.2, 0.1, 9)), differ(1.0, 1.1)
    (False, True)
    """
    gap, doubt = abs(centre(a) - centre(b)), 2 * math.hypot(noise(a), noise(b))
    return gap > 0 and gap >= doubt  # False for NaN


def is_dense(row: MethodResult) -> bool:
    """Whether the row reads everything: our own dense kernel, or transformers as it is."""
    return row.slug == "dense" or row.slug.startswith("transformers")


def contenders(comparison: Comparison) -> list[MethodResult]:
    """The rows that claim a saving: measured, not dense, not the oracle that reads every key to choose."""
    return [m for m in comparison.methods if m.error is None and not is_dense(m) and m.slug not in _ORACLES]


def mean_of_tasks(quality: Quality | None, tasks: Sequence[str]) -> Estimate | None:
    """Mean accuracy; None where a task is missing, since such means do not compare."""
    if quality is None or not tasks or any(task not in quality.tasks for task in tasks):
        return None
    found = [quality.tasks[task] for task in tasks]
    if len(found) == 1:
        return found[0]
    error = math.sqrt(sum(e.stderr**2 for e in found)) / len(found)
    return Estimate(sum(e.mean for e in found) / len(found), error, sum(e.n for e in found))


@dataclass(frozen=True)
class Metric:
    """One thing to compare by."""

    key: str
    title: str
    low_is_good: bool
    of: Callable[[MethodResult], Value | None]

    def best(self, rows: Iterable[MethodResult]) -> tuple[MethodResult | None, list[MethodResult]]:
        """The best row and those that cannot be told from it."""
        known = [(row, value) for row in rows if (value := self.of(row)) is not None and not math.isnan(centre(value))]
        if not known:
            return None, []
        known.sort(key=lambda item: centre(item[1]) * (1 if self.low_is_good else -1))
        first, value = known[0]
        return first, [row for row, other in known[1:] if not differ(value, other)]


def _cost(read: Callable[[Cost], Value | None]) -> Callable[[MethodResult], Value | None]:
    return lambda row: read(row.cost) if row.cost is not None else None


def _quality(read: Callable[[Quality], Estimate | None]) -> Callable[[MethodResult], Value | None]:
    return lambda row: read(row.quality) if row.quality is not None else None


def metrics(comparison: Comparison) -> dict[str, Metric]:
    """Everything that this comparison can be ranked by."""
    tasks = _tasks(comparison)
    found = [
        Metric("kl", "KL from dense", True, _quality(lambda q: q.kl)),
        Metric("agreement", "same token as dense", False, _quality(lambda q: q.agreement)),
        Metric("perplexity", "perplexity", True, _quality(lambda q: q.perplexity)),
        Metric("tasks", "task accuracy", False, lambda row: mean_of_tasks(row.quality, tasks)),
        Metric("token_ms", "time per token", True, _cost(lambda c: c.token_ms)),
        Metric("bytes_read", "bytes read per token", True, _cost(lambda c: c.bytes_read)),
        Metric("held", "bytes held", True, _cost(lambda c: float(c.kv_bytes_held + c.extra_bytes_held))),
    ]
    return {metric.key: metric for metric in found}


def _tasks(comparison: Comparison) -> list[str]:
    names: dict[str, None] = {}
    for row in comparison.methods:
        if row.quality is not None:
            names |= dict.fromkeys(row.quality.tasks)
    return list(names)


def winners(comparison: Comparison) -> dict[str, MethodResult]:
    """By metric, the contender that beats every other contender by more than noise; a tie has no winner."""
    rows, won = contenders(comparison), {}
    for key, metric in metrics(comparison).items():
        first, ties = metric.best(rows)
        if first is not None and not ties and sum(metric.of(row) is not None for row in rows) > 1:
            won[key] = first
    return won


# ---------------------------------------------------------------------------------------------------------------------
# Remarks


@dataclass(frozen=True)
class Remark:
    """One sentence for the reader.

    Attributes:
        kind: `pay` where a method does not pay and why, `noise` for ties, `method` for its own note, `error` if it
            did not run.
        text: the sentence.
    """

    kind: Literal["pay", "noise", "method", "error"]
    text: str


def remarks(comparison: Comparison) -> list[Remark]:
    """What the numbers do not say by themselves: failures, where a method does not pay and why, ties, notes."""
    found = [Remark("error", f"{m.label} did not run: {_one_line(m.error)}") for m in comparison.methods if m.error]
    found += [Remark("pay", text) for text in _where_it_does_not_pay(comparison)]
    found += [Remark("noise", text) for text in _ties(comparison)]
    notes: dict[str, list[str]] = {}
    for row in comparison.methods:
        for note in row.notes:
            notes.setdefault(_one_line(note), []).append(row.label)
    found += [Remark("method", f"{_listed(labels)}: {note}") for note, labels in notes.items()]
    return found


def yardstick(comparison: Comparison) -> MethodResult | None:
    """The row to judge a method's time by: our own dense kernel where it ran, else the reference."""
    for row in comparison.methods:
        if row.slug == "dense" and row.error is None and row.cost is not None and row.cost.token_ms is not None:
            return row
    row_or_none = comparison.reference_row
    return row_or_none if row_or_none is not None and row_or_none.cost is not None else None


def _ceiling(row: MethodResult | None) -> tuple[float, float] | None:
    """Attention's share of a step, and how much faster the step were with free attention."""
    if row is None or row.cost is None or row.cost.attention_ms is None or row.cost.token_ms is None:
        return None
    step = row.cost.token_ms.median
    share = row.cost.attention_ms.median / step if step > 0 else math.nan
    return (share, 1 / (1 - share)) if 0 <= share < 1 else None


def _where_it_does_not_pay(comparison: Comparison) -> list[str]:
    found = []
    base = yardstick(comparison)
    ceiling = _ceiling(base)
    if base is not None and base.cost is not None and ceiling is not None:
        share, gain = ceiling
        found.append(
            f"At {comparison.context:,} tokens attention is {percent(share)} of a decode step of {base.label}: "
            f"attention that cost nothing would make the step {gain:.2f} times faster, no more."
        )
    for row in contenders(comparison):
        if row.cost is None:
            continue
        if base is not None and base.cost is not None:
            found += _slower(row, row.cost, base, base.cost)
        share_read = row.cost.share_read
        if share_read is not None and share_read >= 1:
            found.append(f"{row.label} reads {share_read:.2f} times what dense attention reads: it saves no traffic.")
        held = row.cost.kv_bytes_held + row.cost.extra_bytes_held
        if base is not None and base.cost is not None and 0 < base.cost.kv_bytes_held < held:
            more = held / base.cost.kv_bytes_held - 1
            found.append(
                f"{row.label} holds {percent(more)} more than dense: it keeps all keys and values, and "
                f"{human_bytes(row.cost.extra_bytes_held)} to choose among them."
            )
    return found


def _slower(row: MethodResult, cost: Cost, base: MethodResult, dense: Cost) -> list[str]:
    """Why a method gains no time, as far as the measured parts tell."""
    if cost.token_ms is None or dense.token_ms is None:
        return []
    ours, theirs = cost.token_ms.median, dense.token_ms.median
    if ours < theirs and differ(cost.token_ms, dense.token_ms):
        return []
    slower = differ(cost.token_ms, dense.token_ms)
    verdict = "is slower than" if slower else "is not measurably faster than"
    text = f"{row.label} {verdict} {base.label} ({milliseconds(ours)} against {milliseconds(theirs)} ms a token)"
    if cost.attention_ms is None or dense.attention_ms is None:
        return [f"{text}."]
    a, b = cost.attention_ms.median, dense.attention_ms.median
    if a < b:
        return [f"{text}: its attention saves {milliseconds(b - a)} ms of a {milliseconds(theirs)} ms step."]
    text += f": its attention takes {milliseconds(a)} ms against {milliseconds(b)}"
    if (cost.overhead_ms or 0) > (dense.overhead_ms or 0):
        text += f" (overhead {milliseconds(cost.overhead_ms)} against {milliseconds(dense.overhead_ms)})"
    if cost.share_read is not None and cost.share_read < 1:
        text += (
            f", although it reads {percent(cost.share_read)} of the bytes; choosing and gathering cost more than that "
            "saves here"
        )
    return [f"{text}."]


def _ties(comparison: Comparison) -> list[str]:
    found = []
    rows, reference = contenders(comparison), comparison.reference_row
    for key, metric in metrics(comparison).items():
        first, ties = metric.best(rows)
        if first is not None and ties and key not in ("bytes_read", "held"):
            names = _listed([first.label, *(row.label for row in ties)])
            found.append(f"Within noise of the best {metric.title}: {names}.")
    if reference is not None:
        for key in ("perplexity", "tasks", "token_ms"):
            metric = metrics(comparison)[key]
            if (theirs := metric.of(reference)) is None:
                continue
            same = [r.label for r in rows if (v := metric.of(r)) is not None and not differ(v, theirs)]
            if same:
                found.append(f"Within noise of {reference.label} in {metric.title}: {_listed(same)}.")
    return found


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


# ---------------------------------------------------------------------------------------------------------------------
# The table, for the terminal and for Markdown


@dataclass(frozen=True)
class _Cell:
    text: str
    detail: str = ""  # shown dimmed beside the value
    best: bool = False


_EMPTY = _Cell("–")
_REFERENCE = _Cell("ref.")


def _speed(row: MethodResult, reference: MethodResult | None) -> str:
    """How many times faster than the reference; ≈ where that is within noise."""
    if row is reference or reference is None or row.cost is None or reference.cost is None:
        return ""
    ours, theirs = row.cost.token_ms, reference.cost.token_ms
    if ours is None or theirs is None or ours.median <= 0:
        return ""
    return f"{'' if differ(ours, theirs) else '≈'}{theirs.median / ours.median:.2f}×"


def _cells(comparison: Comparison, row: MethodResult, won: dict[str, MethodResult]) -> dict[str, _Cell]:
    """The table's cells of one row, by column."""

    def mark(key: str, text: str, detail: str = "") -> _Cell:
        return _Cell(text, detail, best=won.get(key) is row)

    cells: dict[str, _Cell] = {}
    if (q := row.quality) is not None:
        if is_dense(row):
            cells |= dict.fromkeys(("kl", "agreement"), _REFERENCE)
        if q.kl is not None:
            text, error = _kl(q.kl)
            cells["kl"] = mark("kl", text, f"±{error}" if error else "")
        if q.agreement is not None:
            cells["agreement"] = mark("agreement", percent(q.agreement.mean))
        if q.perplexity is not None:
            cells["perplexity"] = mark("perplexity", _perplexity(q.perplexity.mean))
        if (accuracy := mean_of_tasks(q, _tasks(comparison))) is not None:
            cells["tasks"] = mark("tasks", percent(accuracy.mean))
    if (c := row.cost) is not None:
        if c.token_ms is not None:
            cells["token_ms"] = mark("token_ms", milliseconds(c.token_ms.median), _speed(row, comparison.reference_row))
        cells["bytes_read"] = mark(
            "bytes_read", human_bytes(c.bytes_read), percent(c.share_read) if c.share_read is not None else ""
        )
        cells["held"] = mark("held", human_bytes(c.kv_bytes_held + c.extra_bytes_held))
    return cells


def _columns(comparison: Comparison) -> dict[str, str]:
    """Heading by column; columns that no row fills are left out."""
    tasks = _tasks(comparison)
    titles = {
        "kl": "KL",
        "agreement": "same\ntoken",
        "perplexity": "perpl.",
        "tasks": tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks",
        "token_ms": "ms/token",
        "bytes_read": "read/token",
        "held": "held",
    }
    filled = {
        key for row in comparison.methods for key, cell in _cells(comparison, row, {}).items() if cell != _REFERENCE
    }
    return {key: title for key, title in titles.items() if key in filled}


def headline(comparison: Comparison) -> str:
    """What was measured, on what.

    >>> headline(Comparison("smollm2", 8192, 64, 0, "float32", 2, "1/16", {}, {}, "", None, [], "dense"))
    'Nothing measured on smollm2'
    """
    model = comparison.model
    if len(model) > 48:  # a path: its end says most
        model = model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    ran = [m for m in comparison.methods if m.error is None]
    if not ran:
        return f"Nothing measured on {model}"
    return f"{_count(len(ran), 'way')} to attend to {comparison.context:,} tokens with {model}"


def _setting(comparison: Comparison) -> str:
    return (
        f"budget {comparison.budget} · {comparison.dtype} · {_count(comparison.threads, 'thread')} · "
        f"{_count(comparison.decode_tokens, 'decode token')} · seed {comparison.seed}"
    )


def _legend(comparison: Comparison, hidden: Sequence[str] = ()) -> str:
    parts = ["± one standard error", "read/token: rows and what it takes to choose them, share of dense"]
    if comparison.reference_row is not None:
        parts.insert(1, f"×: times as fast as {comparison.reference_row.label}, ≈ within noise")
    if winners(comparison):
        parts.append("bold: best sparse method by more than noise")
    if hidden:
        parts.append(f"a wider terminal also shows {_listed(list(hidden))}")
    return " · ".join(parts)


def table(comparison: Comparison, console: Console | None = None) -> None:
    """Print the comparison; made for 100 columns, and leaves columns out where there are fewer."""
    console = console or Console()
    columns, won = _columns(comparison), winners(comparison)
    rows = [(row, {} if row.error is not None else _cells(comparison, row, won)) for row in comparison.methods]
    longest = max((len(_one_line(row.label)) for row in comparison.methods), default=0)
    hidden = []
    while _room_for_names(columns, rows, console.width) < min(longest, _NAME_WIDTH) and len(columns) > 1:
        dropped = next((key for key in _DISPENSABLE if key in columns), list(columns)[-1])
        hidden.append(_SPELLED.get(dropped) or columns[dropped].replace("\n", " "))
        del columns[dropped]
    console.print(Text(headline(comparison), style="bold"))
    console.print(Text(_setting(comparison), style="dim"))
    console.print()
    grid = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
    room = max(8, _room_for_names(columns, rows, console.width))
    grid.add_column("", no_wrap=True, overflow="ellipsis", max_width=room)
    for key, title in columns.items():
        grid.add_column(
            Text(title), justify="right", no_wrap=True, min_width=_width(key, title, rows), vertical="bottom"
        )
    for row, cells in rows:
        name = Text(_one_line(row.label), style="red" if row.error else "dim" if is_dense(row) else "")
        if row.error is not None:
            grid.add_row(name, *([Text("failed", style="red")] if columns else []))
            continue
        grid.add_row(name, *(_rich(cells.get(key, _EMPTY), _detail_width(key, rows)) for key in columns))
    console.print(grid)
    console.print()
    console.print(Text(_legend(comparison, hidden), style="dim"))
    found = remarks(comparison)
    if found:
        console.print()
    for remark in found:
        style = {"error": "red", "pay": "yellow"}.get(remark.kind, "dim")
        mark = Table.grid(padding=(0, 1, 0, 0))
        mark.add_row(Text("!" if remark.kind == "error" else "•", style=style), Text(remark.text))
        console.print(mark)


_Rows = Sequence[tuple[MethodResult, dict[str, _Cell]]]


def _detail_width(key: str, rows: _Rows) -> int:
    return max((len(cells[key].detail) for _, cells in rows if key in cells), default=0)


def _width(key: str, title: str, rows: _Rows) -> int:
    value = max((len(cells[key].text) for _, cells in rows if key in cells), default=0)
    detail = _detail_width(key, rows)
    return max(value + (detail + 1 if detail else 0), *(len(line) for line in title.splitlines()))


def _room_for_names(columns: dict[str, str], rows: _Rows, width: int) -> int:
    return width - sum(_width(key, title, rows) + _GAP for key, title in columns.items())


def _rich(cell: _Cell, detail_width: int) -> Text:
    text = Text(cell.text, style="bold green" if cell.best else "")
    if detail_width:
        text.append(" ").append(cell.detail.rjust(detail_width), style="dim")
    return text


def to_markdown(comparison: Comparison) -> str:
    """The same table and remarks as Markdown."""
    columns, won = _columns(comparison), winners(comparison)
    titles = [title.replace("\n", " ") for title in columns.values()]
    lines = [f"**{_markdown(headline(comparison))}**", "", _markdown(_setting(comparison)), ""]
    lines.append("| method | " + " | ".join(_markdown(title) for title in titles) + " |")
    lines.append("| --- |" + " ---: |" * len(titles))
    for row in comparison.methods:
        cells = _cells(comparison, row, won)
        texts = []
        for key in columns:
            cell = cells.get(key, _EMPTY)
            whole = f"{cell.text} {cell.detail}".strip()
            texts.append(f"**{whole}**" if cell.best else whole)
        if row.error is not None:
            texts = ["failed", *[""] * (len(columns) - 1)] if columns else []
        lines.append(f"| {_markdown(_one_line(row.label))} | " + " | ".join(texts) + " |")
    lines += ["", _markdown(_legend(comparison)), ""]
    lines += [f"- {_markdown(remark.text)}" for remark in remarks(comparison)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(text: str) -> str:
    """Escape what Markdown or its HTML would read as markup."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---------------------------------------------------------------------------------------------------------------------
# The page

# Okabe and Ito's colours, in an order that keeps neighbours apart, and as many marker shapes as there may be rows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
_SHAPES = ("circle", "diamond", "triangle-up", "square", "triangle-down", "pentagon", "hexagon", "star")
_DENSE_COLOUR = "#5b6570"
_BASELINE_SHAPES = tuple(f"{shape}-open" for shape in _SHAPES)


def html(comparison: Comparison, path: str | Path) -> Path:
    """Write the page: one file that loads nothing, complete or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_whole(path, page(comparison))


def page(comparison: Comparison) -> str:
    """The page's text."""
    from plotly.offline import get_plotlyjs

    marks = _marks(comparison)
    fields = {
        "title": escape(f"{headline(comparison)} · Gossamer"),
        "css": _packaged("report.css"),
        "headline": escape(headline(comparison)),
        "lead": escape(_lead(comparison)),
        "facts": _facts(comparison),
        "findings": _findings(comparison),
        "quality_table": _quality_table(comparison, marks),
        "cost_table": _cost_table(comparison, marks),
        "time_caption": escape(_time_caption(comparison)),
        "remarks": _remarks_html(comparison),
        "literature": _literature(comparison),
        "setup": _setup(comparison),
        "plotly": str(get_plotlyjs()).replace("</script", "<\\/script"),
        "data": _script_json(_page_data(comparison, marks)),
        "script": _packaged("report.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], _packaged("report.html"))


def _packaged(name: str) -> str:
    return files("gossamer.measure").joinpath(name).read_text(encoding="utf-8")


def _script_json(data: Any) -> str:
    """JSON that no HTML parser mistakes for markup."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# Words


def _lead(comparison: Comparison) -> str:
    rows = contenders(comparison)
    reference = comparison.reference_row
    parts = []
    if rows:
        parts.append(f"The sparse methods read the key–value cache under a budget ({comparison.budget}).")
    if reference is not None:
        parts.append(f"All ran in one session on the same prompts, beside {reference.label}, which reads all of it.")
    if any(m.cost is not None for m in comparison.methods):
        parts.append("Times are medians over interleaved decode steps; bytes are counted, not estimated.")
    return " ".join(parts)


def _facts(comparison: Comparison) -> str:
    cpu = comparison.machine.get("cpu") or comparison.machine.get("processor")
    facts = [
        ("Model", comparison.model),
        ("Context", f"{comparison.context:,} tokens"),
        ("Decoded", f"{comparison.decode_tokens:,} tokens"),
        ("Number type", comparison.dtype),
        ("Machine", f"{cpu}, {_count(comparison.threads, 'thread')}" if cpu else _count(comparison.threads, "thread")),
        ("Read bandwidth", f"{comparison.bandwidth_gbs:.1f} GB/s" if comparison.bandwidth_gbs else ""),
        ("Date", comparison.created[:10]),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts if v)


def _findings(comparison: Comparison) -> str:
    """The three or four numbers to take home."""
    rows, all_metrics = contenders(comparison), metrics(comparison)
    cards: list[tuple[str, str, str]] = []

    def tied(ties: list[MethodResult]) -> str:
        names = [row.label for row in ties[:2]] + ([f"{len(ties) - 2} more"] if len(ties) > 2 else [])
        return f"; within noise of it: {_listed(names)}" if ties else ""

    first, ties = all_metrics["kl"].best(rows)
    if first is not None and first.quality is not None and first.quality.kl is not None:
        text, error = _kl(first.quality.kl)
        value = f"KL {text}{f' ± {error}' if error else ''}"
        same = first.quality.agreement
        also = f", same next token in {percent(same.mean)} of places" if same is not None else ""
        cards.append(("Closest to dense", value, f"{first.label}{also}{tied(ties)}"))
    first, ties = all_metrics["token_ms"].best(rows)
    if first is not None and first.cost is not None and first.cost.token_ms is not None:
        ratios = [f"{speed} as fast as {row.label}" for row in _beside(comparison) if (speed := _speed(first, row))]
        value = f"{milliseconds(first.cost.token_ms.median)} ms a token"
        speeds = f": {', '.join(ratios)}" if ratios else ""
        cards.append(("Fastest", value, f"{first.label}{_at_kl(first)}{speeds}{tied(ties)}"))
    first, ties = all_metrics["bytes_read"].best(rows)
    if first is not None and first.cost is not None:
        share = first.cost.share_read
        value = f"{percent(share)} of dense" if share is not None else human_bytes(first.cost.bytes_read)
        detail = f"{first.label}{_at_kl(first)}: {human_bytes(first.cost.bytes_read)} per token"
        if share is not None:
            detail += f" instead of {human_bytes(first.cost.dense_bytes_read)}"
        cards.append(("Fewest bytes read", value, detail + tied(ties)))
    base = yardstick(comparison)
    ceiling = _ceiling(base)
    if base is not None and ceiling is not None:
        share, gain = ceiling
        cards.append(
            ("Most there is to gain", f"{gain:.2f}×", f"attention is {percent(share)} of a step of {base.label}")
        )
    return "".join(
        f"<li><h3>{escape(title)}</h3><p class=value>{escape(value)}</p><p>{escape(detail)}</p></li>"
        for title, value, detail in cards
    )


def _at_kl(row: MethodResult) -> str:
    return f", at KL {_kl(row.quality.kl)[0]}" if row.quality is not None and row.quality.kl is not None else ""


def _beside(comparison: Comparison) -> list[MethodResult]:
    """Timed rows to give speeds against: the reference, our dense kernel, transformers as it is."""
    transformers = [row for row in comparison.methods if row.slug.startswith("transformers") and row.error is None]
    found: list[MethodResult] = []
    for row in (comparison.reference_row, yardstick(comparison), *transformers[:1]):
        if row is not None and row.cost is not None and row.cost.token_ms is not None and row not in found:
            found.append(row)
    return found


def _time_caption(comparison: Comparison) -> str:
    rows = [m for m in comparison.methods if m.cost is not None and m.cost.token_ms is not None]
    if not rows:
        return ""
    text = "Attention includes choosing what to read; overhead is what the plug point adds around the kernels."
    if comparison.bandwidth_gbs:
        text += (
            f" The black line is the least time that the step's bytes (weights and cache) take at the "
            f"{comparison.bandwidth_gbs:.1f} GB/s that this machine reads."
        )
    if any(m.cost is not None and m.cost.attention_ms is None for m in rows):
        text += " Bars in one piece were not measured in parts."
    return text


# Marks: one shape and colour a row, the same in every plot and table


def _marks(comparison: Comparison) -> list[tuple[str, str]]:
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


def _icon(mark: tuple[str, str]) -> str:
    symbol, colour = mark
    is_open = symbol.endswith("-open")
    fill = "none" if is_open else colour
    return (
        f'<svg class=mark width="16" height="16" viewBox="0 0 16 16" aria-hidden="true" fill="{fill}" '
        f'stroke="{colour}" stroke-width="1.6">{_OUTLINES[symbol.removesuffix("-open")]}</svg>'
    )


# Tables


@dataclass(frozen=True)
class _Column:
    group: str
    title: str
    unit: str


_NONE = "–"


def _method_table(
    caption: str,
    columns: Sequence[_Column],
    rows: Sequence[tuple[MethodResult, tuple[str, str], list[str]]],
    *,
    settings: bool,
) -> str:
    """A table with a row a method; columns in which no row has a value are left out."""
    if not rows:
        return f'<p class="empty">{escape(caption)}: no rows.</p>'
    used = [i for i in range(len(columns)) if any(cells and cells[i] != _td(_NONE) for _, _, cells in rows)]
    body = [
        _row_html(row, mark, [cells[i] for i in used] if cells else [], len(used), settings)
        for row, mark, cells in rows
    ]
    head = '<th scope="col">Method</th>' + "".join(
        f'<th scope="col">{escape(columns[i].title)}<small>{escape(columns[i].unit)}</small></th>' for i in used
    )
    groups = ""
    names = dict.fromkeys(columns[i].group for i in used)
    if any(names):
        spans = {name: sum(columns[i].group == name for i in used) for name in names}
        cells = "".join(f'<th scope="colgroup" colspan="{n}">{escape(name)}</th>' for name, n in spans.items())
        groups = f'<tr class="groups"><td></td>{cells}</tr>'
    return _table_html(caption, f"{groups}<tr>{head}</tr>", body)


def _table_html(caption: str, head: str, body: Sequence[str]) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _row_html(row: MethodResult, mark: tuple[str, str], cells: Sequence[str], width: int, settings: bool) -> str:
    kind = "dense" if is_dense(row) else "baseline" if row.baseline else ""
    tag = f"<span class=tag>{kind}</span>" if kind else ""
    shown = {key: value for key, value in row.settings.items() if settings and value not in (None, "", [], {})}
    chosen = ", ".join(f"{key} {_setting_text(value)}" for key, value in shown.items())
    small = f"<small>{escape(chosen)}</small>" if chosen else ""
    name = f'<span class="who">{_icon(mark)}<span class="name">{escape(row.label)}{tag}{small}</span></span>'
    if row.error is not None:
        rest = f'<td class="failed" colspan="{max(1, width)}">did not run: {escape(_one_line(row.error))}</td>'
    else:
        rest = "".join(cells or [_td(_NONE)] * width)
    return f'<tr><th scope="row">{name}</th>{rest}</tr>'


def _setting_text(value: Any) -> str:
    if isinstance(value, float):
        inverse = 1 / value if value else 0
        if 0 < value < 1 and abs(inverse - round(inverse)) < 1e-9 and round(inverse) > 1:
            return f"1/{round(inverse)}"
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_setting_text(v) for v in value) + "]"
    return "none" if value is None else str(value)


def _td(text: str, detail: str = "", best: bool = False) -> str:
    inside = f"<strong>{escape(text)}</strong>" if best else escape(text)
    return f"<td>{inside}{f'<small>{escape(detail)}</small>' if detail else ''}</td>"


def _quality_table(comparison: Comparison, marks: list[tuple[str, str]]) -> str:
    tasks, won = _tasks(comparison), winners(comparison)
    logprobs = list(dict.fromkeys(t for m in comparison.methods if m.quality for t in m.quality.task_logprob))

    def cell(row: MethodResult, key: str, estimate: Estimate | None, *, share: bool = False) -> str:
        if estimate is None:
            return _td("reference" if is_dense(row) and key in ("kl", "agreement") else _NONE)
        if share:
            text, error = percent(estimate.mean), percent(estimate.stderr) if estimate.stderr > 0 else ""
        else:
            text, error = _kl(estimate) if key == "kl" else _with_error(estimate)
        return _td(text, f"± {error}" if error else "", won.get(key) is row)

    rows = []
    for row, mark in zip(comparison.methods, marks, strict=True):
        cells: list[str] = []
        if (q := row.quality) is not None:
            cells = [
                cell(row, "kl", q.kl),
                cell(row, "agreement", q.agreement, share=True),
                cell(row, "perplexity", q.perplexity),
                *(cell(row, "tasks" if len(tasks) == 1 else "", q.tasks.get(task), share=True) for task in tasks),
                *(cell(row, "", q.task_logprob.get(task)) for task in logprobs),
            ]
        rows.append((row, mark, cells))
    columns = [
        _Column("", "KL from dense", "nats a token"),
        _Column("", "Same token", "as dense"),
        _Column("", "Perplexity", "on text"),
        *(_Column("", task, "accuracy") for task in tasks),
        *(_Column("", task, "log-prob.") for task in logprobs),
    ]
    return _method_table("Quality, mean and standard error", columns, rows, settings=True)


def _cost_table(comparison: Comparison, marks: list[tuple[str, str]]) -> str:
    won, others = winners(comparison), _beside(comparison)

    def timed(row: MethodResult, key: str, spread: Spread | None) -> str:
        return _td(_NONE) if spread is None else _td(milliseconds(spread.median), _range(spread), won.get(key) is row)

    rows = []
    for row, mark in zip(comparison.methods, marks, strict=True):
        cells: list[str] = []
        if (c := row.cost) is not None:
            cells = [
                timed(row, "token_ms", c.token_ms),
                *(_td(_speed(row, other) or _NONE) for other in others),
                timed(row, "", c.attention_ms),
                _td(_seconds(c.prefill_ms.median) if c.prefill_ms is not None else _NONE),
                _td(human_bytes(c.bytes_read), best=won.get("bytes_read") is row),
                _td(percent(c.share_read)),
                _td(human_bytes(c.score_bytes_read)),
                _td(human_bytes(c.kv_bytes_held + c.extra_bytes_held), best=won.get("held") is row),
                _td(human_bytes(c.extra_bytes_held)),
                _td(human_bytes(c.peak_memory)),
            ]
        rows.append((row, mark, cells))
    columns = [
        _Column("Time", "ms a token", "quartiles"),
        *(_Column("Time", "Speed", f"× {other.label}") for other in others),
        _Column("Time", "Attention", "ms a token"),
        _Column("Time", "Prefill", "seconds"),
        _Column("Cache traffic", "Read", "per token"),
        _Column("Cache traffic", "Share", "of dense"),
        _Column("Cache traffic", "To choose", "part of read"),
        _Column("Memory", "Held", "in all"),
        _Column("Memory", "Extra", "part of held"),
        _Column("Memory", "Peak", "process"),
    ]
    return _method_table("Cost, medians and counts", columns, rows, settings=False)


def _seconds(ms: float) -> str:
    return _significant(ms / 1000)


def _range(spread: Spread) -> str:
    if spread.n < 2:
        return ""
    low, high = milliseconds(spread.low), milliseconds(spread.high)
    return low if low == high else f"{low}–{high}"


def _remarks_html(comparison: Comparison) -> str:
    titles = {
        "error": "What did not run",
        "pay": "Where it does not pay, and why",
        "noise": "What is within noise",
        "method": "What the methods say about themselves",
    }
    found, parts = remarks(comparison), []
    for kind, title in titles.items():
        items = "".join(f"<li>{escape(remark.text)}</li>" for remark in found if remark.kind == kind)
        if items:
            parts.append(f'<div class="{kind}"><h3>{title}</h3><ul>{items}</ul></div>')
    return "".join(parts) or "<p>Nothing to add.</p>"


def _literature(comparison: Comparison) -> str:
    if not comparison.literature:
        return ""
    labels = {row.slug: row.label for row in comparison.methods}
    body = [
        f'<tr><th scope="row">{escape(labels.get(f.slug, f.slug))}</th><td>{escape(f"{f.value:g} {f.unit}")}</td>'
        f'<td class="words">{escape(f.metric)}</td><td class="words">{escape(f.setting)}</td>'
        f'<td class="words">{escape(f.source)}</td></tr>'
        for f in comparison.literature
    ]
    head = "".join(
        f'<th scope="col"{" class=words" if i > 1 else ""}>{title}</th>'
        for i, title in enumerate(("Method", "Paper’s figure", "Of what", "Setting", "Source"))
    )
    text = _table_html("Figures from the papers, not measured here", f"<tr>{head}</tr>", body)
    return (
        '<section id="papers" aria-labelledby="papers-h"><h2 id="papers-h">From the papers</h2>'
        "<p>Their figures on their models and machines, to set beside the ones above. "
        f"None was measured in this run.</p>{text}</section>"
    )


def _setup(comparison: Comparison) -> str:
    def listed(title: str, facts: dict[str, Any]) -> str:
        items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_setting_text(v))}</dd>" for k, v in facts.items())
        return f"<div><h3>{escape(title)}</h3><dl>{items}</dl></div>" if items else ""

    run: dict[str, Any] = {
        "model": comparison.model,
        "context": f"{comparison.context:,} tokens",
        "decoded": f"{comparison.decode_tokens:,} tokens",
        "budget": comparison.budget,
        "dtype": comparison.dtype,
        "threads": comparison.threads,
        "seed": comparison.seed,
        "created": comparison.created,
    }
    command = comparison.command
    shown = f"<h3>Run it again</h3><pre><code>{escape(command)}</code></pre>" if command else ""
    machine = dict(comparison.machine)
    if comparison.bandwidth_gbs:
        machine["read bandwidth"] = f"{comparison.bandwidth_gbs:.1f} GB/s, measured in this run"
    boxes = listed("Run", run) + listed("Machine", machine) + listed("Versions", comparison.versions)
    return f'<div class="boxes">{boxes}</div>{shown}'


# What the script draws


def _page_data(comparison: Comparison, marks: list[tuple[str, str]]) -> dict[str, Any]:
    tasks = _tasks(comparison)
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
        doubt = _finite(noise(value)) or 0.0
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
    return _quality(lambda q: q.tasks.get(name))


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
