"""What the switch promises to whoever tells it of arrivals and steps, and the pace to the GPU."""

import numpy as np
import pytest

from agft_ray.switch import MAX_CHANGES_PER_S, Pace, Switch
from agft_ray.types import Phase

PREFILL, DECODE, IDLE = Phase.PREFILL, Phase.DECODE, Phase.IDLE


def after(*events):
    """A switch, and what each event made it say."""
    switch = Switch()
    return switch, [getattr(switch, f"on_{name}")(*given) for name, *given in events]


def test_it_knows_nothing_at_first_and_takes_the_clock_of_prompts():
    assert Switch().phase is PREFILL


def test_a_request_goes_through_its_phases():
    _, said = after(
        ("empty", 0.0),
        ("arrival", 1.0),
        ("step", 1.2, True, 0),
        ("step", 1.25, False, 0),
        ("empty", 1.3),
    )
    assert said == [IDLE, PREFILL, DECODE, None, IDLE]


def test_only_changes_are_said():
    _, said = after(("arrival", 1.0), ("arrival", 1.1), ("empty", 2.0), ("empty", 3.0))
    assert said == [None, None, IDLE, None]


def test_a_prompt_that_arrives_while_a_step_runs_is_pending_after_it():
    switch, said = after(
        ("step", 1.0, False, 0),
        ("arrival", 1.01),
        ("step", 1.02, False, 1),  # which had begun before
        ("step", 1.20, True, 0),
    )
    assert said == [DECODE, PREFILL, None, DECODE]
    assert switch.phase is DECODE


def test_a_prompt_computed_over_several_steps_keeps_its_clock_until_its_first_token():
    _, said = after(
        ("empty", 0.0),
        ("arrival", 1.0),
        ("step", 1.5, True, 1),
        ("step", 2.0, True, 1),
        ("step", 2.5, True, 0),
    )
    assert said == [IDLE, PREFILL, None, None, DECODE]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_a_pending_prompt_has_its_clock(seed):
    rng, switch, pending, t_s = np.random.default_rng(seed), Switch(), 0, 0.0
    for _ in range(2000):
        t_s += rng.exponential(0.02)
        match rng.integers(3):
            case 0:
                pending += 1
                switch.on_arrival(t_s)
            case 1:
                done = int(rng.integers(0, pending + 1))
                pending -= done
                switch.on_step(t_s, done > 0, pending)
            case 2 if not pending:
                switch.on_empty(t_s)
        assert (switch.phase is PREFILL) or not pending


@pytest.mark.parametrize("interval_s", [1e-4, 0.01, 0.05])
def test_the_clock_changes_no_more_often_than_stated_and_the_way_up_is_always_free(interval_s):
    pace, times, is_low, t_s = Pace(), [], False, 0.0
    while t_s < 5.0:
        allowed = pace.allows(t_s, lowers=not is_low)
        assert allowed or not is_low
        if allowed:
            pace.count(t_s)
            times.append(t_s)
            is_low = not is_low
        t_s += interval_s
    busiest = max(sum(t <= u < t + 1.0 for u in times) for t in times)
    assert busiest <= MAX_CHANGES_PER_S + 1
    if interval_s * MAX_CHANGES_PER_S >= 1.0:
        assert len(times) >= 5.0 / interval_s - 1, "nothing is refused below it"
