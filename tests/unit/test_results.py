"""Estimates from few samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gossamer.errors import InputError
from gossamer.measure.report import differ
from gossamer.measure.results import Estimate


@pytest.mark.parametrize("n", [1, 5, 20, 400])
def test_none_or_all_of_few_is_not_certain(n: int) -> None:
    none, all_of_them = Estimate.of_share(0, n), Estimate.of_share(n, n)
    assert (none.mean, all_of_them.mean) == (0.0, 1.0)
    assert none.stderr == pytest.approx(all_of_them.stderr)
    assert none.stderr == pytest.approx(2 / (n + 4))


def test_doubt_shrinks_with_samples() -> None:
    doubts = [Estimate.of_share(n, n).stderr for n in (1, 2, 5, 20, 100, 10_000)]
    assert doubts == sorted(doubts, reverse=True)
    assert doubts[0] > 0.2
    assert doubts[-1] < 2.1e-4


def test_many_samples_agree_with_the_plain_estimate() -> None:
    samples = np.random.default_rng(0).random(20_000) < 0.7
    share, plain = Estimate.of_share(int(samples.sum()), len(samples)), Estimate.of(samples.tolist())
    assert share.mean == pytest.approx(plain.mean)
    assert share.stderr == pytest.approx(plain.stderr, rel=0.01)


def test_two_standard_errors_reach_as_far_as_wilsons_interval() -> None:
    for n in (1, 7, 40):
        for successes in range(n + 1):
            share = Estimate.of_share(successes, n)
            ends = [share.mean + sign * 2 * share.stderr for sign in (-1, 1)]
            # Wilson's ends are where the observed share lies two of *their* standard errors away.
            gaps = [abs(end - share.mean) - 2 * math.sqrt(max(0, end * (1 - end)) / n) for end in ends]
            assert min(abs(gap) for gap in gaps) < 1e-9
            assert min(gaps) > -1e-9


@pytest.mark.parametrize("n", [5, 10, 20, 32, 100])
@pytest.mark.parametrize("p", [0.0, 0.5, 0.7, 0.9, 1.0])
def test_equal_methods_seldom_differ(n: int, p: float) -> None:
    """The exact chance that two runs with the same true share count as different, where two sigma promise 4.6 %."""
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    shares = [Estimate.of_share(k, n) for k in range(n + 1)]
    pairs = itertools.product(range(n + 1), repeat=2)
    assert sum(weights[i] * weights[j] for i, j in pairs if differ(shares[i], shares[j])) < 0.065


def test_one_example_in_five_is_noise() -> None:
    assert not differ(Estimate.of_share(5, 5), Estimate.of_share(4, 5))
    assert differ(Estimate.of_share(20, 20), Estimate.of_share(10, 20))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_an_error(successes: int, n: int) -> None:
    with pytest.raises(InputError, match="sample"):
        Estimate.of_share(successes, n)
