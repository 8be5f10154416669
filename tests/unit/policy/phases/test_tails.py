"""Percentiles of latencies at default clocks, from counts at whatever clocks."""

from dataclasses import replace

import numpy as np
import pytest

from agft_ray.policy.phases.latency import Ratios
from agft_ray.policy.phases.tails import MIN_MEAN, MIN_P99, Tails
from agft_ray.telemetry.counters import EngineStats
from agft_ray.testing import WINDOW


def window_of(e2e_s):
    stats = EngineStats()
    for each in e2e_s:
        stats.on_finish(e2e_s=each, tpot_s=each / 100)
    return replace(WINDOW, e2e_histogram=stats.e2e_histogram, tpot_histogram=stats.tpot_histogram)


def ratios(value):
    return Ratios(*[np.array([value])] * 3)


def filled(rng, ratio=1.0, windows=100, stretch=1.0, tails=None):
    tails = tails or Tails()
    for _ in range(windows):
        tails.add(window_of(stretch * rng.lognormal(1.0, 0.6, 10)), ratios(ratio), 150.0)
    return tails


P99_S = np.exp(1.0 + 2.326 * 0.6)


def test_the_p99_is_that_of_the_distribution_within_its_own_spread():
    found_s = [filled(np.random.default_rng(seed)).p99_s("e2e") for seed in range(20)]
    assert np.mean(found_s) == pytest.approx(P99_S, rel=0.03)
    assert filled(np.random.default_rng(0)).p99_s("tpot") == pytest.approx(
        filled(np.random.default_rng(0)).p99_s("e2e") / 100, rel=0.05
    )


def test_the_mean_is_that_of_the_distribution():
    found_s = [filled(np.random.default_rng(seed), ratio=1.2, stretch=1.2) for seed in range(20)]
    mean_s = np.mean([each.mean_s("e2e") for each in found_s])
    assert mean_s == pytest.approx(np.exp(1.0 + 0.6**2 / 2), rel=0.02)


def test_it_is_not_known_from_few_requests():
    assert Tails().p99_s("e2e") is None
    few = filled(np.random.default_rng(0), windows=int(MIN_P99 / 10) - 1)
    assert few.p99_s("e2e") is None
    assert few.mean_s("e2e") is not None
    assert filled(np.random.default_rng(0), windows=int(MIN_MEAN / 10) - 1).mean_s("e2e") is None
    assert filled(np.random.default_rng(0), windows=12).p99_s("e2e") is not None
    assert filled(np.random.default_rng(0)).p99_s("ttft") is None, "none was counted"


def test_slower_clocks_that_stretch_all_latencies_alike_leave_it_as_it_is():
    same = filled(np.random.default_rng(0)).p99_s("e2e")
    slowed = filled(np.random.default_rng(0), ratio=1.3, stretch=1.3).p99_s("e2e")
    assert slowed == pytest.approx(same, rel=0.03)


def test_what_is_long_ago_is_forgotten():
    tails = filled(np.random.default_rng(0), stretch=5.0)
    assert tails.p99_s("e2e") > 3 * P99_S
    filled(np.random.default_rng(1), windows=1500, tails=tails)
    assert tails.p99_s("e2e") == pytest.approx(P99_S, rel=0.2)


def test_a_snapshot_is_the_same_and_a_broken_one_refused():
    tails = filled(np.random.default_rng(0))
    snapshot = tails.snapshot()
    assert Tails.restored(snapshot).snapshot() == snapshot
    for broken in ([1.0], [-1.0] * 192, [float("nan")] * 192):
        with pytest.raises(ValueError):
            Tails.restored(snapshot | {"e2e": broken})
