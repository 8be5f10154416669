import numpy as np
import pytest

from agft_ray.policy.agft.drift import PageHinkley


@pytest.mark.parametrize("sign", [1, -1])
def test_a_constant_shift_is_found_when_the_sum_passes_the_threshold(sign):
    detector = PageHinkley(tolerance=0.5, threshold=12.0)
    alarms = [detector.add(sign * 2.0) for _ in range(9)]
    assert alarms == [False] * 8 + [True]  # 1.5 a value; 8 * 1.5 = 12 does not exceed 12


def test_upper_sum_is_the_excess_over_its_minimum():
    values = np.random.default_rng(3).normal(size=500)
    detector = PageHinkley(tolerance=0.1, threshold=1e9)
    for value in values:
        detector.add(value)
    for sums, x in ((detector.upper, values), (detector.lower, -values)):
        walk = np.concatenate([[0.0], np.cumsum(x - 0.1)])
        assert sums == pytest.approx(walk[-1] - walk.min())


def test_noise_within_the_tolerance_raises_no_alarm():
    detector = PageHinkley(tolerance=0.5, threshold=12.0)
    values = np.random.default_rng(0).normal(size=20_000)
    assert not any(detector.add(value) for value in values)
