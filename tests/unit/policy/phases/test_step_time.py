"""Step times: true parameters from noiseless windows, and a walk that never leaves its bound."""

import json

import numpy as np
import pytest

from agft_ray.policy.phases.step_time import DECODE_SCALES, fit
from agft_ray.policy.phases.work import WorkSums, decode_work, prefill_work, total
from agft_ray.testing import WINDOW
from agft_ray.types import StepTotals

TOP = 2100
COSTS = np.array([0.024, 0.004, 0.03, 0.0])


def slowdown(clock, ridge=1.4):
    """Flat above f_max / ridge, then as 1/f."""
    return max(1.0, TOP / clock / ridge)


def learned(clocks, rng, *, noise=0.0, windows=12, curve=slowdown):
    sums = WorkSums()
    for clock in clocks:
        for _ in range(windows):
            work = np.array([60.0, 60 * rng.uniform(1, 8) / 16, 60 * rng.uniform(0.05, 0.3), 0.0])
            time_s = COSTS @ work * curve(clock or TOP) * (1 + noise * rng.normal())
            sums.add(clock, work, time_s, 60)
    return sums


def test_noiseless_steps_give_the_true_costs_and_slowdowns():
    sums = learned((0, 1950, 1800, 1600, 1500, 1400, 1300, 1200), np.random.default_rng(0))
    model = fit(sums, TOP, 12)
    np.testing.assert_allclose(model.costs[:3], COSTS[:3], rtol=2e-3)
    for clock in (1950, 1600, 1400, 1300, 1200):
        assert model.slowdown(np.array([clock]))[0] == pytest.approx(slowdown(clock), abs=0.015)
    assert model.lowest_mhz == 1200


def test_below_what_was_measured_it_is_as_slow_as_can_be():
    model = fit(learned((0, 1800, 1500), np.random.default_rng(0)), TOP, 12)
    measured, below = model.expected(np.array([1500.0]))[0], model.slowdown(np.array([1000.0]))[0]
    assert below == pytest.approx(measured * 1.5)


def test_what_was_measured_is_as_slow_as_its_error_allows():
    sums = learned((0, 1800, 1500, 1200), np.random.default_rng(0), noise=0.1)
    model = fit(sums, TOP, 12)
    assert 0.1 / 10 < model.error < 0.1  # of some tens of windows that spread by 0.1
    upper = model.expected(np.array([1200.0])) * (1 + 2 * model.error)
    np.testing.assert_allclose(model.slowdown(np.array([1200.0])), upper)


def test_its_error_is_as_great_as_the_work_is_new():
    sums = learned((0, 1800, 1500), np.random.default_rng(0), noise=0.01)
    usual, new = np.array([60.0, 60 * 4 / 16, 10.0, 0.0]), np.array([60.0, 60 * 60 / 16, 60.0, 0.0])
    errors = [
        fit(sums, TOP, 12, works=works, scales=DECODE_SCALES).error
        for works in ((), [usual], [new], [usual, new])
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.5)
    assert errors[2] > 3 * errors[1]
    assert errors[3] == errors[2]


def test_of_one_window_nothing_is_made_that_is_not_finite():
    for sums in (WorkSums(), learned((1800,), np.random.default_rng(0), windows=1)):
        model = fit(sums, TOP, 12, scales=DECODE_SCALES)
        assert model.error == 1.0
        assert np.isfinite(model.slowdown(np.array([1800.0, 300.0]))).all()


def test_below_a_clock_that_was_slower_than_the_curve_says_its_own_windows_count():
    sums = learned((0, 1950, 1800, 1600), np.random.default_rng(0), curve=lambda clock: 1.0)
    rng = np.random.default_rng(1)
    for _ in range(2):
        work = np.array([60.0, 60 * rng.uniform(1, 8) / 16, 60 * rng.uniform(0.05, 0.3), 0.0])
        sums.add(1500, work, COSTS @ work * 1.08, 60)
    model = fit(sums, TOP, 12)
    assert model.edge == pytest.approx(1.08, abs=0.01)
    assert model.slowdown(np.array([1400.0]))[0] == pytest.approx(model.edge * 1500 / 1400)


