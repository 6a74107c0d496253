"""Budgets: counts, fractions, and what is neither."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gossamer.patterns import Budget, resolve

read = TypeAdapter(Budget)


@pytest.mark.parametrize(
    ("given_as", "want"),
    [
        (256, 256), ("256", 256), (" 256 ", 256), (1, 1), ("1", 1), (1.0, 1.0), ("1.0", 1.0), (0.0625, 0.0625),
        ("1/16", 0.0625), ("3/4", 0.75), ("0.25", 0.25), ("1/1", 1.0),
    ],
)  # fmt: skip
def test_read(given_as: Any, want: int | float) -> None:
    got = read.validate_python(given_as)
    assert got == want
    assert type(got) is type(want)  # 1 keeps one, 1.0 keeps all


@pytest.mark.parametrize(
    "bad",
    [
        0, -1, 1.5, 0.0, -0.5, float("nan"), float("inf"), "", "a", "1/0", "3/2", "1/16/2", "-1/16", "1e3", "0x10",
        None, True, False, [16], {"count": 3}, 2.0,
    ],
    ids=repr,
)  # fmt: skip
def test_refused(bad: Any) -> None:
    with pytest.raises(ValidationError):
        read.validate_python(bad)


@given(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1.0)))
def test_json_round_trip(budget: int | float) -> None:
    again = read.validate_json(read.dump_json(budget))
    assert again == budget
    assert type(again) is type(budget)


@given(st.floats(1e-6, 1.0), st.integers(1, 10**6))
def test_fractions_round_to_nearest_and_keep_something(fraction: float, total: int) -> None:
    kept = resolve(fraction, total)
    assert 1 <= kept <= total
    assert kept == 1 or abs(kept - fraction * total) <= 0.5 + 1e-9


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_counts_stay_counts(count: int, total: int) -> None:
    assert resolve(count, total) == count  # a context shorter than the budget is the policy's to handle


def test_by_hand() -> None:
    assert [resolve(1 / 16, n) for n in (1, 8, 24, 1024, 1032, 131072)] == [1, 1, 2, 64, 64, 8192]
    assert resolve(1.0, 7) == 7
