import math

import pytest
from pydantic import ValidationError

from agft_ray.policy.baselines.pid import PidConfig, PidPolicy
from unit.policy.policy_tools import ARMS, choice, drive, outcome

CONFIG = PidConfig(tpot_slo_s=0.05)


def tpot(make_window, tpot_s, **changes):
    return make_window(itl_sum_s=300 * tpot_s, itl_count=300, **changes)


@pytest.mark.parametrize("start", [0.030, 0.044])
def test_it_settles_where_tpot_meets_the_set_point(make_window, start):
    """TPOT = start * 2100 / f: the set point of 45 ms is at f = 2100 * start / 0.045."""
    clocks = drive(CONFIG, lambda clock: tpot(make_window, start * 2100 / clock), 80)
    assert clocks[-1] == pytest.approx(2100 * start / 0.045, abs=15)
    assert max(clocks[-20:]) - min(clocks[-20:]) <= 15


def test_it_settles_where_queues_make_tpot_rise_with_the_fourth_power(make_window):
    clocks = drive(CONFIG, lambda clock: tpot(make_window, 0.045 * (1500 / clock) ** 4), 80)
    assert clocks[-1] == pytest.approx(1500, abs=15)


def test_one_step_is_the_velocity_form(make_window):
    config = PidConfig(tpot_slo_s=0.05, margin=0.0, kp=0.3, ki=0.2, kd=0.1, max_change=9.0)
    policy = PidPolicy(config)
    target, tpots = 1500.0, (0.045, 0.045, 0.045, 0.055, 0.052)
    errors = [math.log(tpot_s / 0.05) for tpot_s in tpots]  # the first stands for those before it
    for e2, e1, e, tpot_s in zip(errors, errors[1:], errors[2:], tpots[2:], strict=False):
        policy.update(outcome(tpot(make_window, tpot_s), round(target), observed=round(target)))
        target *= math.exp(0.3 * (e - e1) + 0.2 * e + 0.1 * (e - 2 * e1 + e2))
        assert policy.state.target_mhz == pytest.approx(target)


def test_neither_end_of_the_range_winds_it_up(make_window):
    policy = PidPolicy(CONFIG)
    for _ in range(100):
        policy.update(outcome(tpot(make_window, 0.2), 2100))
    assert choice(policy) == 2100
    policy.update(outcome(tpot(make_window, 0.02), 2100))
    assert choice(policy) < 2000  # not after a hundred windows


def test_a_power_cap_does_not_wind_it_up(make_window):
    policy = PidPolicy(CONFIG)
    for _ in range(50):
        policy.update(outcome(tpot(make_window, 0.06), choice(policy), observed=1545))
    assert policy.state.target_mhz < 1545 * 1.04 * math.exp(0.2) + 1
    policy.update(outcome(tpot(make_window, 0.02), 1700, observed=1545))
    assert choice(policy) < 1545


def test_the_worse_of_tpot_and_ttft_counts(make_window):
    policy = PidPolicy(PidConfig(tpot_slo_s=0.05, ttft_slo_s=0.1))
    policy.update(outcome(tpot(make_window, 0.02, ttft_sum_s=0.3, ttft_count=2), 1200))
    assert choice(policy) > 1200
    policy = PidPolicy(CONFIG)
    policy.update(outcome(tpot(make_window, 0.02, ttft_sum_s=0.3, ttft_count=2), 1200))
    assert choice(policy) < 1200


def test_default_clocks_start_it_anew(make_window):
    policy = PidPolicy(CONFIG)
    policy.update(outcome(tpot(make_window, 0.02), 1200))
    policy.update(outcome(tpot(make_window, 0.02), None))
    assert choice(policy) == max(ARMS)


def test_it_needs_an_slo():
    with pytest.raises(ValidationError, match="tpot_slo_s"):
        PidConfig()
