"""What every step governor promises, whatever it does with it."""

import json
import math
import pickle

import numpy as np
import pytest

from agft_ray.policy.baselines.volta import VoltaConfig
from agft_ray.policy.registry import GovernorConfig, build_governor
from agft_ray.policy.step import StepSample, check_observation
from agft_ray.testing import ARMS

CONFIGS = {
    "volta": VoltaConfig(tpot_slo_s=0.04, ttft_slo_s=0.5),
    "volta-hasty": VoltaConfig(
        tpot_slo_s=0.04, clock_shares=(0.3, 0.5), min_dwell_s=0.0, learn_steps=1, forgetting=1.0
    ),
}
STEPS = 400
IMPOSSIBLE = [math.nan, math.inf, -math.inf, 0.0, -1.0]


def step(rng, t_s=0.0):
    """One in eight computes prompt tokens."""
    prefill_tokens = int(rng.integers(1, 2000)) if rng.random() < 0.125 else 0
    sequences, context_tokens = int(rng.integers(1, 200)), int(rng.integers(1, 200_000))
    waiting = int(rng.integers(0, 5))
    return StepSample(t_s, prefill_tokens, sequences, context_tokens, waiting, rng.random())


def played(governor, steps, rng, lists=(ARMS,)):
    """The choices in a random load, with an empty engine now and then; lists of clocks in turn."""
    t_s, choices = 0.0, []
    for number in range(steps):
        arms = lists[number % len(lists)]
        if number % 50 == 49:
            choices.append(governor.choose_idle(arms))
            t_s += 1.0
        now = step(rng, t_s)
        choice = governor.choose(now, arms)
        clock = choice or 2100
        tokens = now.prefill_tokens + now.decode_sequences
        duration_s = (0.01 + (20 + 0.3 * tokens) / clock) * rng.uniform(0.9, 1.1)
        governor.observe(now, duration_s=duration_s, sm_clock_mhz=clock)
        choices.append(choice)
        t_s += duration_s
    return choices


def trained(make, steps=STEPS, seed=0):
    governor = make()
    played(governor, steps, np.random.default_rng(seed))
    return governor


def go_on_alike(one, other):
    """Whether two governors tell the same, and choose the same from now on."""
    told = [json.dumps(each.status(), allow_nan=False) for each in (one, other)]
    choices = [played(each, STEPS, np.random.default_rng(9)) for each in (one, other)]
    return told[0] == told[1] and choices[0] == choices[1]


# -- the promises ----------------------------------------------------------------------------------


def check_choices_are_among_the_clocks_given(make):
    governor, rng = trained(make), np.random.default_rng(1)
    for arms in (ARMS, ARMS[:1], ARMS[-1:], (210, 2100), (3000, 4000), ARMS[40:60], ()):
        allowed = set(arms) or {None}
        chosen = {governor.choose(step(rng), arms) for _ in range(50)}
        assert chosen <= allowed, "among the clocks given"
        assert governor.choose_idle(arms) in allowed, "among the clocks given"


def check_settings_determine_everything(make):
    assert go_on_alike(trained(make), trained(make)), "settings determine everything"


def check_a_list_of_clocks_is_as_good_as_a_tuple(make):
    choices = [
        played(make(), STEPS, np.random.default_rng(7), lists=(kind(ARMS),))
        for kind in (tuple, list)
    ]
    assert choices[0] == choices[1], "clocks may come as a list or as a tuple"


def check_idle_is_the_lowest_clock(make):
    fresh, governor = make(), trained(make)
    for arms in (ARMS, ARMS[20:], ARMS[-1:]):
        assert fresh.choose_idle(arms) == governor.choose_idle(arms) == arms[0], "lowest while idle"
    assert governor.choose_idle(()) is None, "lowest while idle"


def check_impossible_observations_change_nothing(make):
    for bad in IMPOSSIBLE:
        governor, untold = trained(make), trained(make)
        for name in ("duration_s", "sm_clock_mhz"):
            for prefill_tokens in (0, 500):
                odd = StepSample(1e6, prefill_tokens, 8, 8000, 0, 0.1)
                with pytest.raises(ValueError, match=f"{name}.*finite and above 0"):
                    governor.observe(
                        odd, **({"duration_s": 0.03, "sm_clock_mhz": 1200} | {name: bad})
                    )
        assert pickle.dumps(governor) == pickle.dumps(untold), "an impossible one changes nothing"
        assert go_on_alike(governor, untold), "an impossible one changes nothing"


def check_memory_is_bounded(make):
    governor, rng = make(), np.random.default_rng(3)
    lists = [ARMS[first : first + 30] for first in range(0, len(ARMS) - 30, 10)]
    sizes = []
    for _ in range(2):
        played(governor, 10 * STEPS, rng, lists)
        sizes.append(len(pickle.dumps(governor)))
    assert sizes[1] <= sizes[0] + 64, "memory does not grow with the steps"


CHECKS = [
    check_choices_are_among_the_clocks_given,
    check_settings_determine_everything,
    check_a_list_of_clocks_is_as_good_as_a_tuple,
    check_idle_is_the_lowest_clock,
    check_impossible_observations_change_nothing,
    check_memory_is_bounded,
]


def test_every_governor_is_held_to_this():
    assert {GovernorConfig.model_fields["name"].default} == {
        config.name for config in CONFIGS.values()
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_governor_promises(name, check):
    check(lambda: build_governor(CONFIGS[name]))


def test_the_load_of_these_checks_makes_volta_use_several_clocks():
    governor = build_governor(CONFIGS["volta"])
    assert len(set(played(governor, 4 * STEPS, np.random.default_rng(0)))) >= 4


# -- the checks themselves -------------------------------------------------------------------------


class Decent:
    """Keeps every promise with little effort."""

    name = "decent"

    def __init__(self):
        self.mean_s = 0.0

    def choose(self, step, arms):
        return (max if self.mean_s > 0.04 else min)(arms, default=None)

    def choose_idle(self, arms):
        return min(arms, default=None)

    def observe(self, step, *, duration_s, sm_clock_mhz):
        check_observation(duration_s, sm_clock_mhz)
        self.mean_s = 0.9 * self.mean_s + 0.1 * duration_s

    def status(self):
        return {"mean_s": self.mean_s}


class Stubborn(Decent):
    def choose(self, step, arms):
        return 1200


class Random(Decent):
    def choose(self, step, arms):
        return int(np.random.default_rng().choice(arms)) if arms else None


class Restless(Decent):
    def choose_idle(self, arms):
        return max(arms, default=None)


class Gullible(Decent):
    def observe(self, step, *, duration_s, sm_clock_mhz):
        self.mean_s = 0.9 * self.mean_s + 0.1 * duration_s
        check_observation(duration_s, sm_clock_mhz)


class Hoarder(Decent):
    def __init__(self):
        super().__init__()
        self.seen = []

    def choose(self, step, arms):
        self.seen.append(step)
        return super().choose(step, arms)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_decent_governor_passes(check):
    check(Decent)


@pytest.mark.parametrize(
    ("culprit", "check", "promise"),
    [
        (Stubborn, check_choices_are_among_the_clocks_given, "among the clocks"),
        (Random, check_settings_determine_everything, "settings determine"),
        (Restless, check_idle_is_the_lowest_clock, "lowest while idle"),
        (Gullible, check_impossible_observations_change_nothing, "changes nothing"),
        (Hoarder, check_memory_is_bounded, "does not grow"),
    ],
)
def test_a_governor_that_breaks_a_promise_is_told_which(culprit, check, promise):
    with pytest.raises(AssertionError, match=promise):
        check(culprit)
