"""Numbers as people read them."""

import pytest

from agft_ray.results.numbers import change_text, number, spread_text, verdict
from agft_ray.results.spread import Spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (float("nan"), "—"),
        (float("inf"), "—"),
        (0, "0"),
        (0.0, "0.000"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        (123.456, "123.5"),
        (-1.23456, "-1.235"),
        (0.00123456, "0.001235"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("spread", "scale", "text"),
    [
        (None, 1.0, "—"),
        (Spread(1, 0.0255, None), 1e3, "25.5"),
        (Spread(3, 1234.5, 12.6), 1.0, "1,234±13"),
        (Spread(3, 0.1234, 0.01), 1.0, "0.123±0.010"),
        (Spread(2, 0.0, 0.0), 1.0, "0±0"),
    ],
)
def test_spread(spread, scale, text):
    assert spread_text(spread, scale=scale) == text


@pytest.mark.parametrize(
    ("change", "text", "judged"),
    [
        (None, "—", None),
        (Spread(1, -47.66, None), "-47.7", "better"),
        (Spread(3, -47.66, 0.91), "-47.7±0.9", "better"),
        (Spread(3, 5.0, 6.0), "+5.0±6.0", "same"),
        (Spread(3, 31.2, 18.7), "+31±19", "worse"),
        (Spread(3, 163.2, 2.0), "+163±2", "worse"),
        (Spread(3, 1900.0, 50.0), "x20", "worse"),
    ],
)
def test_change(change, text, judged):
    assert change_text(change) == text
    if change is not None:
        assert verdict(change) == judged
        assert verdict(change, judged=False) == "same"


def test_a_change_too_small_to_see_is_none():
    assert verdict(Spread(1, -0.4, None), visible_percent=0.5) == "same"
    assert verdict(Spread(1, -0.6, None), visible_percent=0.5) == "better"
