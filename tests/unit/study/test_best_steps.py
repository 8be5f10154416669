"""The steps of default clocks, each at its best clock: known answers, and all choices tried."""

import itertools
import math

import numpy as np
import pytest

from agft_ray.study.best_steps import least_energy
from agft_ray.study.policy_specs import parse_policy
from agft_ray.study.pool import one_by_one
from agft_ray.study.scenario import Scenario
from agft_ray.study.study import Study

ENERGY = np.array([[10.0, 6.0], [8.0, 7.0]])
TIME = np.array([[1.0, 2.0], [1.0, 1.5]])


def test_without_pressure_each_step_takes_its_cheapest_clock():
    least = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=0.0, total_s=5.0, max_increase=1.0)
    assert (least.energy_j, least.multiplier_w) == (13.0, 0.0)
    assert least.delay_increase == pytest.approx(0.75)


def test_the_multiplier_sells_delay_where_it_is_cheapest():
    # 4 J for the first second, 2 J for a second of the other: the limit of 2.6 s allows only the
    # half second of the second kind; its price is 2 W, the other's 4 W.
    least = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=0.0, total_s=5.0, max_increase=0.3)
    assert least.multiplier_w > 2.0
    assert least.energy_j in (17.0, 18.0)
    assert least.delay_increase <= 0.3
    tight = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=0.0, total_s=5.0, max_increase=0.0)
    assert (tight.energy_j, tight.delay_increase) == (18.0, 0.0)


def test_idle_power_is_paid_all_the_time_and_not_twice():
    least = least_energy(ENERGY, TIME, delay_s=2.0, idle_w=1.0, total_s=5.0, max_increase=0.0)
    # busy 2 s at the first clock: 18 J; idle for the other 3 s at 1 W
    assert least.energy_j == pytest.approx(21.0)


def test_the_multiplier_is_never_beaten_by_any_other_choice_of_the_same_delay():
    rng = np.random.default_rng(0)
    energy, time = rng.uniform(1, 10, (6, 3)), rng.uniform(1, 3, (6, 3))
    least = least_energy(
        energy, time, delay_s=float(time[:, 0].sum()), idle_w=0.5, total_s=50.0, max_increase=0.1
    )
    spent_s = (1.0 + least.delay_increase) * time[:, 0].sum()
    rows = np.arange(6)
    cheapest = min(
        (energy[rows, list(choice)] - 0.5 * time[rows, list(choice)]).sum() + 25.0
        for choice in itertools.product(range(3), repeat=6)
        if time[rows, list(choice)].sum() <= spent_s + 1e-9
    )
    assert least.energy_j == pytest.approx(cheapest)


def test_the_steps_of_default_clocks_cost_less_each_at_its_best_clock():
    scenario = Scenario(rate_per_s=1.0, duration_s=60.0)
    study = Study(scenario, [parse_policy("best_steps")], [0])
    default, least = study.run(one_by_one, lambda name, runs: lambda number, t_s: None)
    assert least.policy == "best_steps"
    assert least.energy_j < 0.7 * default.energy_j
    assert least.energy_j > 40.0 * default.duration_s
    assert least.edp_j_s is None
    assert least.e2e_s.mean is None
    assert not math.isnan(least.mean_power_w)
