"""The searches in hindsight: known answers, and exhaustive search by other means."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from agft_ray.errors import ConfigError
from agft_ray.results.comparison import ranking, standings, with_regret
from agft_ray.results.distribution import Distribution
from agft_ray.settings import SloConfig
from agft_ray.simulation.physics import StepWork
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.study.lower_bound import least_energy
from agft_ray.study.oracle import (
    Bound,
    Bounds,
    BoundsWatch,
    DrownedWatch,
    best_static,
    clock_grid,
    distinct,
    oracle_pair,
)
from agft_ray.study.policy_specs import pair, parse_policy
from agft_ray.study.pool import one_by_one
from agft_ray.study.run import AbandonedError, Job, perform
from agft_ray.study.scenario import Scenario
from agft_ray.study.study import Study
from agft_ray.workloads.requests import RequestTimings
from unit.results.test_record import RECORD

A6000 = load_gpu_profile("rtx_a6000")
SHORT = Scenario(rate_per_s=1.0, duration_s=60.0)


def record(policy, energy_j, e2e_s, ttft_s=0.2, seed=0):
    return replace(
        RECORD,
        policy=policy,
        seed=seed,
        energy_j=energy_j,
        e2e_s=Distribution(10, e2e_s, e2e_s, e2e_s, e2e_s),
        ttft_s=Distribution(10, ttft_s, ttft_s, ttft_s, ttft_s),
        tpot_s=Distribution(10, 0.03, 0.03, 0.03, 0.03),
        edp_j_s=energy_j * e2e_s,
    )


DEFAULT = record("default", 1000.0, 5.0)
PAIRS = [
    record("pair:900/900", 400.0, 6.0),  # lowest EDP, E2E 20 % up
    record("pair:1500/900", 500.0, 5.4),  # EDP 2700
    record("pair:900/1500", 450.0, 5.4, ttft_s=0.23),  # EDP 2430, TTFT 15 % up
    record("pair:1500/1500", 520.0, 5.1),  # EDP 2652
]


def silent(t_s):
    pass


# -- choosing --------------------------------------------------------------------------------------


def test_the_best_pair_within_the_bounds():
    bounds = Bounds.of(DEFAULT, SloConfig())
    best = oracle_pair(PAIRS, bounds, "edp")
    assert (best.policy, best.choice, best.energy_j) == ("oracle_pair", "1500/1500", 520.0)
    assert oracle_pair(PAIRS, bounds, "energy").choice == "1500/900"
    assert oracle_pair(PAIRS[:1], bounds, "edp") is None


def test_with_an_slo_its_p99_is_the_bound():
    bounds = Bounds.of(DEFAULT, SloConfig(ttft_s=0.22))
    assert oracle_pair(PAIRS, bounds, "edp").choice == "900/900"
    assert oracle_pair(PAIRS, Bounds.of(DEFAULT, SloConfig(tpot_s=0.02)), "edp") is None


def test_the_best_fixed_clock_and_the_regret():
    runs = [record("fixed:900", 500.0, 6.0), record("fixed:1200", 520.0, 5.5)]
    best = best_static(runs)
    assert (best.policy, best.choice) == ("best_static", "1200")
    oracle = oracle_pair(PAIRS, Bounds.of(DEFAULT, SloConfig()), "edp")
    done = {run.policy: run.regret for run in with_regret([DEFAULT, best, oracle])}
    assert done["oracle_pair"] == 0.0
    assert done["default"] == pytest.approx(5000.0 / 2652.0 - 1.0)
    assert with_regret([DEFAULT])[0].regret is None


def test_standings_pair_runs_by_seed():
    runs = [
        record("default", 1000.0, 5.0, seed=0),
        record("default", 2000.0, 5.0, seed=1),
        record("agft", 600.0, 5.0, seed=0),
        record("agft", 1000.0, 5.0, seed=1),
    ]
    default, agft = standings(runs)
    assert default.changes_percent["energy_j"].mean == 0.0
    change = agft.changes_percent["energy_j"]
    # -40 % and -50 %: mean -45, standard error 5, t of one degree 12.7062
    assert change.mean == pytest.approx(-45.0)
    assert change.half_width == pytest.approx(5.0 * 12.7062, rel=1e-5)
    assert ranking(runs) == ["agft", "default"]


# -- bounds while a run goes on --------------------------------------------------------------------


def timings(e2e_s):
    return RequestTimings("r", 0.0, 10, 1, 0.0, e2e_s)


def fed(watch, values):
    """How many values pass before the watch abandons; all of them if it never does."""
    for count, value in enumerate(values):
        try:
            watch.on_request(timings(value))
        except AbandonedError:
            return count
    return len(values)


def bounds_of(count, mean_s=None, p99_s=None):
    free = Bound(count, None, None)
    return Bounds(free, free, Bound(count, mean_s, p99_s))


def test_a_mean_is_broken_once_the_sum_is_too_large():
    watch = BoundsWatch(bounds_of(10, mean_s=1.0))
    assert fed(watch, [3.0, 3.0, 3.0, 0.9, 0.2]) == 4


@pytest.mark.parametrize("count", [1, 2, 50, 99, 100, 101, 250, 1000])
def test_a_run_is_abandoned_only_if_its_p99_is_broken(count):
    """For every number of slow requests, against NumPy's percentile of the whole run."""
    for slow in range(min(count, 20) + 1):
        values = [1.0] * (count - slow) + [5.0] * slow
        passed = fed(BoundsWatch(bounds_of(count, p99_s=2.0)), values) == count
        if not passed:
            assert np.percentile(values, 99) > 2.0
        if slow > 0.01 * count + 1:
            assert not passed


