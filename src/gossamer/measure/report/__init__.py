"""A comparison for people: a table in the terminal, Markdown, and one HTML file with the pictures.

    table(comparison)
    html(comparison, "report.html")

Nothing is measured here, and nothing is shown that was not. Two values count as different when they lie at least two
standard errors of their difference apart; a tie earns no emphasis, and `remarks` says which ties there are.
"""

from gossamer.measure.report.findings import Remark, differ, headline, remarks, winners
from gossamer.measure.report.numbers import human_bytes, percent
from gossamer.measure.report.page import html, page
from gossamer.measure.report.table import table, to_markdown

__all__ = [
    "Remark",
    "differ",
    "headline",
    "html",
    "human_bytes",
    "page",
    "percent",
    "remarks",
    "table",
    "to_markdown",
    "winners",
]
