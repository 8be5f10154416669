import pytest

from agft_ray.config import parse
from agft_ray.errors import ConfigError
from agft_ray.policy.baselines.rules import RulesConfig, RulesPolicy
from unit.policy.policy_tools import ARMS, CONTEXT, choice, drive, outcome

CONFIG = RulesConfig(dwell_windows=2, step_mhz=300)


def test_it_steps_down_while_calm_and_stops_halfway_down(make_window):
    clocks = drive(CONFIG, lambda clock: make_window(), 12)
    assert clocks[:8] == [2100, 2100, 1800, 1800, 1500, 1500, 1200, 1200]
    assert clocks[8:] == [1155] * 4  # (210 + 2100) / 2


def test_the_lowest_clock_may_be_set(make_window):
    config = RulesConfig(dwell_windows=1, step_mhz=600, lowest_mhz=700)
    assert drive(config, lambda clock: make_window(), 5) == [2100, 1500, 900, 690, 690]


@pytest.mark.parametrize("pressure", [{"waiting": 1.1}, {"kv_cache_usage": 0.81}])
def test_pressure_takes_it_to_the_highest_clock_at_once(make_window, pressure):
    policy = RulesPolicy(RulesConfig(dwell_windows=1))
    for requested in (2100, 2010, 1920):
        policy.update(outcome(make_window(), requested))
    assert choice(policy) == 1830
    policy.update(outcome(make_window(**pressure), 1830))
    assert policy.select(CONTEXT, ARMS).arm == 2100


@pytest.mark.parametrize("between", [{"waiting": 0.5}, {"kv_cache_usage": 0.7}])
def test_between_the_thresholds_it_holds_and_counts_anew(make_window, between):
    policy = RulesPolicy(CONFIG)
    for window in ({}, {}, {}, between, {}):
        policy.update(outcome(make_window(**window), choice(policy)))
    assert choice(policy) == 1800
    policy.update(outcome(make_window(), 1800))
    assert choice(policy) == 1500


def test_windows_at_default_clocks_do_not_step_it_down(make_window):
    policy = RulesPolicy(CONFIG)
    for _ in range(10):
        policy.update(outcome(make_window(), None))
    assert choice(policy) == 2100


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigError, match=r"calm_waiting \(2\) .*high_waiting \(1\)"):
        parse(RulesConfig, {"calm_waiting": 2.0}, source="test")
