"""The searches in hindsight: known answers, and exhaustive search by other means."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from agft_ray.errors import ConfigError
from agft_ray.results.comparison import ranking, standings, with_regret
from agft_ray.results.distribution import Distribution
from agft_ray.settings import SloConfig
from agft_ray.simulation.physics import StepWork
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.study.bounds import Bound, Bounds, BoundsWatch, allowed
from agft_ray.study.oracle import Axes, Oracle, distinct
from agft_ray.study.policy_specs import pair, parse_policy
from agft_ray.study.pool import one_by_one
from agft_ray.study.run import AbandonedError, Job, Run, perform
from agft_ray.study.scenario import Scenario
from agft_ray.study.static import DrownedWatch, best_static, clock_grid
from agft_ray.study.study import Study
from agft_ray.workloads.requests import RequestTimings
from unit.results.test_record import RECORD

A6000 = load_gpu_profile("rtx_a6000")
SLO_FREE = SloConfig()
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


def no_phase(name, runs):
    return lambda number, t_s: None


# -- choosing --------------------------------------------------------------------------------------


class Pairs:
    """Runs by seed and plan, as measured."""

    def __init__(self, *runs):
        self.runs = {(run.seed, run.policy): run for run in runs}
        self.asked = []

    def __call__(self, jobs):
        self.asked += jobs
        return [self.runs.get((job.seed, job.spec.label.removesuffix("/210"))) for job in jobs]


def oracle(*runs, defaults=(DEFAULT,), objective="edp", slo=SLO_FREE):
    """What it finds of two clocks for prefill, two for decode, one and the governor for idle."""
    scenario = Scenario(rate_per_s=1.0, duration_s=60.0, slo=slo)
    measured = Pairs(*runs)
    found = Oracle(
        templates={run.seed: Job(scenario, parse_policy("default"), run.seed) for run in defaults},
        defaults={run.seed: Run(run, None) for run in defaults},
        axes=Axes((900, 1500), (900, 1500), (210,)),
        objective=objective,
        measure=measured,
    ).best()
    assert all(job.watch and job.keeps_requests for job in measured.asked[: -len(defaults)])
    return found


def test_the_best_pair_within_the_bounds():
    (best,) = oracle(*PAIRS)
    assert (best.policy, best.choice, best.energy_j) == ("oracle_pair", "1500/1500/210", 520.0)
    assert oracle(*PAIRS, objective="energy")[0].choice == "1500/900/210"
    assert oracle(PAIRS[0]) == []


def test_the_governor_while_empty_is_among_the_plans():
    idle = record("pair:1500/1500/default", 300.0, 5.1)
    assert oracle(*PAIRS, idle)[0].choice == "1500/1500/default"


def test_with_an_slo_its_p99_is_the_bound():
    assert oracle(*PAIRS, slo=SloConfig(ttft_s=0.22))[0].choice == "900/900/210"
    assert oracle(*PAIRS, slo=SloConfig(tpot_s=0.02)) == []


def test_one_plan_for_all_seeds_and_a_record_of_each():
    """The p99 of one seed of three does not rule out a plan, that of two does."""
    seeds = (0, 1, 2)
    defaults = [replace(DEFAULT, seed=seed) for seed in seeds]
    slow = replace(PAIRS[1], e2e_s=replace(PAIRS[1].e2e_s, p99=7.0))

    def found(slow_seeds):
        runs = [replace(run, seed=seed) for run in PAIRS for seed in seeds if run != PAIRS[1]]
        runs += [replace(slow if seed in slow_seeds else PAIRS[1], seed=seed) for seed in seeds]
        return oracle(*runs, defaults=defaults, objective="energy")

    once, twice = found({1}), found({0, 2})
    assert [run.choice for run in once] == ["1500/900/210"] * 3
    assert [run.seed for run in once] == [0, 1, 2]
    assert once[1].e2e_s.p99 == 7.0
    assert [run.choice for run in twice] == ["1500/1500/210"] * 3


def test_means_are_bounded_over_all_seeds_together():
    defaults = [replace(DEFAULT, seed=seed) for seed in (0, 1)]
    bounds = [Bounds.of(default, SLO_FREE, 0.10) for default in defaults]
    fast, slow = (record("pair:900/900", 400.0, e2e_s) for e2e_s in (5.1, 5.8))
    assert not allowed(bounds[:1], [slow])
    assert allowed(bounds, [fast, slow])
    assert not allowed(bounds, [slow, record("pair:900/900", 400.0, 5.3)])


def test_the_best_fixed_clock_and_the_regret():
    runs = [record("fixed:900", 500.0, 6.0), record("fixed:1200", 520.0, 5.5)]
    best = best_static(runs)
    assert (best.policy, best.choice) == ("best_static", "1200")
    done = {run.policy: run.regret for run in with_regret([DEFAULT, best, *oracle(*PAIRS)])}
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


def test_with_several_seeds_only_what_they_all_could_not_make_up_is_abandoned():
    bounds = bounds_of(10, mean_s=1.0, p99_s=1.0)
    assert fed(BoundsWatch(bounds, seeds=2), [3.0] * 6 + [2.1, 0.1]) == 6
    assert fed(BoundsWatch(bounds, seeds=2), [9.0] + [1.2] * 9) == 10


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


def test_the_axes_end_at_the_cap_and_the_lowest_clock_is_always_there_while_empty():
    axes = Axes.of(A6000, "llama-3.1-8b", 900)
    assert axes.idle == (210, 300, 1200, 2100)
    assert axes.prefill == (300, 1200, 2100)
    assert Axes.of(A6000, "llama-3.1-8b", 30).prefill[-1] == 1590
    assert axes.spec((1, 0, 0)).label == "pair:1200/300/210"
    assert axes.spec((1, 0, 4)).label == "pair:1200/300/default"
    assert axes.sizes[2] == 5


def test_the_clock_that_is_kept_of_equal_ones_is_the_best_of_them():
    """Equal but for the delay of a change: a first decode step still has the clock of prefill."""
    high, kept, lower = (
        perform(Job(SHORT, pair(clock, 1200), 0), silent).record for clock in (2100, 1590, 1500)
    )
    assert kept.ttft_s.mean == pytest.approx(high.ttft_s.mean, rel=2e-2)
    assert kept.ttft_s.mean != pytest.approx(lower.ttft_s.mean, rel=2e-2)
    assert 0.97 * high.edp_j_s < kept.edp_j_s < high.edp_j_s


@functools.cache
def everything(step_mhz, seed):
    """Every plan of a coarse grid run to its end, by its name."""
    axes = Axes.of(A6000, SHORT.model, step_mhz)
    specs = [axes.spec(point) for point in itertools.product(*map(range, axes.sizes))]
    jobs = [Job(SHORT, spec, seed, keeps_requests=True) for spec in specs]
    return {job.spec.label.removeprefix("pair:"): perform(job, silent).record for job in jobs}


def changes(run, default):
    """Means, then p99s, relative to default clocks."""
    names = [f"{name}.{s}" for s in ("mean", "p99") for name in ("ttft_s", "tpot_s", "e2e_s")]
    return np.array([run.value(name) / default.value(name) for name in names])


@pytest.mark.parametrize("objective", ["edp", "energy"])
def test_the_oracle_is_that_of_an_exhaustive_search_without_shortcuts(objective):
    """Over both seeds; none of its shortcuts and none of the abandoned runs were the answer."""
    step_mhz, seeds = 420, (1, 2)
    study = Study(
        SHORT,
        [parse_policy("oracle_pair")],
        seeds,
        oracle_step_mhz=step_mhz,
        oracle_objective=objective,
    )
    records = study.run(one_by_one, no_phase)
    defaults, oracles = records[:2], records[2:]
    runs = [everything(step_mhz, seed) for seed in seeds]
    name = "energy_j" if objective == "energy" else "edp_j_s"
    scores = {}
    for choice in runs[0]:
        both = [runs[0][choice], runs[1][choice]]
        rises = [changes(run, default) for run, default in zip(both, defaults, strict=True)]
        if (np.mean(rises, axis=0)[:3] <= 1.1).all() and (
            np.median(rises, axis=0)[3:] <= 1.1
        ).all():
            ratios = [
                run.value(name) / d.value(name) for run, d in zip(both, defaults, strict=True)
            ]
            scores[choice] = np.mean(ratios)
    best = min(scores, key=scores.get)
    assert [oracle.choice for oracle in oracles] == [best] * 2
    assert [oracle.value(name) for oracle in oracles] == [by[best].value(name) for by in runs]
    assert 0 < len(scores) < len(runs[0])


def test_no_neighbour_on_the_grid_of_30_mhz_is_better():
    study = Study(SHORT, [parse_policy("oracle_pair")], [0], oracle_objective="energy")
    default, oracle = study.run(one_by_one, no_phase)
    prefill, decode, idle = map(int, oracle.choice.split("/"))
    idles = {max(idle - 30, 210), idle, idle + 30, "default"}
    for a, b, c in itertools.product((-30, 0, 30), (-30, 0, 30), idles):
        run = perform(Job(SHORT, pair(prefill + a, decode + b, c), 0), silent).record
        assert run.energy_j >= oracle.energy_j or (changes(run, default) > 1.1).any()
