"""The policy `agft` in closed loop with a synthetic GPU, in pure numpy."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from agft_ray.policy.agft import learner as learner_module
from agft_ray.policy.agft.policy import AgftConfig, AgftPolicy
from agft_ray.policy.experience import Prior, PriorKey
from agft_ray.priors.merge import add
from agft_ray.types import Context, Outcome, StepTotals

ARMS = tuple(range(210, 2101, 15))
KEY = PriorKey("A6000", "m", 1, "mixed", "bf16", "edp", 0.8, 1, 1, "agft")
WINDOW = SimpleNamespace(generation_tokens=10, tpot_s=0.05)
EMPTY = SimpleNamespace(
    generation_tokens=0,
    tpot_s=None,
    itl_count=0,
    prompt_tokens=0,
    decode_steps=StepTotals(),
    prefill_steps=StepTotals(),
)


class Landscape:
    """power = 60 + a f^2.2 W and delay = c (1 + 0.8 load) / f: EDP is least at `best_mhz`.

    d ln(power)/d ln(f) = 1 there, which gives a; with load the optimum falls by some per cent.
    """

    def __init__(self, best_mhz=1230, noise=0.1):
        self.a = 60 / (1.2 * (best_mhz / 1000) ** 2.2)
        self.noise = noise
        self.best = {}

    def reward(self, arm, load):
        f = (arm or 2100) / 1000
        power_w = 60 + self.a * f**2.2 / (1 + 0.15 * (load - 0.5))
        delay_s = 0.036 * (1 + 0.8 * load) / f
        return -math.log(power_w / 100) - math.log(delay_s / 0.05)

    def regret(self, arm, load):
        if load not in self.best:
            self.best[load] = max(self.reward(other, load) for other in ARMS[::4])
        return self.best[load] - self.reward(arm, load)


class Loop:
    """Runs a policy against a landscape and remembers what it chose and what it lost."""

    def __init__(self, seed=0, load=lambda t: 0.5, landscape=None, cap_mhz=10_000, **settings):
        self.policy = AgftPolicy(AgftConfig(seed=seed, **settings))
        self.rng = np.random.default_rng(seed)
        self.landscape = landscape or Landscape()
        self.load, self.cap_mhz = load, cap_mhz
        self.context = self.observe()
        self.decisions, self.regrets = [], []

    def observe(self):
        load = self.load(len(self.__dict__.get("decisions", ())))
        levels = np.array(
            [load > 0.8, load, load, 0.3 + 0.4 * load, 1.2 * load, 0.6 * load, 0.2, load]
        )
        noisy = np.maximum(0.0, levels + 0.05 * self.rng.standard_normal(8))
        return Context((1.0, *noisy.tolist()), 1)

    def run(self, windows):
        for _ in range(windows):
            load = self.load(len(self.decisions))
            decision = self.policy.select(self.context, ARMS)
            arm = None if decision.arm is None else min(decision.arm, self.cap_mhz)
            self.context = self.observe()
            reward = self.landscape.reward(arm, load) + self.landscape.noise * self.rng.normal()
            self.policy.update(Outcome(decision.arm, arm, self.context, reward, WINDOW))
            self.decisions.append(decision)
            self.regrets.append(self.landscape.regret(arm, load))
        return self

    @property
    def reasons(self):
        return [decision.reason for decision in self.decisions]

    @property
    def arms(self):
        return [decision.arm for decision in self.decisions]


LOADS = {
    "constant": lambda t: 0.5,
    "waves": lambda t: 0.5 + 0.4 * math.sin(t / 25),
    "step": lambda t: 0.3 if t < 150 else 0.9,
}


@pytest.mark.parametrize("load", LOADS)
def test_finds_a_clock_within_4_percent_of_the_best_edp(load):
    seeds = 10 if load == "constant" else 3
    loops = [Loop(seed, load=LOADS[load]).run(300) for seed in range(seeds)]
    final = [np.mean(loop.regrets[-30:]) for loop in loops]
    assert sum(regret < math.log(1.04) for regret in final) >= 0.9 * seeds
    assert np.mean([loop.regrets[:150] for loop in loops]) < 0.08
    assert all(loop.policy.status()["relearnings"] == 0 for loop in loops)
    for loop in loops:
        low = Counter(arm for arm in loop.arms if arm and arm < 500)
        assert max(low.values(), default=0) <= 3


def test_phases_follow_each_other_and_the_sweep_goes_down():
    loop = Loop().run(200)
    assert loop.reasons[:10] == ["baseline"] * 10
    assert loop.reasons[199] == "exploit"
    swept = [d.arm for d in loop.decisions if d.reason == "sweep"]
    assert swept == sorted(swept, reverse=True)
    assert swept[:3] == [2100, 2010, 1920]
    assert swept[-1] > 300  # extreme pruning ends it
    assert set(loop.arms[-40:]) <= set(range(900, 1651, 15))


def test_relearns_after_the_landscape_moved():
    loops = []
    for seed in range(5):
        loop = Loop(seed).run(250)
        loop.landscape = Landscape(1600)
        loops.append(loop.run(300))
    assert all(loop.policy.status()["relearnings"] <= 2 for loop in loops)
    assert sum(loop.policy.status()["relearnings"] >= 1 for loop in loops) >= 4
    assert sum(np.mean(loop.regrets[-30:]) < math.log(1.04) for loop in loops) >= 4


def test_drift_starts_everything_anew_and_convergence_takes_its_time():
    loop = Loop().run(200)
    before = loop.policy.experience()
    loop.landscape = Landscape(1900)
    while not loop.policy.status()["relearnings"]:
        loop.run(1)
        assert len(loop.regrets) < 300
    status, after = loop.policy.status(), loop.policy.experience()
    assert status["phase"] == "baseline"
    assert status["floor_mhz"] is None
    assert before.counts.max() > 30
    assert after.counts.max() <= 3.0
    start = len(loop.regrets)
    loop.run(60)
    assert loop.reasons[start : start + 3] == ["baseline"] * 3
    assert loop.reasons[start + 3] == "sweep"
    assert "exploit" not in loop.reasons[start:]


def test_a_change_of_load_is_no_drift():
    for seed in range(2):
        loop = Loop(seed, load=lambda t: 0.2 if (t // 120) % 2 == 0 else 0.9).run(500)
        assert loop.policy.status()["relearnings"] == 0


def test_a_prior_shortens_the_start():
    teachers = [Loop(seed).run(200).policy.experience() for seed in (1, 3)]
    prior = Prior(KEY, 1, 2, add(teachers))
    learner = Loop(2)
    learner.policy.merge(prior)
    learner.run(150)
    alone = Loop(2).run(150)
    assert learner.reasons[0] != "baseline"
    assert np.mean(learner.regrets[:60]) < 0.6 * np.mean(alone.regrets[:60])
    assert sum(arm is not None and arm < 480 for arm in learner.arms) <= 2
    assert np.mean(learner.regrets[-30:]) < math.log(1.04)


def test_two_that_share_learn_faster_than_one():
    alone, shared = [], []
    for seed in range(4):
        alone.append(np.mean(Loop(seed).run(120).regrets))
        pair = Loop(seed), Loop(seed + 100)
        for _ in range(40):
            for ours, theirs in (pair, pair[::-1]):
                experience = theirs.policy.experience()
                ours.policy.merge(Prior(KEY, 1, 1, add([experience])))
                ours.run(3)
        shared.append(np.mean([loop.regrets for loop in pair]))
    assert np.mean(shared) < 0.9 * np.mean(alone)


def test_a_prior_is_validated_once_however_often_it_is_taken(monkeypatch):
    checked = []
    validate = learner_module.validate
    monkeypatch.setattr(
        learner_module, "validate", lambda *a, **k: (checked.append(a), validate(*a, **k))
    )
    prior = Prior(KEY, 1, 1, Loop(1).run(50).policy.experience())
    learner = Loop(2)
    for _ in range(5):
        learner.policy.merge(prior)
        learner.run(4)
    assert len(checked) == 1
    learner.policy.merge(Prior(KEY, 2, 1, Loop(3).run(50).policy.experience()))
    assert len(checked) == 2


def test_a_poisoned_prior_is_outvoted():
    teacher = Loop(1).run(300).policy.experience()
    lie = teacher.responses.copy()
    rows = [i for i, arm in enumerate(teacher.arms_mhz) if arm >= 1900]
    lie[rows] = 4.0 * teacher.grams[rows, 0]
    learner = Loop(2)
    poison = Prior(KEY, 1, 1, type(teacher)(teacher.arms_mhz, teacher.counts, teacher.grams, lie))
    for _ in range(75):
        learner.policy.merge(poison)
        learner.run(4)
    pulls = Counter(learner.arms)
    assert max(pulls[teacher.arms_mhz[row]] for row in rows) <= 30  # prior_windows
    assert np.mean(learner.regrets[-30:]) < math.log(1.04)


def test_a_clock_that_never_comes_true_is_dropped_for_what_was_observed():
    loop = Loop(cap_mhz=1500, landscape=Landscape(1900)).run(300)
    experience = loop.policy.experience()
    assert max(experience.arms_mhz) <= 1545
    asked = Counter(arm for arm in loop.arms if arm and arm > 1545)
    assert max(asked.values()) <= 3
    assert np.mean(loop.regrets[-30:]) - Landscape(1900).regret(1500, 0.5) < 0.04


def test_clocks_near_the_requested_one_are_credited_to_it():
    policy = AgftPolicy(AgftConfig(baseline_windows=1))
    rng = np.random.default_rng(0)
    for requested, observed in ((1200, 1230), (1200, 1155), (1200, 1290), (1200, None)):
        context = Context((1.0, *rng.random(8).tolist()), 1)
        policy.update(Outcome(requested, observed, context, 0.0, WINDOW))
    experience = policy.experience()
    assert dict(zip(experience.arms_mhz, experience.counts.tolist(), strict=True)) == {
        0: 1.0,
        1200: 2.0,
        1290: 1.0,
    }


def test_a_warm_start_from_a_snapshot_goes_on_where_it_was():
    loop = Loop(3).run(200)
    successor = Loop(3)
    successor.policy.restore(loop.policy.snapshot())
    successor.run(20)
    assert "baseline" not in successor.reasons
    assert "sweep" not in successor.reasons


def test_a_high_clock_that_is_far_too_expensive_does_not_stop_the_search():
    class Costly(Landscape):
        def reward(self, arm, load):
            return super().reward(arm, load) - (0.8 if (arm or 2100) > 1700 else 0.0)

    loop = Loop(landscape=Costly()).run(200)
    assert np.mean(loop.regrets[-30:]) < math.log(1.05)


def test_windows_without_tokens_do_not_count_as_baseline():
    policy = AgftPolicy()
    context = Context((1.0,) + (0.0,) * 8, 1)
    for _ in range(30):
        policy.update(Outcome(None, None, context, 0.0, EMPTY))
    assert policy.select(context, ARMS).reason == "baseline"


def test_a_context_that_is_not_finite_is_refused():
    policy = AgftPolicy()
    with pytest.raises(ValueError, match=r"context\.features"):
        policy.select(Context((1.0,) + (math.nan,) * 8, 1), ARMS)
