"""The sparsing laws by the card: the published curves, and fits that find them again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.activations.sparsing_law_fits import (
    PUBLISHED,
    ActivationLaw,
    ShapeLaw,
    fit_activation_law,
    fit_shape_law,
    levenberg_marquardt,
)
from gossamer.errors import InputError


@pytest.mark.parametrize("key", sorted(PUBLISHED), ids="-".join)
def test_a_fit_recovers_the_published_law(key):
    """Check 8, on noiseless points of a training as long as the law needs to bend."""
    law = PUBLISHED[key]
    tokens = torch.linspace(3e9, 800e9 if key[0] == "2.4B" else 250e9, 16).tolist()
    found = fit_activation_law(tokens, law(tokens).tolist(), key[1])
    for name in ("alpha", "c", "limit"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.01)
    assert found.b == pytest.approx(law.b, rel=0.01)
    assert found.r2 == pytest.approx(1.0, abs=1e-9)


def test_the_formulas_by_hand():
    """A few points of the table's curves, worked out with a calculator."""
    relu, silu = PUBLISHED["0.8B", "relu"], PUBLISHED["0.4B", "silu"]
    # 0.00797·100^1.01 = 0.83457; exp(−0.83457 − 3.49) = 0.013240
    assert float(relu([100e9])) == pytest.approx(0.0721 + 0.013240, abs=2e-6)
    # 10^1.03 = 10.7152; 0.42/10.7152 = 0.039197
    assert float(silu([10e9])) == pytest.approx(0.385 - 0.039197, abs=1e-6)
    for (_, kind), law in PUBLISHED.items():
        curve = law([1e9, 1e10, 1e11, 1e12, 1e16])
        steps = curve.diff()
        assert bool((steps <= 0).all() if kind == "relu" else (steps >= 0).all())
        assert float(curve[-1]) == pytest.approx(law.limit, abs=1e-3 if law.alpha > 0.2 else 0.01)
    limits = {k: [law.limit for (_, kind), law in PUBLISHED.items() if kind == k] for k in ("relu", "silu")}
    assert 0.06 < min(limits["relu"]) < max(limits["relu"]) < 0.08
    assert 0.38 < min(limits["silu"]) < max(limits["silu"]) < 0.41


@given(
    alpha=st.floats(0.3, 1.2),
    c=st.floats(0.05, 0.3),
    limit=st.floats(0.3, 0.6),
    thousandth=st.sampled_from([1.0, 1e-3]),
)
@settings(max_examples=15, deadline=None)
def test_any_rising_law_is_recovered(alpha, c, limit, thousandth):
    """Also where tokens are millions, as in small trainings: c then takes up the unit."""
    law = ActivationLaw("silu", alpha, c * thousandth**alpha, limit)
    tokens = [thousandth * 1e9 * t for t in (2, 3, 5, 8, 12, 20, 40)]
    found = fit_activation_law(tokens, law(tokens).clamp_min(0).tolist(), "silu") if c < limit else law
    assert found.alpha == pytest.approx(alpha, rel=0.01)
    assert found.c == pytest.approx(law.c, rel=0.01)
    assert found.limit == pytest.approx(limit, rel=0.01)


def test_a_noisy_fit_says_how_well_it_fits():
    noise = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 0.01
    law = PUBLISHED["0.2B", "silu"]
    tokens = torch.linspace(1e9, 60e9, 12).tolist()
    found = fit_activation_law(tokens, (law(tokens) + noise).tolist(), "silu")
    assert 0.8 < found.r2 < 0.999
    assert found.limit == pytest.approx(law.limit, abs=0.02)


def test_levenberg_marquardt_finds_a_curved_valley():
    """Rosenbrock's function as residuals, from the usual start."""
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    found, rest = levenberg_marquardt(lambda q: torch.stack([10 * (q[1] - q[0] ** 2), 1 - q[0]]), start)
    assert found.tolist() == pytest.approx([1.0, 1.0], abs=1e-8)
    assert rest < 1e-16


@given(bend=st.floats(80, 150), flat=st.floats(0.05, 0.2), slope=st.floats(1e-4, 1e-3))
@settings(max_examples=40, deadline=None)
def test_width_over_depth_is_recovered(bend, flat, slope):
    law = ShapeLaw(slope, flat, bend, 1.0)
    shapes = [18, 32, 48, 74, 100, 130, 160, 210, 282]
    found = fit_shape_law(shapes[::-1], law(shapes).tolist()[::-1])
    torch.testing.assert_close(found(shapes), law(shapes), atol=1e-9, rtol=1e-9)
    assert found.r2 == pytest.approx(1.0)
    assert found.bend == pytest.approx(bend, rel=1e-3)


def test_the_bend_beats_every_other():
    g = torch.Generator().manual_seed(0)
    shapes = torch.linspace(20, 280, 9)
    ratios = ShapeLaw(5e-4, 0.08, 114.0, 1.0)(shapes) + 0.003 * torch.randn(9, generator=g)
    found = fit_shape_law(shapes.tolist(), ratios.tolist())
    rest = float(((found(shapes) - ratios) ** 2).sum())
    for bend in torch.linspace(21, 280, 400).tolist():
        columns = torch.stack([(shapes - bend).clamp_max(0), torch.ones(9)], 1).double()
        best = torch.linalg.lstsq(columns, ratios.double()).solution
        assert rest <= float(((columns @ best - ratios) ** 2).sum()) + 1e-12


def test_points_that_cannot_be_fitted():
    for tokens, ratios, kind, message in (
        ([1e9, 2e9, 3e9], [0.1] * 3, "relu", "at least 4"),
        ([1e9, 2e9], [0.1] * 2, "silu", "at least 3"),
        ([1e9, 2e9, 3e9], [0.1] * 2, "silu", "at least 3"),
        ([1e9, 1e9, 3e9], [0.1] * 3, "silu", "different"),
        ([0.0, 1e9, 3e9], [0.1] * 3, "silu", "above 0"),
        ([1e9, 2e9, math.inf], [0.1] * 3, "silu", "above 0"),
        ([1e9, 2e9, 3e9], [0.1, 0.2, math.nan], "silu", "between 0 and 1"),
        ([1e9, 2e9, 3e9], [0.1, 0.2, 1.2], "silu", "between 0 and 1"),
        ([1e9, 2e9, 3e9], [0.1] * 3, "gelu", "not 'gelu'"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            fit_activation_law(tokens, ratios, kind)
        assert "\n" not in str(caught.value)
    for shapes, ratios, message in (
        ([1, 2, 3], [0.1] * 3, "four"),
        ([1, 2, 3, 3], [0.1] * 4, "different"),
        ([1, 2, 3, math.nan], [0.1] * 4, "finite"),
    ):
        with pytest.raises(InputError, match=message):
            fit_shape_law(shapes, ratios)
