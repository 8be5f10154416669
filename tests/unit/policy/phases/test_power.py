"""Power by phase and clock, told apart from windows."""

import json

import numpy as np
import pytest

from agft_ray.policy.phases import power
from agft_ray.policy.phases.power import IDLE_DEFAULT, IDLE_LOWEST, PowerSums, exposure, fit

TOP = 2100.0
IDLE_W = {IDLE_DEFAULT: 100.0, IDLE_LOWEST: 50.0}


def prefill_w(clock):
    return 60 + 220 * (TOP if clock is None else clock) / TOP


def decode_w(clock):
    return 50 + 160 * ((TOP if clock is None else clock) / TOP) ** 2


def learned(clocks, rng, windows=20):
    sums = PowerSums()
    for clock in clocks:
        for _ in range(windows):
            p, i = rng.uniform(0, 0.4), rng.uniform(0, 0.4)
            kind = IDLE_DEFAULT if clock is None else IDLE_LOWEST
            watts = p * prefill_w(clock) + (1 - p - i) * decode_w(clock) + i * IDLE_W[kind]
            x = exposure((p, 1 - p - i, i), (clock, clock), kind, 1.0)
            sums.add(x, watts, 2 * i)
    return sums


def test_power_of_each_phase_from_windows_of_all_three():
    clocks = [None, *range(1200, 2101, 100)]
    model = fit(learned(clocks, np.random.default_rng(0)), TOP, 0.0, (1200.0, 1200.0))
    at = np.arange(1200.0, 2001.0, 100)
    np.testing.assert_allclose(model.prefill_w(at), prefill_w(at), rtol=0.02)
    np.testing.assert_allclose(model.decode_w(at), decode_w(at), rtol=0.02)
    assert model.idle_w[IDLE_DEFAULT] == pytest.approx(100, rel=0.01)
    assert model.idle_w[IDLE_LOWEST] == pytest.approx(50, rel=0.02)


def test_a_clock_below_what_was_measured_is_hoped_to_draw_less():
    model = fit(learned([None], np.random.default_rng(0)), TOP, 0.0, (TOP, TOP))
    watts = model.decode_w(np.array([1500.0, 1800.0, 2100.0]))
    assert watts[0] < watts[1] < watts[2] == pytest.approx(decode_w(None), rel=0.1)


def test_no_higher_clock_draws_less():
    rng = np.random.default_rng(1)
    sums = learned([None, 2000, 1900, 1800], rng)
    sums.response *= 1 + 0.1 * rng.normal(size=len(sums.response))
    watts = fit(sums, TOP, 0.0, (1800.0, 1800.0)).prefill_w(np.arange(1500.0, 2101.0, 15))
    assert (np.diff(watts) >= -1e-9).all()


def test_sums_add_up_and_survive_as_json():
    rng = np.random.default_rng(0)
    one, other = learned([None], rng), learned([1500], rng)
    gram = one.gram + other.gram
    one.merge(other)
    np.testing.assert_array_equal(one.gram, gram)
    again = PowerSums.restored(json.loads(json.dumps(one.snapshot())))
    assert again.snapshot() == one.snapshot()
    with pytest.raises(ValueError):
        PowerSums.restored(one.snapshot() | {"gram": [[1.0]]})
    assert len(one.response) == power.FEATURES