def test_a_step_loses_what_it_does_less_at_the_clock_before_its_own():
    model = fit(learned((0, 1800, 1500, 1200), np.random.default_rng(0)), TOP, 12)
    lost = model.lost(np.array([1800.0]), np.array([1200.0, 600.0, 2000.0]))
    true = [1 - slowdown(1800) / slowdown(1200), 1 - slowdown(1800) / (2 * slowdown(1200)), 0.0]
    np.testing.assert_allclose(lost, true, atol=0.02)


def test_where_no_clock_was_slower_yet_half_the_way_down_is_taken_to_be_lost():
    sums = learned((0, 1950, 1900), np.random.default_rng(0), curve=lambda clock: 1.0)
    lost = fit(sums, TOP, 12).lost(np.array([1900.0]), np.array([475.0]))
    np.testing.assert_allclose(lost, 1 - 1 / np.sqrt(4.0), atol=0.01)


def test_a_load_that_rises_while_clocks_fall_is_not_taken_for_the_clock():
    rng, sums = np.random.default_rng(0), WorkSums()
    for i, clock in enumerate([0] * 10 + list(range(2000, 1000, -60))):
        work = np.array([60.0, 60 * (1 + 0.3 * i + rng.uniform()) / 16, 60 * 0.01 * (1 + i), 0.0])
        sums.add(clock, work, COSTS @ work * slowdown(clock or TOP), 60)
    model = fit(sums, TOP, 12)
    clocks = np.arange(1060.0, 2001.0, 60)
    np.testing.assert_allclose(
        model.slowdown(clocks), [slowdown(clock) for clock in clocks], rtol=0.02
    )


def test_the_highest_clock_is_evidence_of_default_clocks():
    rng = np.random.default_rng(0)
    alone = learned((0,), rng, noise=0.1, windows=50)
    both = total([alone, learned((TOP,), rng, noise=0.1, windows=150)])
    assert fit(both, TOP, 12).error == pytest.approx(fit(alone, TOP, 12).error / 2, rel=0.3)


@pytest.mark.parametrize("seed", range(30))
def test_walking_down_never_leaves_the_bound_in_convex_worlds(seed):
    """Each step as far as the model allows, with what was measured so far."""
    rng = np.random.default_rng(seed)
    rise, power, bound = rng.uniform(0.2, 1.0), rng.uniform(1.0, 8.0), 1.10

    def truth(clock):  # convex in f_max/f, never faster than it
        return ((1 + (rise * TOP / clock) ** power) / (1 + rise**power)) ** (1 / power)

    sums, clock, arms = learned((0,), rng, noise=0.003, curve=truth), TOP, np.arange(210, 2101, 15)
    for _ in range(25):
        model = fit(sums, TOP, 12)
        reach = arms[arms >= model.lowest_mhz * 0.92]
        clock = int(reach[model.slowdown(reach.astype(float)) <= bound].min())
        assert truth(clock) <= bound * 1.006
        sums.merge(learned((clock,), rng, noise=0.003, windows=2, curve=truth))
    assert truth(clock) >= bound - 0.03, "and it arrives"


def test_sums_add_up_over_replicas_and_survive_as_json():
    rng = np.random.default_rng(0)
    one, other = learned((0, 1500), rng), learned((0, 1200), rng)
    both = total([one, other])
    assert both.steps.sum() == one.steps.sum() + other.steps.sum()
    again = WorkSums.restored(json.loads(json.dumps(both.snapshot())))
    assert again.snapshot() == both.snapshot()
    for broken in ({"keys": [1500]}, {"steps": [1.0]}, {"grams": float("nan")}):
        with pytest.raises(ValueError):
            WorkSums.restored(both.snapshot() | broken)


def test_work_of_a_window():
    from dataclasses import replace

    window = replace(
        WINDOW,
        decode_steps=StepTotals(40, 160, 1.0),
        prefill_steps=StepTotals(2, 4096, 0.8),
        kv_cache_usage=0.25,
    )
    assert decode_work(window).tolist() == [40, 10, 10, 0]
    assert prefill_work(window).tolist() == [2, 4, 2 * (2048 - 256) / 1024, 2]
    assert prefill_work(replace(window, prefill_steps=StepTotals())).tolist() == [0, 0, 0, 0]
