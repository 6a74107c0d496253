"""ALISA's schedule: checks 6 and 7 of its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention.alisa_schedule import (
    AlisaPlan,
    Profile,
    Sizes,
    alisa_plan,
    interpolate,
    profile_machine,
    roofline,
    simulate,
    total_seconds,
)
from gossamer.errors import InputError, OutputError


def table(compute: float = 1e-4, again: float = 1e-6) -> Profile:
    return Profile(compute=((1, compute), (1000, 2 * compute)), recompute=((0, 0.0), (1000, 1000 * again)))


SIZES = Sizes(layers=3, hidden=32, heads=4, kv_heads=4, head_dim=8, intermediate=64)
TOKEN = 2 * 3 * 32 * 2  # 4·b·l·h for one sequence


def plan_of(**changes: Any) -> AlisaPlan:
    values: dict[str, Any] = {
        "fast_bytes": 100 * TOKEN,
        "bandwidth": 1e6,
        "profile": table(),
        "block": 4,
        **changes,
    }
    return alisa_plan(SIZES, values.pop("batch", 1), values.pop("prompt", 64), values.pop("output", 200), **values)


plans = st.builds(
    lambda batch, prompt, output, room, bandwidth, ratio, block, bits: plan_of(
        batch=batch,
        prompt=prompt,
        output=output,
        fast_bytes=(block + 1 + room) * TOKEN * batch,
        bandwidth=10.0**bandwidth,
        ratio=ratio,
        block=block,
        kv_bits=bits,
    ),
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(1, 120),
    st.integers(0, 150),
    st.integers(3, 9),
    st.floats(0.05, 1.0),
    st.sampled_from([1, 4, 8]),
    st.none(),
)


@given(plans)
@settings(max_examples=15, deadline=None)
def test_every_token_is_in_one_tier_and_moves_forward(plan: AlisaPlan) -> None:
    before = (0, 0)
    for step in simulate(plan).steps:
        n = plan.prompt + step.step
        assert step.fast + step.slow + step.deleted == n
        assert min(step.slow, step.deleted) >= 0
        assert step.fast >= 1
        deleted, slow = plan.tiers(n)
        assert (deleted, slow) == (step.deleted, step.deleted + step.slow)
        assert deleted >= before[0]
        assert slow >= before[1]
        assert step.moved_out == slow - before[1]
        assert step.loaded >= 0
        assert step.recomputed >= 0
        if step.step >= plan.p1:
            assert step.fast * plan.token_bytes <= plan.fast_bytes
        before = (deleted, slow)


@given(plans)
@settings(max_examples=15, deadline=None)
def test_bytes_of_the_phases(plan: AlisaPlan) -> None:
    simulation = simulate(plan)
    assert plan.token_bytes == 4 * plan.batch * 3 * 32  # 4·b·l·h in fp16
    for step in simulation.steps:
        assert step.phase == ("I" if step.step < plan.p1 else "II" if step.step < plan.p2 else "III")
        if step.phase == "I":
            assert step.kv_bytes == step.moved_out == step.slow == step.deleted == 0
        if step.phase == "II":
            assert step.kv_bytes == pytest.approx(plan.token_bytes * (step.moved_out + step.loaded))
            assert step.deleted == 0
        transfer = (step.kv_bytes + step.input_bytes) / plan.bandwidth
        assert step.seconds == pytest.approx(step.compute_seconds + transfer + step.recompute_seconds)
    assert simulation.seconds == pytest.approx(total_seconds(plan))
    assert simulation.phases == sorted(simulation.phases)


@given(plans)
@settings(max_examples=15, deadline=None)
def test_the_first_switch_is_where_fast_memory_is_full_and_greed_never_loses(plan: AlisaPlan) -> None:
    full = [j for j in range(plan.output) if plan.token_bytes * (plan.prompt + j) > plan.fast_bytes]
    assert plan.p1 == (full[0] if full else plan.output)
    start = plan.model_copy(update={"alpha": 1.0 if full else 0.0, "beta": 0.0, "p2": plan.output})
    assert total_seconds(plan) <= total_seconds(start) * (1 + 1e-12)


def test_everything_fits_then_nothing_moves() -> None:
    plan = plan_of(fast_bytes=1000 * TOKEN)
    assert (plan.alpha, plan.beta, plan.p1, plan.p2) == (0.0, 0.0, 200, 200)
    assert simulate(plan).bytes == 0
    assert simulate(plan).phases == ["I"]


def test_recomputation_pays_off_only_on_a_slow_link() -> None:
    """Per token of one layer: half of the row's bytes are saved, one GEMM is spent."""
    again = 1e-5
    even = (TOKEN / 2) / again
    assert plan_of(bandwidth=even / 3, profile=table(again=again)).beta > 0
    assert plan_of(bandwidth=even * 3, profile=table(again=again)).beta == 0
    grouped = Sizes(layers=3, hidden=32, heads=4, kv_heads=1, head_dim=8, intermediate=64)
    narrow = alisa_plan(grouped, 1, 64, 200, fast_bytes=100 * TOKEN // 4, bandwidth=1e3, profile=table(), block=4)
    assert narrow.beta == 0  # the input is wider than keys and values


def test_quantised_rows_are_smaller_and_their_scales_need_room() -> None:
    how: dict[str, Any] = {"bandwidth": 1e5, "block": 16, "profile": table(again=1.0)}
    plain, small = plan_of(**how), plan_of(**how, kv_bits=8)
    assert small.slow_bytes == plain.token_bytes / 2
    assert total_seconds(small) < total_seconds(plain)
    assert small.alpha > plain.alpha


def test_tables() -> None:
    assert interpolate(((4, 1.0),), np.array([0, 4, 9])).tolist() == [1.0, 1.0, 1.0]
    assert interpolate(((0, 0.0), (2, 2.0), (4, 8.0)), np.array([1, 3, 5])).tolist() == [1.0, 5.0, 11.0]
    fast = roofline(SIZES, 4, 100, flops=1e12, memory=1e12)
    slow = roofline(SIZES, 4, 100, flops=1e12, memory=1e11)
    assert fast.compute[-1][0] == 100
    assert slow.compute[-1][1] > fast.compute[-1][1] > fast.compute[0][1]


def test_a_profile_is_measured_once(tmp_path: Path) -> None:
    first = profile_machine(SIZES, 1, 8, folder=tmp_path, repeats=1)
    assert [x for x, _ in first.compute] == [1, 2, 4, 8]
    assert all(seconds > 0 for _, seconds in (*first.compute, *first.recompute))
    assert profile_machine(SIZES, 1, 8, folder=tmp_path) == first
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert [x for x, _ in profile_machine(SIZES, 1, 8, folder=tmp_path, repeats=1).compute] == [1, 2, 4, 8]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="profile"):
        profile_machine(SIZES, 2, 4, folder=blocked / "below", repeats=1)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": float("nan")}, "bandwidth"),
        ({"ratio": 1.5}, "ratio"),
        ({"prompt": 0}, "prompt"),
        ({"output": -1}, "output"),
        ({"fast_bytes": 4 * TOKEN}, "fast memory"),
        ({"kv_bits": 5}, "kv_bits"),
        ({"kv_bits": 8, "block": 2, "fast_bytes": 10 * TOKEN}, "block"),
    ],
)
def test_bad_plans_are_one_line(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        plan_of(**wrong)
    assert "\n" not in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize("rows", [(), ((2, 1.0), (1, 1.0)), ((1, -1.0),), ((1, float("nan")),)])
def test_bad_tables_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"table|finite"):
        Profile(compute=rows, recompute=((1, 1.0),))
