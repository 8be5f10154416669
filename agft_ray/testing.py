"""What every policy promises, as checks that may be run on a policy of your own.

    def test_my_policy():
        check_policy(lambda: MyPolicy(low_mhz=900))

A check that fails raises `AssertionError` and says what was promised. No test framework is needed.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from agft_ray.policy.base import Policy
from agft_ray.policy.goals import Goals
from agft_ray.types import Context, Decision, EventReason, Outcome, StepTotals, Window

ARMS = tuple(range(210, 2101, 15))
"""The clocks of an RTX A6000, MHz."""
HALF_WINDOWS = 2_500
"""After so many, all that is bounded has come to its bound."""
GOALS = (
    Goals("energy", bound=0.05),
    Goals("ed2p", energy_weight=0.0),
    Goals("edp", ttft_s=1e-3, tpot_s=1e-3, e2e_s=1e-3),
    Goals(ttft_s=1e3, tpot_s=1e3, e2e_s=1e3, statistic="p99", energy_weight=3.0),
)
Make = Callable[[], Policy]
"""Makes a fresh policy, always with the same settings and seed."""

WINDOW = Window(
    start_s=0.0,
    end_s=0.8,
    arm=None,
    energy_j=80.0,
    mean_power_w=100.0,
    sm_clock_mhz=1200.0,
    event_reasons=EventReason.NONE,
    running=1.0,
    waiting=0.0,
    kv_cache_usage=0.1,
    prompt_tokens=10,
    generation_tokens=10,
    iterations=10,
    iteration_tokens=20,
    ttft_sum_s=0.1,
    ttft_count=1,
    itl_sum_s=0.5,
    itl_count=10,
    e2e_sum_s=0.0,
    e2e_count=0,
    prefix_cache_queries=0,
    prefix_cache_hits=0,
    preemptions=0,
    decode_steps=StepTotals(),
    prefill_steps=StepTotals(),
    unknown_steps=StepTotals(),
    request_rate_per_s=1.0,
)


def check_policy(make: Make) -> None:
    """Run all checks of this module; raises `AssertionError` at the first that fails."""
    for check in CHECKS:
        check(make)


def check_choices_are_pure_and_supported(make: Make) -> None:
    """Choosing twice is choosing once, and what is chosen is default clocks or a given clock."""
    policy, rng = trained(make, 150), np.random.default_rng(1)
    before = state(policy)
    for _ in range(50):
        at = context(rng)
        decision = policy.select(at, ARMS)
        _promise(policy.select(at, ARMS) == decision, "select is pure: twice the same choice")
        _promise(_is_among(decision, ARMS), f"choices are supported clocks, got {decision}")
        idle = policy.select_idle(ARMS)
        _promise(policy.select_idle(ARMS) == idle, "select_idle is pure: twice the same choice")
        _promise(_is_among(idle, ARMS), f"idle choices are supported clocks, got {idle}")
    policy.status()
    policy.experience()
    _promise(state(policy) == before, "select, status and experience leave the policy as it is")


def check_settings_and_seed_determine_everything(make: Make) -> None:
    """The same windows lead to the same choices."""
    histories = [play(make(), 150, np.random.default_rng(5)) for _ in range(2)]
    _promise(histories[0] == histories[1], "settings and seed determine every choice")


def check_any_list_of_arms_will_do(make: Make) -> None:
    """A choice is one of the clocks given, however few there are, or default clocks."""
    for windows in (0, 12, 60, 200):
        policy, rng = trained(make, windows), np.random.default_rng(4)
        for arms in ([1200], [210, 2100], [1005, 1200, 1395], [3000, 4000]):
            for decision in (policy.select(context(rng), arms), policy.select_idle(arms)):
                _promise(
                    _is_among(decision, arms),
                    f"choices are among the clocks given, got {decision} of {arms}",
                )


def check_a_snapshot_continues_identically(make: Make) -> None:
    """A policy restored from a snapshot goes on as the one that it is of."""
    for windows in (0, 15, 200):
        policy, copy = trained(make, windows), make()
        if not policy.snapshot():
            return
        copy.restore(json.loads(state(policy)))
        _promise(state(copy) == state(policy), "a restored policy has the state of the snapshot")
        continued = [play(each, 200, np.random.default_rng(9)) for each in (policy, copy)]
        _promise(continued[0] == continued[1], "a restored policy goes on identically")


def check_a_snapshot_of_another_is_refused(make: Make) -> None:
    """What is no snapshot of this policy raises `ValueError` and changes nothing."""
    policy = trained(make, 30)
    before = state(policy)
    bad: dict[str, object] = {"schema": "of another time", "settings": {}, "state": None}
    try:
        policy.restore(bad)
    except ValueError:
        pass
    else:
        _promise(False, f"restore({bad}) raises ValueError")
    _promise(state(policy) == before, "a snapshot that is refused changes nothing")


def check_non_finite_numbers_change_nothing(make: Make) -> None:
    """A window whose reward or context is not finite is refused, or passed over."""
    for bad in (math.nan, math.inf, -math.inf):
        fed, spared = trained(make, 40), trained(make, 40)
        good = outcome(1200, np.random.default_rng(2))
        features = (1.0, bad, *good.context.features[2:])
        for broken in (replace(good, reward=bad), replace(good, context=Context(features, 1))):
            with suppress(ValueError):
                fed.update(broken)
        _promise(_go_on_alike(fed, spared), f"a window with {bad} changes nothing")


def check_memory_is_bounded(make: Make) -> None:
    """Twice as many windows take no more room."""
    policy, rng, sizes = make(), np.random.default_rng(3), []
    few = (None, *ARMS[::16])
    for _ in range(2):
        for _ in range(HALF_WINDOWS):
            arm = few[rng.integers(len(few))]  # so that histories by clock come to their bounds
            policy.update(outcome(arm, rng))
        sizes.append(_size(policy))
    _promise(
        sizes[1] <= 1.1 * sizes[0] + 500,
        f"state does not grow with the windows: {sizes[0]:,} bytes, then "
        f"{sizes[1]:,} after as many again",
    )


def check_goals_may_change_at_any_time(make: Make) -> None:
    """Goals are no part of what was learned, and the last ones alone count."""
    for windows in (0, 60, 200):
        policy, rng = trained(make, windows), np.random.default_rng(6)
        before, at = state(policy), context(rng)
        usual = policy.select(at, ARMS)
        for goals in GOALS:
            policy.pursue(goals)
            _promise(state(policy) == before, f"{goals} leave what was learned as it is")
            for decision in (policy.select(at, ARMS), policy.select_idle(ARMS)):
                _promise(_is_among(decision, ARMS), f"choices are supported, got {decision}")
        policy.pursue(Goals())
        _promise(policy.select(at, ARMS) == usual, "the last goals alone count")


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_choices_are_pure_and_supported,
    check_settings_and_seed_determine_everything,
    check_any_list_of_arms_will_do,
    check_a_snapshot_continues_identically,
    check_a_snapshot_of_another_is_refused,
    check_non_finite_numbers_change_nothing,
    check_memory_is_bounded,
    check_goals_may_change_at_any_time,
)


def context(rng: np.random.Generator) -> Context:
    """A random one."""
    return Context((1.0, *rng.random(8).tolist()), 1)


def outcome(requested: int | None, rng: np.random.Generator, observed: int | None = -1) -> Outcome:
    """What comes of a choice: a random reward. -1: the clock asked for was there."""
    arm = requested if observed == -1 else observed
    return Outcome(requested, arm, context(rng), float(rng.normal(0, 0.5)), window(rng))


def window(rng: np.random.Generator) -> Window:
    """A window like `WINDOW`, with another load, latency and energy."""
    steps = [StepTotals(5, 20, float(rng.uniform(0.1, 0.4))) for _ in range(2)]
    return replace(
        WINDOW,
        energy_j=float(rng.uniform(60, 240)),
        running=float(rng.uniform(0, 40)),
        waiting=float(rng.exponential(0.3)),
        kv_cache_usage=float(rng.random()),
        prompt_tokens=int(rng.integers(0, 2000)),
        itl_sum_s=float(rng.uniform(0.2, 0.8)),
        decode_steps=steps[0],
        prefill_steps=steps[1],
    )


def trained(make: Make, windows: int, seed: int = 0) -> Policy:
    """A policy that has seen so many windows."""
    policy = make()
    play(policy, windows, np.random.default_rng(seed))
    return policy


def play(policy: Policy, windows: int, rng: np.random.Generator) -> list[Decision]:
    """Random rewards; now and then another clock than chosen is observed. Returns the choices."""
    return list(_played(policy, windows, rng))


def _played(policy: Policy, windows: int, rng: np.random.Generator) -> Iterator[Decision]:
    for _ in range(windows):
        decision = policy.select(context(rng), ARMS)
        other = int(rng.choice(ARMS)) if rng.random() < 0.1 else -1
        policy.update(outcome(decision.arm, rng, -1 if decision.arm is None else other))
        yield decision


def state(policy: Policy) -> str:
    """Its snapshot as text."""
    return json.dumps(policy.snapshot(), allow_nan=False)


def _go_on_alike(a: Policy, b: Policy) -> bool:
    played = [play(each, 100, np.random.default_rng(9)) for each in (a, b)]
    return played[0] == played[1] and state(a) == state(b)


def _size(policy: Policy) -> int:
    """Of its state as text, or of all its attributes where those can be pickled."""
    with suppress(Exception):
        return max(len(state(policy)), len(pickle.dumps(vars(policy))))
    return len(state(policy))


def _is_among(decision: Decision, arms: Sequence[int]) -> bool:
    """Whether all that is chosen may be, and the arm is the plan's for decode steps."""
    plan = decision.chosen
    return decision.arm == plan.decode and {None, *arms}.issuperset(plan.arms)


def _promise(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"promised by every policy: {what}")