def test_a_run_that_takes_too_long_is_abandoned():
    watch = DrownedWatch(10.0)
    watch.on_time(10.0)
    with pytest.raises(AbandonedError):
        watch.on_time(10.1)


# -- grids -----------------------------------------------------------------------------------------


def test_the_grid_goes_down_from_the_highest_clock():
    assert clock_grid(A6000, 630, "--x") == (210, 840, 1470, 2100)
    assert clock_grid(A6000, 900, "--x") == (300, 1200, 2100)
    for step in (0, 10, 100):
        with pytest.raises(ConfigError, match=rf"--x: (?s:.*) {step}: .*\b15 MHz"):
            clock_grid(A6000, step, "--x")


def test_clocks_that_the_power_cap_makes_equal_are_one():
    clocks = (1500, 1590, 1605, 1650, 1800, 2100)
    assert distinct(clocks, A6000, "llama-3.1-8b", StepWork(prefill_tokens=1)) == (1500, 1590)
    assert distinct(clocks, A6000, "llama-3.1-8b", StepWork(0, 1, 1))[:4] == clocks[:4]


def test_the_clock_that_is_kept_of_equal_ones_is_the_best_of_them():
    """Equal but for the delay of a change: a first decode step still has the clock of prefill."""
    high, kept, lower = (
        perform(Job(SHORT, pair(clock, 1200), 0), silent).record for clock in (2100, 1590, 1500)
    )
    assert kept.ttft_s.mean == pytest.approx(high.ttft_s.mean, rel=2e-2)
    assert kept.ttft_s.mean != pytest.approx(lower.ttft_s.mean, rel=2e-2)
    assert 0.97 * high.edp_j_s < kept.edp_j_s < high.edp_j_s


def test_the_oracle_is_that_of_an_exhaustive_search_without_shortcuts():
    """All pairs of a coarse grid run to their end, and the best picked by hand."""
    step_mhz = 630
    study = Study(SHORT, [parse_policy("oracle_pair")], [1], oracle_step_mhz=step_mhz)
    default, oracle = study.run(one_by_one, lambda name, runs: lambda number, t_s: None)
    runs = [
        perform(Job(SHORT, pair(*clocks), 1), silent).record
        for clocks in itertools.product(clock_grid(A6000, step_mhz, "--x"), repeat=2)
    ]

    def allowed(run):
        return all(
            run.value(f"{name}.{s}") <= 1.1 * default.value(f"{name}.{s}")
            for name in ("ttft_s", "tpot_s", "e2e_s")
            for s in ("mean", "p99")
        )

    best = min((run for run in runs if allowed(run)), key=lambda run: run.edp_j_s)
    assert oracle.edp_j_s == best.edp_j_s
    assert oracle.choice == best.policy.removeprefix("pair:")
    assert not all(allowed(run) for run in runs)


# -- the lower bound -------------------------------------------------------------------------------

ENERGY = np.array([[10.0, 6.0], [8.0, 7.0]])
TIME = np.array([[1.0, 2.0], [1.0, 1.5]])


def test_without_pressure_each_step_takes_its_cheapest_clock():
    bound = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=0.0, total_s=5.0, max_increase=1.0)
    assert (bound.energy_j, bound.multiplier_w) == (13.0, 0.0)
    assert bound.delay_increase == pytest.approx(0.75)


def test_the_multiplier_sells_delay_where_it_is_cheapest():
    # 4 J for the first second, 2 J for a second of the other: the limit of 2.6 s allows only the
    # half second of the second kind; its price is 2 W, the other's 4 W.
    bound = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=0.0, total_s=5.0, max_increase=0.3)
    assert bound.multiplier_w > 2.0
    assert bound.energy_j in (17.0, 18.0)
    assert bound.delay_increase <= 0.3
    tight = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=0.0, total_s=5.0, max_increase=0.0)
    assert (tight.energy_j, tight.delay_increase) == (18.0, 0.0)


def test_idle_power_is_paid_all_the_time_and_not_twice():
    bound = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=1.0, total_s=5.0, max_increase=0.0)
    # busy 2 s at the first clock: 18 J; idle for the other 3 s at 1 W
    assert bound.energy_j == pytest.approx(21.0)


def test_the_multiplier_is_never_beaten_by_any_other_choice_of_the_same_delay():
    rng = np.random.default_rng(0)
    energy, time = rng.uniform(1, 10, (6, 3)), rng.uniform(1, 3, (6, 3))
    bound = least_energy(
        energy, time, delay_s=float(time[:, 0].sum()), idle_w=0.5, total_s=50.0, max_increase=0.1
    )
    spent_s = (1.0 + bound.delay_increase) * time[:, 0].sum()
    rows = np.arange(6)
    cheapest = min(
        (energy[rows, list(choice)] - 0.5 * time[rows, list(choice)]).sum() + 25.0
        for choice in itertools.product(range(3), repeat=6)
        if time[rows, list(choice)].sum() <= spent_s + 1e-9
    )
    assert bound.energy_j == pytest.approx(cheapest)


def test_the_bound_lies_below_the_oracle_and_above_an_idle_gpu():
    study = Study(
        SHORT, [parse_policy("oracle_pair"), parse_policy("lower_bound")], [0], oracle_step_mhz=315
    )
    default, oracle, bound = study.run(one_by_one, lambda name, runs: lambda number, t_s: None)
    assert bound.policy == "lower_bound"
    assert bound.energy_j < oracle.energy_j < default.energy_j
    assert bound.energy_j > 40.0 * default.duration_s
    assert bound.edp_j_s is None
    assert bound.e2e_s.mean is None
    assert not math.isnan(bound.mean_power_w)
