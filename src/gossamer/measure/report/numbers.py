"""Numbers, counts and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gossamer.measure.results import Estimate

# What stands where nothing was measured.
ABSENT = "–"
# A KL divergence below this is rounding, not method: it is shown as zero.
KL_FLOOR = 1e-6


def human_bytes(count: float | None) -> str:
    """Three significant digits and a binary unit.

    >>> human_bytes(1536), human_bytes(0), human_bytes(None)
    ('1.50 KiB', '0 B', '–')
    """
    if count is None or not math.isfinite(count):
        return ABSENT
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = 0
    while power < len(units) - 1 and abs(count) >= 999.5:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{significant(count)} {units[power]}"


def percent(share: float | None) -> str:
    """A share as per cent; one decimal, none at 0 and 100 %, two digits below 0.1 %.

    >>> percent(0.0625), percent(0.987), percent(1.0)
    ('6.2 %', '98.7 %', '100 %')
    """
    if share is None or not math.isfinite(share):
        return ABSENT
    value = 100 * share
    if 0 < abs(value) < 0.095:
        return f"{value:.2g} %"
    return f"{value:.0f} %" if value >= 99.95 or value == 0 else f"{value:.1f} %"


def milliseconds(value: float | None) -> str:
    """Three significant digits, without a unit.

    >>> milliseconds(31.42), milliseconds(1234.5)
    ('31.4', '1234')
    """
    return ABSENT if value is None or not math.isfinite(value) else significant(value)


def significant(value: float) -> str:
    """Three significant digits, no exponent above a thousandth."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.2e}" if size < -4 else f"{value:.{max(0, 2 - size)}f}"


def with_error(estimate: Estimate) -> tuple[str, str]:
    """Mean and standard error, both cut where the error's second digit stands; the error may be empty."""
    mean, error = estimate.mean, estimate.stderr
    if not math.isfinite(mean):
        return ("∞" if mean > 0 else ABSENT), ""
    if not math.isfinite(error) or error <= 0:
        return significant(mean), ""
    if abs(mean) < 1e-4:
        return f"{mean:.1e}", f"{error:.0e}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:.{digits}f}", f"{error:.{digits}f}"


def perplexity(mean: float) -> str:
    """Two decimals below 100, then three significant digits."""
    return f"{mean:.2f}" if mean < 100 else with_error(Estimate(mean, 0.0, 1))[0]


def kl_divergence(estimate: Estimate) -> tuple[str, str]:
    """Mean and standard error, as `with_error` gives them; zero up to `KL_FLOOR`."""
    return ("0", "") if abs(estimate.mean) <= KL_FLOOR else with_error(estimate)


def setting_text(value: Any) -> str:
    """A setting's value; one over a whole number is shown as such a fraction."""
    if isinstance(value, float):
        inverse = 1 / value if value else 0
        if 0 < value < 1 and abs(inverse - round(inverse)) < 1e-9 and round(inverse) > 1:
            return f"1/{round(inverse)}"
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting_text(v) for v in value) + "]"
    return "none" if value is None else str(value)


def counted(number: int, noun: str) -> str:
    """The number and its noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def one_line(text: str | None) -> str:
    """The text without line breaks or repeated spaces; empty for None."""
    return " ".join((text or "").split())
