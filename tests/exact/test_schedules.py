"""Schedules: their ends and their pace, and ProSparse's stages (card, checks 1 and 8)."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import InputError
from gossamer.patterns import SineStages
from gossamer.patterns.schedules import SHAPES, cosine, cubic, linear, ramp, sine


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_go_from_0_to_1_and_never_fall(shape) -> None:
    values = [shape(i / 200) for i in range(201)]
    assert values[0] == 0
    assert values[-1] == 1
    assert all(a <= b for a, b in itertools.pairwise(values))
    for bad in (-0.01, 1.01, math.nan):
        with pytest.raises(InputError, match=r"on 0 \.\. 1"):
            shape(bad)


def test_shapes_by_hand() -> None:
    assert linear(0.3) == 0.3
    assert cubic(0.2) == pytest.approx(1 - 0.8**3)
    assert cosine(1 / 3) == pytest.approx(1 - math.sqrt(3) / 2)
    assert sine(1 / 3) == pytest.approx(0.25)


@given(start=st.floats(-10, 10), end=st.floats(-10, 10), x=st.floats(0, 1))
def test_ramps_end_exactly_and_stay_between(start: float, end: float, x: float) -> None:
    for shape in SHAPES.values():
        assert ramp(0, start, end, shape) == start
        assert ramp(1, start, end, shape) == end
        assert min(start, end) <= ramp(x, start, end, shape) <= max(start, end)


@st.composite
def stages(draw: st.DrawFn) -> SineStages:
    count = draw(st.integers(1, 5))
    peaks = sorted(draw(st.lists(st.floats(1e-4, 10), min_size=count, max_size=count)))
    lengths = draw(st.lists(st.integers(2, 400), min_size=count, max_size=count))
    start = draw(st.integers(0, 50))
    ends = [start + sum(lengths[: i + 1]) for i in range(count)]
    return SineStages(tuple(peaks), tuple(ends), start)


@given(stages())
def test_borders_are_the_peaks_and_the_way_between_is_monotone(s: SineStages) -> None:
    for peak, end in zip(s.peaks, s.ends, strict=True):
        assert s(end) == peak
    values = [s(t) for t in range(int(s.ends[-1]) + 3)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[-1] == s.peaks[-1]
    if s.start:
        assert not any(values[: int(s.start) + 1])
    assert all(value == s.peaks[0] for value in values[int(s.start) + 1 : int(s.ends[0]) + 1])


@given(stages())
def test_the_middle_is_the_mean_and_both_ends_are_flat(s: SineStages) -> None:
    for i in range(1, len(s.ends)):
        begin, end, low, high = s.ends[i - 1], s.ends[i], s.peaks[i - 1], s.peaks[i]
        assert s((begin + end) / 2) == pytest.approx((low + high) / 2)
        step = (end - begin) * 1e-4
        # Over a 10,000th of a stage a half wave rises by (π/2 · 1e-4)², a straight line by 1e-4.
        assert s(begin + step) - s(begin) <= 1e-6 * (high - low) + 1e-12
        assert s(end) - s(end - step) <= 1e-6 * (high - low) + 1e-12


def test_equal_peaks_make_a_constant_stage() -> None:
    s = SineStages((0.1, 0.3, 0.3), (10, 20, 50))
    assert {s(t) for t in range(20, 51)} == {0.3}
    assert s(19) < 0.3


def test_eta_by_hand() -> None:
    # A third of the way from 1 to 5: η = ½[sin(−π/2 + π/3) + 1] = ½[−½ + 1] = ¼.
    assert SineStages((1.0, 5.0), (10, 40))(20) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("peaks", "ends", "start", "says"),
    [
        ((), (), 0, "one end for each peak"),
        ((1.0,), (1, 2), 0, "one end for each peak"),
        ((1.0, 2.0), (5, 5), 0, "one after the other"),
        ((1.0,), (5,), 5, "one after the other"),
        ((1.0,), (5,), -1, "one after the other"),
        ((2.0, 1.0), (5, 6), 0, "must not fall"),
        ((-1.0,), (5,), 0, "must not be negative"),
        ((math.nan,), (5,), 0, "finite"),
        ((1.0,), (math.inf,), 0, "finite"),
    ],
)
def test_bad_stages_are_one_clear_line(peaks, ends, start, says) -> None:
    with pytest.raises(InputError, match=says):
        SineStages(peaks, ends, start)


def test_time_is_not_negative() -> None:
    with pytest.raises(InputError, match="time"):
        SineStages((1.0,), (5,))(-1)
