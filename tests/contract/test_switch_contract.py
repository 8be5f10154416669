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
        ("empty",),
        ("arrival",),
        ("step", 0),
        ("step", 0),
        ("empty",),
    )
    assert said == [IDLE, PREFILL, DECODE, None, IDLE]


def test_only_changes_are_said():
    _, said = after(("arrival",), ("arrival",), ("empty",), ("empty",))
    assert said == [None, None, IDLE, None]


def test_a_prompt_that_arrives_while_a_step_runs_is_pending_after_it():
    switch, said = after(
        ("step", 0),
        ("arrival",),
        ("step", 1),  # which had begun before
        ("step", 0),
    )
    assert said == [DECODE, PREFILL, None, DECODE]
    assert switch.phase is DECODE


def test_a_prompt_computed_over_several_steps_keeps_its_clock_until_its_first_token():
    _, said = after(
        ("empty",),
        ("arrival",),
        ("step", 1),
        ("step", 1),
        ("step", 0),
    )
    assert said == [IDLE, PREFILL, None, None, DECODE]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_a_pending_prompt_has_its_clock(seed):
    rng, switch, pending = np.random.default_rng(seed), Switch(), 0
    for _ in range(2000):
        match rng.integers(3):
            case 0:
                pending += 1
                switch.on_arrival()
            case 1:
                pending -= int(rng.integers(0, pending + 1))
                switch.on_step(pending)
            case 2 if not pending:
                switch.on_empty()
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
