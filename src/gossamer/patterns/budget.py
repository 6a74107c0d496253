"""A budget is a count (whole number) or a fraction of what there is (a number with a point, or text like ``"1/16"``)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_WANTED = "must be a count like 256 or a fraction like 0.0625 or 1/16"


def parse(value: Any) -> Any:
    """Read ``"1/16"``, ``"0.25"`` and ``"256"``; other values pass unchanged.

    >>> parse("1/16"), parse("256")
    (0.0625, 256)
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            if "/" in text:
                return float(Fraction(text))
            return float(text) if "." in text else int(text)
        except (ValueError, ZeroDivisionError):
            raise ValueError(_WANTED) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(_WANTED)
    return value


def check(value: int | float) -> int | float:
    """Refuse counts below 1 and fractions outside (0, 1]."""
    if isinstance(value, bool) or (isinstance(value, int) and value < 1):
        raise ValueError("a count must be 1 or more")
    if isinstance(value, float) and not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError("a fraction must be above 0 and at most 1; write a count without a point")
    return value


#: Field type for budgets: `256` keeps 256, `0.0625` or `"1/16"` keeps that fraction, `1.0` keeps all.
Budget = Annotated[int | float, BeforeValidator(parse), AfterValidator(check)]


def resolve(budget: int | float, total: int) -> int:
    """How many of `total` things a budget keeps: a fraction is rounded to nearest, never below 1.

    >>> resolve(1 / 16, 1024), resolve(256, 100), resolve(0.001, 10)
    (64, 256, 1)
    """
    return budget if isinstance(budget, int) else max(1, round(budget * total))
