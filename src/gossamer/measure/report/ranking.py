"""The rankings of a study, for the terminal, for Markdown and for the page."""

from __future__ import annotations

from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gossamer.measure.report.numbers import ABSENT, counted, listed, one_line, percent, with_error
from gossamer.measure.report.page_tables import table_html
from gossamer.measure.results import Comparison, Estimate, Place, Ranking

_COUNTED = {
    "read": "KV bytes read per token",
    "held": "KV bytes held",
    "area": "attention computed in prefill",
    "neurons": "neurons computed",
}
_SPENT = {"read": "read", "held": "held", "area": "area", "neurons": "kept"}


def title(ranking: Ranking) -> str:
    """What is ranked, by what, at which budget."""
    return f"{ranking.metric}, at {percent(ranking.budget)} of the {_COUNTED[ranking.yardstick]}"


def verdict(ranking: Ranking) -> str:
    """Who leads by more than noise, in a sentence."""
    ranked = [place for place in ranking.places if place.rank is not None]
    over = [place for place in ranking.places if place.over]
    leaders = [place.label for place in ranked if place.rank == 1]
    parts = []
    if len(ranked) == 1:
        parts.append(f"{leaders[0]} alone keeps to the budget.")
    elif ranked and len(leaders) == len(ranked):
        parts.append("No difference among the methods within the budget exceeds the noise.")
    elif len(leaders) == 1:
        parts.append(f"{leaders[0]} leads by more than noise.")
    elif leaders:
        parts.append(f"{listed(leaders)} share the lead: no other is better than they are by more than noise.")
    if over:
        parts.append(f"{counted(len(over), 'method')} marked * spent more than the budget, so without a rank.")
    parts.append(f"Differences are tested on {counted(ranking.samples, 'paired sample')}.")
    return " ".join(parts)


def _cells(place: Place) -> tuple[str, str, str, str]:
    share = ABSENT if place.share is None else percent(place.share) + ("*" if place.over else "")
    text, error = with_error(Estimate(place.value, place.stderr, 0))
    return (
        ABSENT if place.rank is None else str(place.rank),
        one_line(place.label),
        f"{text} ±{error}" if error else text,
        share,
    )


def _heads(ranking: Ranking) -> tuple[str, str, str, str]:
    return "rank", "method", "mean", _SPENT[ranking.yardstick]


def print_rankings(comparison: Comparison, console: Console) -> None:
    """One small table each."""
    for ranking in comparison.rankings:
        console.print()
        console.print(Text(title(ranking), style="bold"))
        grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for name in _heads(ranking):
            grid.add_column(name, justify="left" if name == "method" else "right", no_wrap=True, overflow="ellipsis")
        for place in ranking.places:
            grid.add_row(*_cells(place))
        console.print(grid)
        console.print(Text(verdict(ranking), style="dim"))


def markdown_lines(comparison: Comparison) -> list[str]:
    """The same as Markdown."""
    lines: list[str] = []
    for ranking in comparison.rankings:
        rows = [_heads(ranking), ("---:", "---", "---:", "---:"), *map(_cells, ranking.places)]
        lines += ["", f"**{title(ranking)}**", ""]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |" for row in rows
        ]
        lines += ["", verdict(ranking).replace("*", "\\*")]
    return lines


def rankings_html(comparison: Comparison) -> str:
    """A section of the page; empty where nothing was ranked."""
    if not comparison.rankings:
        return ""
    parts = []
    for ranking in comparison.rankings:
        head = "".join(
            f'<th scope="col">{name}</th>' for name in ("method", *_heads(ranking)[:1], *_heads(ranking)[2:])
        )
        body = []
        for place in ranking.places:
            rank, label, value, share = (escape(cell) for cell in _cells(place))
            body.append(f'<tr><th scope="row">{label}</th><td>{rank}</td><td>{value}</td><td>{share}</td></tr>')
        parts.append(table_html(title(ranking), f"<tr>{head}</tr>", body))
        parts.append(f'<p class="caption">{escape(verdict(ranking))}</p>')
    return (
        '<section id="ranking" aria-labelledby="ranking-h"><h2 id="ranking-h">Ranking at equal budget</h2>'
        "<p>A rank is one more than the number of methods that are better by two standard errors of the paired difference: "
        f"methods that share a rank cannot be told apart by this run.</p>{''.join(parts)}</section>"
    )
