"""What every policy promises, whatever it does with it."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from agft_ray.errors import PriorError
from agft_ray.policy.agft.policy import AgftConfig
from agft_ray.policy.base import Policy
from agft_ray.policy.baselines.activity import ActivityConfig
from agft_ray.policy.baselines.default import DefaultConfig
from agft_ray.policy.baselines.fixed import FixedConfig
from agft_ray.policy.baselines.pair import PairConfig
from agft_ray.policy.baselines.pid import PidConfig
from agft_ray.policy.baselines.predictive import PredictiveConfig
from agft_ray.policy.baselines.rules import RulesConfig
from agft_ray.policy.experience import Experience, Prior, PriorKey
from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.reference.policy import AgftReferenceConfig
from agft_ray.policy.registry import BuiltinConfig, build_policy
from agft_ray.testing import ARMS, CHECKS, check_policy, context, outcome, play, state
from agft_ray.testing import trained as trained_by
from agft_ray.testing import window as window
from agft_ray.types import Context, Decision, StepTotals

CONFIGS = {
    "default": DefaultConfig(),
    "fixed": FixedConfig(sm_clock_mhz=1237),
    "pair": PairConfig(prefill_sm_clock_mhz=1507, decode_sm_clock_mhz=1244),
    "agft": AgftConfig(seed=7),
    "agft-hasty": AgftConfig(
        baseline_windows=1, refine_after=1, convergence_window=10, forgetting=1.0
    ),
    "phases": PhasesConfig(),
    "phases-hasty": PhasesConfig(baseline_decode_steps=10, baseline_prefill_steps=2, clocks="pair"),
    "agft_reference": AgftReferenceConfig(),
    "rules": RulesConfig(),
    "activity": ActivityConfig(),
    "pid": PidConfig(tpot_slo_s=0.05, ttft_slo_s=0.5, kd=0.1),
    "predictive": PredictiveConfig(tpot_slo_s=0.05),
}
KEY = PriorKey("A6000", "m", 1, "mixed", "bf16", "edp", 0.8, 1, 1, "agft")
LEARNS_FROM_OTHERS = ("agft", "agft-hasty")


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def trained(config, windows, seed=0):
    return trained_by(lambda: build_policy(config), windows, seed)


def test_every_policy_is_held_to_this():
    ours = get_args(get_args(BuiltinConfig)[0])
    registered = {each.model_fields["name"].default for each in ours}
    assert registered == {config.name for config in CONFIGS.values()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_policy_promises(config, check, monkeypatch):
    if config.name == "agft_reference":  # 200 EDPs a clock, one in four windows: full after 40,000
        monkeypatch.setattr("agft_ray.testing.HALF_WINDOWS", 40_000)
    check(lambda: build_policy(config))


def test_snapshots_of_others_are_refused_and_change_nothing(config):
    policy = trained(config, 30)
    before, good = state(policy), policy.snapshot()
    for bad in ({}, good | {"schema": 99}, good | {"settings": {"name": "other"}}):
        with pytest.raises(ValueError):
            policy.restore(bad)
    assert state(policy) == before


def experience_of_others():
    return trained(CONFIGS["agft"], 60, seed=2).experience()


@pytest.mark.parametrize("name", LEARNS_FROM_OTHERS)
def test_merge_replaces_the_prior_and_is_never_handed_on(name):
    policy, experience = trained(CONFIGS[name], 60, seed=1), experience_of_others()
    own, alone = policy.experience(), state(policy)
    policy.merge(Prior(KEY, 1, 1, experience))
    once = state(policy)
    assert once != alone
    policy.merge(Prior(KEY, 2, 1, experience))
    assert state(policy) == once
    for field in ("arms_mhz", "counts", "grams", "responses"):
        np.testing.assert_array_equal(getattr(policy.experience(), field), getattr(own, field))


def malformed():
    good = experience_of_others()
    yield replace(good, counts=good.counts * np.nan)
    yield replace(good, grams=-good.grams)
    yield replace(good, responses=good.responses + 1e3)
    yield Experience((0,), np.ones(1), np.ones((1, 2, 3)), np.ones((1, 5)))


@pytest.mark.parametrize("name", LEARNS_FROM_OTHERS)
def test_a_malformed_prior_is_refused_whole(name):
    policy = trained(CONFIGS[name], 60)
    before = state(policy)
    for bad in malformed():
        with pytest.raises(PriorError):
            policy.merge(Prior(KEY, 1, 1, bad))
    assert state(policy) == before


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(LEARNS_FROM_OTHERS)))
def test_who_learns_alone_is_the_same_with_any_prior(name):
    told, untold = trained(CONFIGS[name], 60), trained(CONFIGS[name], 60)
    assert told.experience() is None
    for prior in (experience_of_others(), *malformed()):
        told.merge(Prior(KEY, 1, 1, prior))
    played = [play(each, 100, np.random.default_rng(9)) for each in (told, untold)]
    assert played[0] == played[1]
    assert state(told) == state(untold)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_refused(config, bad):
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
    nothing = {"generation_tokens": 0, "itl_count": 0, "prompt_tokens": 0}
    nothing |= {"decode_steps": StepTotals(), "prefill_steps": StepTotals()}
    policy.update(replace(good, window=replace(good.window, **nothing)))
    assert state(policy) == before


@pytest.mark.parametrize("arms", [[], list(ARMS[::-1])], ids=["none", "upside down"])
def test_odd_lists_of_arms_will_do(config, arms):
    policy, rng = trained(config, 60), np.random.default_rng(4)
    for decision in (policy.select(context(rng), arms), policy.select_idle(arms)):
        assert decision.arm is None or decision.arm in arms


# -- the checks themselves -------------------------------------------------------------------------


class Decent(Policy):
    """Keeps every promise with little effort."""

    def __init__(self):
        self.rewards = 0.0

    def select(self, context, arms):
        return Decision(max(arms, default=None) if self.rewards > 0 else None, "mood")

    def update(self, outcome):
        if np.isfinite([outcome.reward, *outcome.context.features]).all():
            self.rewards = 0.9 * self.rewards + outcome.reward


class Impure(Decent):
    def select(self, context, arms):
        self.rewards = -self.rewards
        return super().select(context, arms)


class Random(Decent):
    def select(self, context, arms):
        return Decision(int(np.random.default_rng().choice(arms)) if arms else None, "dice")


class Stubborn(Decent):
    def select(self, context, arms):
        return Decision(1200, "always")


class Hoarder(Decent):
    def __init__(self):
        super().__init__()
        self.windows = []

    def update(self, outcome):
        super().update(outcome)
        self.windows.append(outcome.reward)


class Gullible(Decent):
    def update(self, outcome):
        self.rewards += outcome.reward


class Forgetful(Decent):
    def snapshot(self):
        return {"rewards": self.rewards}

    def restore(self, snapshot):
        float(snapshot["rewards"]) if "rewards" in snapshot else ValueError()


def test_a_decent_policy_passes():
    check_policy(Decent)


@pytest.mark.parametrize(
    ("culprit", "promise"),
    [
        (Impure, "select is pure"),
        (Random, "select is pure"),
        (Stubborn, "among the clocks given"),
        (Hoarder, "does not grow"),
        (Gullible, "with nan changes nothing"),
        (Forgetful, "the state of the snapshot"),
    ],
)
def test_a_policy_that_breaks_a_promise_is_told_which(culprit, promise):
    with pytest.raises(AssertionError, match=promise):
        check_policy(culprit)
