import json

import pytest

from agft_ray.policy.baselines.predictive import PredictiveConfig, PredictivePolicy
from unit.policy.policy_tools import ARMS, choice, drive, outcome

CONFIG = PredictiveConfig(tpot_slo_s=0.05)


def at(make_window, tpot_s, **changes):
    return make_window(itl_sum_s=300 * tpot_s, itl_count=300, **changes)


def law(clock, running=4.0):
    """TPOT in s: a part that waits for memory, one that goes as 1/f, one with the batch."""
    return 0.012 + (20 + 0.4 * running) / clock


def test_it_finds_the_lowest_clock_that_meets_the_slo_with_its_margin(make_window):
    clocks = drive(CONFIG, lambda clock: at(make_window, law(clock)), 150)
    best = min(arm for arm in ARMS if law(arm) <= 0.045)
    assert clocks[:10] == [2100] * 10
    assert clocks[-1] == pytest.approx(best, abs=30)
    assert all(law(clock) <= 0.05 for clock in clocks)


def test_it_walks_down_no_faster_than_it_may(make_window):
    clocks = drive(CONFIG, lambda clock: at(make_window, law(clock)), 60)
    lowest = clocks[0]
    for clock in clocks:
        assert clock >= 0.9 * lowest
        lowest = min(lowest, clock)


def test_the_clock_follows_the_load(make_window):
    policy = PredictivePolicy(CONFIG)
    clocks = {}
    for round_, running in enumerate([4.0, 30.0, 4.0, 30.0, 4.0]):
        for _ in range(60):
            clock = choice(policy)
            window = at(make_window, law(clock, running), running=running)
            policy.update(outcome(window, clock))
        clocks[round_] = choice(policy)
    assert clocks[3] > clocks[4] + 100
    for round_, running in ((3, 30.0), (4, 4.0)):
        best = min(arm for arm in ARMS if law(arm, running) <= 0.045)
        assert clocks[round_] == pytest.approx(best, abs=60)


def test_a_queue_takes_it_to_the_highest_clock_for_as_long_as_it_lasts(make_window):
    policy = PredictivePolicy(CONFIG)
    for _ in range(40):
        clock = choice(policy)
        policy.update(outcome(at(make_window, law(clock)), clock))
    low = choice(policy)
    assert low < 2100
    policy.update(outcome(at(make_window, law(low), waiting=2.0), low))
    assert choice(policy) == 2100
    policy.update(outcome(at(make_window, law(2100)), 2100))
    assert choice(policy) < 2100


def test_it_returns_to_the_highest_clock_when_its_predictions_fail(make_window):
    policy = PredictivePolicy(CONFIG)
    for _ in range(60):
        clock = choice(policy)
        policy.update(outcome(at(make_window, law(clock)), clock))
    assert choice(policy) < 1200
    worse = 0
    while policy.status()["phase"] == "predict":
        clock = choice(policy)
        policy.update(outcome(at(make_window, 1.6 * law(clock)), clock))
        worse += 1
        assert worse <= 5
    assert choice(policy) == 2100


def test_an_slo_that_nothing_meets_means_the_highest_clock(make_window):
    config = PredictiveConfig(tpot_slo_s=0.01)
    assert set(drive(config, lambda clock: at(make_window, law(clock)), 30)) == {2100}


def test_a_model_of_another_shape_is_refused_and_changes_nothing(make_window):
    policy = PredictivePolicy(CONFIG)
    policy.update(outcome(at(make_window, 0.04), 2100))
    before = json.dumps(policy.snapshot())
    broken = json.loads(before)
    broken["state"]["model"]["gram"] = [[1.0]]
    with pytest.raises(ValueError, match="shapes"):
        policy.restore(broken)
    assert json.dumps(policy.snapshot()) == before


def test_what_was_seen_at_one_clock_only_is_taken_to_go_as_its_inverse(make_window):
    policy = PredictivePolicy(PredictiveConfig(tpot_slo_s=0.05, max_step=0.6))
    for _ in range(10):
        policy.update(outcome(at(make_window, 0.022), 2100))
    assert choice(policy) == pytest.approx(2100 * 0.022 / 0.045, rel=0.05)  # not 840
