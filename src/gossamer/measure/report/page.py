"""The HTML page of a comparison: one file that loads nothing."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from gossamer.files import write_whole
from gossamer.measure.report.findings import (
    contenders,
    headline,
    headroom,
    metrics,
    remarks,
    speedup,
    timed_beside,
    yardstick,
)
from gossamer.measure.report.numbers import (
    counted,
    human_bytes,
    kl_divergence,
    listed,
    milliseconds,
    percent,
    setting_text,
)
from gossamer.measure.report.page_tables import cost_table, quality_table, table_html
from gossamer.measure.report.plots import marks_of, page_data
from gossamer.measure.report.ranking import rankings_html
from gossamer.measure.results import Comparison, MethodResult


def html(comparison: Comparison, path: str | Path) -> Path:
    """Write the page: one file that loads nothing, complete or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_whole(path, page(comparison))


def page(comparison: Comparison) -> str:
    """The page's text."""
    from plotly.offline import get_plotlyjs

    marks = marks_of(comparison)
    fields = {
        "title": escape(f"{headline(comparison)} · Gossamer"),
        "css": _packaged("page.css"),
        "headline": escape(headline(comparison)),
        "lead": escape(_lead(comparison)),
        "facts": _facts(comparison),
        "findings": _cards(comparison),
        "quality_table": quality_table(comparison, marks),
        "cost_table": cost_table(comparison, marks),
        "rankings": rankings_html(comparison),
        "time_caption": escape(_time_caption(comparison)),
        "remarks": _remarks_html(comparison),
        "literature": _literature(comparison),
        "setup": _setup(comparison),
        "plotly": str(get_plotlyjs()).replace("</script", "<\\/script"),
        "data": _script_json(page_data(comparison, marks)),
        "script": _packaged("pareto.js") + _packaged("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], _packaged("page.html"))


def _packaged(name: str) -> str:
    return files("gossamer.measure.report").joinpath(name).read_text(encoding="utf-8")


def _script_json(data: Any) -> str:
    """JSON that no HTML parser mistakes for markup."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
    threads = counted(comparison.threads, "thread")
    facts = [
        ("Model", comparison.model),
        ("Context", f"{comparison.context:,} tokens"),
        ("Decoded", f"{comparison.decode_tokens:,} tokens"),
        ("Number type", comparison.dtype),
        ("Machine", f"{cpu}, {threads}" if cpu else threads),
        ("Read bandwidth", f"{comparison.bandwidth_gbs:.1f} GB/s" if comparison.bandwidth_gbs else ""),
        ("Date", comparison.created[:10]),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts if v)


def _cards(comparison: Comparison) -> str:
    """The three or four numbers to take home."""
    rows, all_metrics = contenders(comparison), metrics(comparison)
    cards: list[tuple[str, str, str]] = []

    def tied(ties: list[MethodResult]) -> str:
        names = [row.label for row in ties[:2]] + ([f"{len(ties) - 2} more"] if len(ties) > 2 else [])
        return f"; within noise of it: {listed(names)}" if ties else ""

    first, ties = all_metrics["kl"].best(rows)
    if first is not None and first.quality is not None and first.quality.kl is not None:
        text, error = kl_divergence(first.quality.kl)
        value = f"KL {text}{f' ± {error}' if error else ''}"
        same = first.quality.agreement
        also = f", same next token in {percent(same.mean)} of places" if same is not None else ""
        cards.append(("Closest to dense", value, f"{first.label}{also}{tied(ties)}"))
    first, ties = all_metrics["token_ms"].best(rows)
    if first is not None and first.cost is not None and first.cost.token_ms is not None:
        ratios = [
            f"{speed} as fast as {row.label}" for row in timed_beside(comparison) if (speed := speedup(first, row))
        ]
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
    ceiling = headroom(base)
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
    return (
        f", at KL {kl_divergence(row.quality.kl)[0]}" if row.quality is not None and row.quality.kl is not None else ""
    )


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
    text = table_html("Figures from the papers, not measured here", f"<tr>{head}</tr>", body)
    return (
        '<section id="papers" aria-labelledby="papers-h"><h2 id="papers-h">From the papers</h2>'
        "<p>Their figures on their models and machines, to set beside the ones above. "
        f"None was measured in this run.</p>{text}</section>"
    )


def _setup(comparison: Comparison) -> str:
    def box(title: str, facts: dict[str, Any]) -> str:
        items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(setting_text(v))}</dd>" for k, v in facts.items())
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
    boxes = box("Run", run) + box("Machine", machine) + box("Versions", comparison.versions)
    return f'<div class="boxes">{boxes}</div>{shown}'
