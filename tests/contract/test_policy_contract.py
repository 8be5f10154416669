"""What every policy promises, whatever it does with it."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from agft_ray.errors import PriorError
from agft_ray.policy.agft.policy import AgftConfig
from agft_ray.policy.baselines.activity import ActivityConfig
from agft_ray.policy.baselines.default import DefaultConfig
from agft_ray.policy.baselines.fixed import FixedConfig
from agft_ray.policy.baselines.pid import PidConfig
from agft_ray.policy.baselines.predictive import PredictiveConfig
from agft_ray.policy.baselines.rules import RulesConfig
from agft_ray.policy.reference.policy import AgftReferenceConfig
from agft_ray.policy.registry import BuiltinConfig, build_policy
from agft_ray.types import (
    Context,
    EventReason,
    Experience,
    Outcome,
    Prior,
    PriorKey,
    StepTotals,
    Window,
)

ARMS = tuple(range(210, 2101, 15))
CONFIGS = {
    "default": DefaultConfig(),
    "fixed": FixedConfig(sm_clock_mhz=1237),
    "agft": AgftConfig(seed=7),
    "agft-hasty": AgftConfig(
        baseline_windows=1, refine_after=1, convergence_window=10, forgetting=1.0
    ),
    "agft_reference": AgftReferenceConfig(),
    "rules": RulesConfig(),
    "activity": ActivityConfig(),
    "pid": PidConfig(tpot_slo_s=0.05, ttft_slo_s=0.5, kd=0.1),
    "predictive": PredictiveConfig(tpot_slo_s=0.05),
}
KEY = PriorKey("A6000", "m", 1, "mixed", "bf16", "edp", 0.8, 1, 1, "agft")
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


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def context(rng):
    return Context((1.0, *rng.random(8).tolist()), 1)


def outcome(requested, rng, observed="same"):
    arm = requested if observed == "same" else observed
    return Outcome(requested, arm, context(rng), float(rng.normal(0, 0.5)), window(rng))


def window(rng):
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


def trained(config, n, seed=0):
    policy, rng = build_policy(config), np.random.default_rng(seed)
    play(policy, n, rng)
    return policy


def play(policy, n, rng):
    """Random rewards; now and then another clock than chosen is observed. Returns the choices."""
    decisions = []
    for _ in range(n):
        decisions.append(policy.select(context(rng), ARMS))
        observed = int(rng.choice(ARMS)) if rng.random() < 0.1 else "same"
        if decisions[-1].arm is None:
            observed = "same"
        policy.update(outcome(decisions[-1].arm, rng, observed))
    return decisions


def state(policy):
    return json.dumps(policy.snapshot(), allow_nan=False)


def test_every_policy_is_held_to_this():
    registered = {
        each.model_fields["name"].default for each in get_args(get_args(BuiltinConfig)[0])
    }
    assert registered == {config.name for config in CONFIGS.values()}


def test_select_is_pure_and_chooses_default_clocks_or_a_supported_one(config):
    policy, rng = trained(config, 150), np.random.default_rng(1)
    before = state(policy)
    for _ in range(50):
        at = context(rng)
        decision = policy.select(at, ARMS)
        assert policy.select(at, ARMS) == decision
        assert decision.arm is None or decision.arm in ARMS
        assert policy.select_idle(ARMS) == policy.select_idle(ARMS)
        assert policy.select_idle(ARMS).arm in (None, *ARMS)
    policy.status()
    policy.experience()
    assert state(policy) == before


def test_settings_and_seed_determine_everything(config):
    histories = []
    for _ in range(2):
        policy = build_policy(config)
        histories.append((play(policy, 150, np.random.default_rng(5)), state(policy)))
    assert histories[0] == histories[1]


@pytest.mark.parametrize("windows", [0, 15, 200])
def test_snapshot_round_trip_continues_identically(config, windows):
    policy = trained(config, windows)
    copy = build_policy(config)
    copy.restore(json.loads(state(policy)))
    assert state(copy) == state(policy)
    continued = [play(each, 200, np.random.default_rng(9)) for each in (policy, copy)]
    assert continued[0] == continued[1]
    assert state(copy) == state(policy)


def test_snapshots_of_others_are_refused_and_change_nothing(config):
    policy = trained(config, 30)
    before = state(policy)
    good = json.loads(before)
    for bad in ({}, good | {"schema": 99}, good | {"settings": {"name": "other"}}):
        with pytest.raises(ValueError):
            policy.restore(bad)
    assert state(policy) == before


def test_merge_replaces_the_prior_and_is_never_handed_on(config):
    policy, other = trained(config, 60, seed=1), trained(config, 60, seed=2)
    experience = other.experience() or Experience(
        (), np.zeros(0), np.zeros((0, 9, 9)), np.zeros((0, 9))
    )
    own = policy.experience()
    policy.merge(Prior(KEY, 1, 1, experience))
    once = state(policy)
    policy.merge(Prior(KEY, 2, 1, experience))
    assert state(policy) == once
    if own is not None:
        for name in ("arms_mhz", "counts", "grams", "responses"):
            np.testing.assert_array_equal(getattr(policy.experience(), name), getattr(own, name))


def test_a_malformed_prior_is_refused_whole(config):
    policy = trained(config, 60)
    before, experience = state(policy), policy.experience()
    if experience is None:
        return
    for bad in (
        replace(experience, counts=experience.counts * np.nan),
        replace(experience, grams=-experience.grams),
        replace(experience, responses=experience.responses + 1e3),
    ):
        with pytest.raises(PriorError):
            policy.merge(Prior(KEY, 1, 1, bad))
    assert state(policy) == before


def test_memory_is_bounded(config):
    policy, rng = build_policy(config), np.random.default_rng(3)
    rows = len(ARMS) + 1
    for _ in range(5_000):
        arm = [None, *ARMS][rng.integers(rows)]
        policy.update(outcome(arm, rng))
    assert len(state(policy)) < 3 * rows * 91 * 25 + 50_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_refused_and_change_nothing(config, bad):
    policy, rng = trained(config, 40), np.random.default_rng(2)
    before, good = state(policy), outcome(1200, rng)
    features = (1.0, bad, *good.context.features[2:])
    for broken in (replace(good, reward=bad), replace(good, context=Context(features, 1))):
        with pytest.raises(ValueError):
            policy.update(broken)
    assert state(policy) == before


def test_empty_windows_teach_nothing(config):
    policy, rng = trained(config, 40), np.random.default_rng(2)
    before, good = state(policy), outcome(1200, rng)
    for nothing in ({"generation_tokens": 0}, {"itl_count": 0}):
        policy.update(replace(good, window=replace(good.window, **nothing)))
    assert state(policy) == before


@pytest.mark.parametrize("windows", [0, 12, 60, 200])
def test_any_list_of_arms_will_do(config, windows):
    policy, rng = trained(config, windows), np.random.default_rng(4)
    for arms in ([], [1200], [210, 2100], [1005, 1200, 1395], list(ARMS[::-1]), [3000, 4000]):
        for decision in (policy.select(context(rng), arms), policy.select_idle(arms)):
            assert decision.arm is None or decision.arm in arms
        for _ in range(5):
            policy.update(outcome(policy.select(context(rng), arms).arm, rng))
