"""A growing queue leads to default clocks under every policy, and does not flap."""

from dataclasses import replace

import pytest

from agft_ray.pressure import Pressure
from agft_ray.settings import TunerConfig
from unit.test_tuner import Bench

CONFIG = TunerConfig(calm_windows=3)


def seen(make_window, *windows, config=CONFIG):
    """Whether it is on after each of the windows, given by what is unusual of it."""
    pressure, result = Pressure(), []
    for changes in windows:
        pressure.see(make_window(**changes), config)
        result.append(pressure.is_on)
    return result


@pytest.mark.parametrize(
    "sign", [{"kv_cache_usage": 0.81}, {"preemptions": 1}, {"waiting": 4.1}], ids=str
)
def test_each_sign_is_enough_and_over_after_so_many_calm_windows(make_window, sign):
    assert seen(make_window, {}, sign, {}, {}, {}, {}) == [False, True, True, True, False, False]


@pytest.mark.parametrize("calm", [{"kv_cache_usage": 0.8}, {"waiting": 4.0}], ids=str)
def test_what_is_just_below_is_none(make_window, calm):
    assert seen(make_window, calm, calm) == [False, False]


def test_a_long_queue_that_shrinks_is_no_sign_but_keeps_what_a_growing_one_began(make_window):
    """Else clocks fell while it is long, it grew again, and so on."""
    queue = [{"waiting": each} for each in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.0, 0.0, 0.0)]
    assert seen(make_window, *queue) == [True] * 7 + [False] * 2


def test_an_empty_engine_has_none(make_window):
    empty = {"iterations": 0, "running": 0.0, "waiting": 0.0}
    assert seen(make_window, {"waiting": 9.0}, empty) == [True, False]


class QueueBench(Bench):
    """A bench with a queue."""

    def __init__(self, *arms, **settings):
        super().__init__(*arms, **settings)
        self.waiting, push = 0, self.inbox.push
        self.inbox.push = lambda sample: push(replace(sample, waiting=self.waiting))


def test_the_loop_goes_to_default_clocks_at_once_whatever_the_policy_and_learns_there():
    bench = QueueBench(1230, calm_windows=2)
    bench.run(7.0)
    assert bench.gpu.locked == 1230
    bench.waiting = 9
    bench.run(2.5)
    assert (bench.gpu.locked, bench.tuner.state) == (None, "pressure")
    taught = len(bench.policy.outcomes)
    bench.run(6.6)
    assert (bench.gpu.locked, bench.decisions[-1].reason) == (None, "pressure"), "still long"
    assert bench.policy.outcomes[-1].arm is None
    assert len(bench.policy.outcomes) >= taught + 2
    bench.waiting = 0
    bench.run(7.0)
    assert (bench.gpu.locked, bench.tuner.state) == (1230, "tuning")


def test_what_is_observed_only_says_so_and_a_holdout_stays_one():
    bench = QueueBench(1230, mode="observe")
    bench.waiting = 9
    bench.run(7.0)
    assert (bench.tuner.state, bench.decisions[-1].reason) == ("observing", "pressure")
    bench = QueueBench(1230)
    bench.tuner.holdout, bench.waiting = True, 9
    bench.run(7.0)
    assert bench.tuner.state == "holdout"
