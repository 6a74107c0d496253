"""The table of a comparison, for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gossamer.measure.report.findings import (
    headline,
    is_dense,
    mean_of_tasks,
    remarks,
    speedup,
    task_names,
    winners,
)
from gossamer.measure.report.numbers import (
    ABSENT,
    counted,
    human_bytes,
    kl_divergence,
    listed,
    milliseconds,
    one_line,
    percent,
    perplexity,
)
from gossamer.measure.report.ranking import markdown_lines, print_rankings
from gossamer.measure.results import Comparison, MethodResult

# The terminal's table: spaces between columns, the name's width worth dropping a column for, and what goes first.
_GAP = 2
_NAME_WIDTH = 20
_DISPENSABLE = ("perplexity", "held", "agreement", "tasks")
_SPELLED = {"perplexity": "perplexity", "held": "bytes held"}


def table(comparison: Comparison, console: Console | None = None) -> None:
    """Print the comparison; made for 100 columns, and leaves columns out where there are fewer."""
    console = console or Console()
    columns, won = _columns(comparison), winners(comparison)
    rows = [(row, {} if row.error is not None else _cells(comparison, row, won)) for row in comparison.methods]
    longest = max((len(one_line(row.label)) for row in comparison.methods), default=0)
    hidden = []
    while _room_for_names(columns, rows, console.width) < min(longest, _NAME_WIDTH) and len(columns) > 1:
        dropped = next((key for key in _DISPENSABLE if key in columns), list(columns)[-1])
        hidden.append(_SPELLED.get(dropped) or columns[dropped].replace("\n", " "))
        del columns[dropped]
    console.print(Text(headline(comparison), style="bold"))
    console.print(Text(_setting_line(comparison), style="dim"))
    console.print()
    grid = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
    room = max(8, _room_for_names(columns, rows, console.width))
    grid.add_column("", no_wrap=True, overflow="ellipsis", max_width=room)
    for key, title in columns.items():
        grid.add_column(
            Text(title), justify="right", no_wrap=True, min_width=_width(key, title, rows), vertical="bottom"
        )
    for row, cells in rows:
        name = Text(one_line(row.label), style="red" if row.error else "dim" if is_dense(row) else "")
        if row.error is not None:
            grid.add_row(name, *([Text("failed", style="red")] if columns else []))
            continue
        grid.add_row(name, *(_rich(cells.get(key, _EMPTY), _detail_width(key, rows)) for key in columns))
    console.print(grid)
    console.print()
    console.print(Text(_legend(comparison, hidden), style="dim"))
    print_rankings(comparison, console)
    found = remarks(comparison)
    if found:
        console.print()
    for remark in found:
        style = {"error": "red", "pay": "yellow"}.get(remark.kind, "dim")
        mark = Table.grid(padding=(0, 1, 0, 0))
        mark.add_row(Text("!" if remark.kind == "error" else "•", style=style), Text(remark.text))
        console.print(mark)


def to_markdown(comparison: Comparison) -> str:
    """The same table and remarks as Markdown."""
    columns, won = _columns(comparison), winners(comparison)
    titles = [title.replace("\n", " ") for title in columns.values()]
    lines = [f"**{_markdown(headline(comparison))}**", "", _markdown(_setting_line(comparison)), ""]
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
        lines.append(f"| {_markdown(one_line(row.label))} | " + " | ".join(texts) + " |")
    lines += ["", _markdown(_legend(comparison)), *markdown_lines(comparison), ""]
    lines += [f"- {_markdown(remark.text)}" for remark in remarks(comparison)]
    return "\n".join(lines).rstrip() + "\n"


# Cells


@dataclass(frozen=True)
class _Cell:
    text: str
    detail: str = ""  # shown dimmed beside the value
    best: bool = False


_EMPTY = _Cell(ABSENT)
_REFERENCE = _Cell("ref.")
_Rows = Sequence[tuple[MethodResult, dict[str, _Cell]]]


def _cells(comparison: Comparison, row: MethodResult, won: dict[str, MethodResult]) -> dict[str, _Cell]:
    """The table's cells of one row, by column."""

    def mark(key: str, text: str, detail: str = "") -> _Cell:
        return _Cell(text, detail, best=won.get(key) is row)

    cells: dict[str, _Cell] = {}
    if (q := row.quality) is not None:
        if is_dense(row):
            cells |= dict.fromkeys(("kl", "agreement"), _REFERENCE)
        if q.kl is not None:
            text, error = kl_divergence(q.kl)
            cells["kl"] = mark("kl", text, f"±{error}" if error else "")
        if q.agreement is not None:
            cells["agreement"] = mark("agreement", percent(q.agreement.mean))
        if q.perplexity is not None:
            cells["perplexity"] = mark("perplexity", perplexity(q.perplexity.mean))
        if (accuracy := mean_of_tasks(q, task_names(comparison))) is not None:
            cells["tasks"] = mark("tasks", percent(accuracy.mean))
    if (c := row.cost) is not None:
        if c.token_ms is not None:
            cells["token_ms"] = mark(
                "token_ms", milliseconds(c.token_ms.median), speedup(row, comparison.reference_row)
            )
        cells["bytes_read"] = mark(
            "bytes_read", human_bytes(c.bytes_read), percent(c.share_read) if c.share_read is not None else ""
        )
        if c.neurons_kept is not None:
            cells["neurons"] = mark("neurons", percent(c.neurons_kept))
            cells["weights"] = mark("weights", human_bytes(c.weight_bytes_read))
        cells["held"] = mark("held", human_bytes(c.kv_bytes_held + c.extra_bytes_held))
    return cells


def _columns(comparison: Comparison) -> dict[str, str]:
    """Heading by column; columns that no row fills are left out."""
    tasks = task_names(comparison)
    titles = {
        "kl": "KL",
        "agreement": "same\ntoken",
        "perplexity": "perpl.",
        "tasks": tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks",
        "token_ms": "ms/token",
        "bytes_read": "read/token",
        "held": "held",
        "neurons": "neurons",
        "weights": "weights\nread",
    }
    filled = {
        key for row in comparison.methods for key, cell in _cells(comparison, row, {}).items() if cell != _REFERENCE
    }
    return {key: title for key, title in titles.items() if key in filled}


# Widths


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


# Words


def _setting_line(comparison: Comparison) -> str:
    return (
        f"budget {comparison.budget} · {comparison.dtype} · {counted(comparison.threads, 'thread')} · "
        f"{counted(comparison.decode_tokens, 'decode token')} · seed {comparison.seed}"
    )


def _legend(comparison: Comparison, hidden: Sequence[str] = ()) -> str:
    parts = ["± one standard error", "read/token: rows and what it takes to choose them, share of dense"]
    if comparison.reference_row is not None:
        parts.insert(1, f"×: times as fast as {comparison.reference_row.label}, ≈ within noise")
    if winners(comparison):
        parts.append("bold: best sparse method by more than noise")
    if hidden:
        parts.append(f"a wider terminal also shows {listed(list(hidden))}")
    return " · ".join(parts)


def _markdown(text: str) -> str:
    """Escape what Markdown or its HTML would read as markup."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
