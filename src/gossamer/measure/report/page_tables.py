"""The page's tables, as HTML: quality and cost, a row a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gossamer.measure.report.findings import is_dense, speedup, task_names, timed_beside, winners
from gossamer.measure.report.numbers import (
    ABSENT,
    human_bytes,
    kl_divergence,
    milliseconds,
    one_line,
    percent,
    setting_text,
    significant,
    with_error,
)
from gossamer.measure.report.plots import icon
from gossamer.measure.results import Comparison, Estimate, MethodResult, Spread


def quality_table(comparison: Comparison, marks: list[tuple[str, str]]) -> str:
    """How close each row stays to the dense model."""
    tasks, won = task_names(comparison), winners(comparison)
    logprobs = list(dict.fromkeys(t for m in comparison.methods if m.quality for t in m.quality.task_logprob))

    def cell(row: MethodResult, key: str, estimate: Estimate | None, *, share: bool = False) -> str:
        if estimate is None:
            return _td("reference" if is_dense(row) and key in ("kl", "agreement") else ABSENT)
        if share:
            text, error = percent(estimate.mean), percent(estimate.stderr) if estimate.stderr > 0 else ""
        else:
            text, error = kl_divergence(estimate) if key == "kl" else with_error(estimate)
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


def cost_table(comparison: Comparison, marks: list[tuple[str, str]]) -> str:
    """What each row takes in time, traffic and memory."""
    won, others = winners(comparison), timed_beside(comparison)

    def timed(row: MethodResult, key: str, spread: Spread | None) -> str:
        return _td(ABSENT) if spread is None else _td(milliseconds(spread.median), _range(spread), won.get(key) is row)

    rows = []
    for row, mark in zip(comparison.methods, marks, strict=True):
        cells: list[str] = []
        if (c := row.cost) is not None:
            cells = [
                timed(row, "token_ms", c.token_ms),
                *(_td(speedup(row, other) or ABSENT) for other in others),
                timed(row, "", c.attention_ms),
                _td(_seconds(c.prefill_ms.median) if c.prefill_ms is not None else ABSENT),
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


@dataclass(frozen=True)
class _Column:
    group: str
    title: str
    unit: str


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
    used = [i for i in range(len(columns)) if any(cells and cells[i] != _td(ABSENT) for _, _, cells in rows)]
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
    return table_html(caption, f"{groups}<tr>{head}</tr>", body)


def table_html(caption: str, head: str, body: Sequence[str]) -> str:
    """A captioned table that scrolls sideways where it is too wide."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _row_html(row: MethodResult, mark: tuple[str, str], cells: Sequence[str], width: int, settings: bool) -> str:
    kind = "dense" if is_dense(row) else "baseline" if row.baseline else ""
    tag = f"<span class=tag>{kind}</span>" if kind else ""
    shown = {key: value for key, value in row.settings.items() if settings and value not in (None, "", [], {})}
    chosen = ", ".join(f"{key} {setting_text(value)}" for key, value in shown.items())
    small = f"<small>{escape(chosen)}</small>" if chosen else ""
    name = f'<span class="who">{icon(mark)}<span class="name">{escape(row.label)}{tag}{small}</span></span>'
    if row.error is not None:
        rest = f'<td class="failed" colspan="{max(1, width)}">did not run: {escape(one_line(row.error))}</td>'
    else:
        rest = "".join(cells or [_td(ABSENT)] * width)
    return f'<tr><th scope="row">{name}</th>{rest}</tr>'


def _td(text: str, detail: str = "", best: bool = False) -> str:
    inside = f"<strong>{escape(text)}</strong>" if best else escape(text)
    return f"<td>{inside}{f'<small>{escape(detail)}</small>' if detail else ''}</td>"


def _seconds(ms: float) -> str:
    return significant(ms / 1000)


def _range(spread: Spread) -> str:
    if spread.n < 2:
        return ""
    low, high = milliseconds(spread.low), milliseconds(spread.high)
    return low if low == high else f"{low}–{high}"
