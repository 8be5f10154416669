"""Student's t against closed forms and tables."""

import math

import pytest

from agft_ray.results.spread import Spread, t_probability, t_quantile


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_one_and_two_degrees_have_closed_forms(level):
    assert t_quantile(1, level) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-9)
    closed = level * math.sqrt(2 / (1 - level**2))
    assert t_quantile(2, level) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize(
    ("degrees", "tabled"), [(3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)]
)
def test_tables(degrees, tabled):
    assert t_quantile(degrees) == pytest.approx(tabled, abs=1e-6)


@pytest.mark.parametrize("degrees", [3, 4, 7, 10])
def test_probability_is_the_integral_of_the_density(degrees):
    """Simpson's rule over the density itself."""
    n, t = 2000, 1.7
    constant = math.gamma((degrees + 1) / 2) / (
        math.sqrt(degrees * math.pi) * math.gamma(degrees / 2)
    )
    xs = [t * i / n for i in range(n + 1)]
    ys = [constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in xs]
    weights = [1, *[4, 2] * (n // 2 - 1), 4, 1]
    integral = 2 * (t / n) / 3 * sum(w * y for w, y in zip(weights, ys, strict=True))
    assert t_probability(t, degrees) == pytest.approx(integral, rel=1e-9)


def test_a_spread_by_hand():
    # 1, 2, 3: standard error sqrt(1/3), t of two degrees 4.302653
    spread = Spread.of([1.0, 2.0, 3.0])
    assert spread.mean == 2.0
    assert spread.half_width == pytest.approx(4.302653 * math.sqrt(1 / 3), abs=1e-6)


def test_one_value_has_no_interval_and_none_no_spread():
    assert Spread.of([5.0]) == Spread(1, 5.0, None)
    assert Spread.of([]) is None
    assert Spread.of([2.0, 2.0]).half_width == 0.0
