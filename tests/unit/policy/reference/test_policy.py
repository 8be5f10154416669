"""The reference AGFT's behaviour, in the numbers that its description gives."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agft_ray.policy.reference.bandit import (
    Normaliser,
    ReferenceArm,
    alpha,
    predict,
    raw_features,
    reward_of,
)
from agft_ray.policy.reference.policy import AgftReferencePolicy
from agft_ray.policy.reference.space import (
    cascade,
    first_grid,
    historically_bad,
    is_extreme,
    predictive_anchor,
    refined_grid,
    statistical_anchor,
)
from agft_ray.types import Decision
from unit.policy.policy_tools import ARMS, CONTEXT, choice, outcome

GRID = list(range(210, 2101, 90))
WINDOW_S = 0.8


class Loop:
    """Rounds one after another; power 100 W, `EDP = edp(clock)`."""

    def __init__(self, make_window, edp, seed=0, noise=0.0):
        self.policy, self.edp, self.make_window = AgftReferencePolicy(), edp, make_window
        self.rng, self.noise, self.t_s = np.random.default_rng(seed), noise, 0.0
        self.arms, self.reasons, self.phases, self.windows = [], [], [], []

    def run(self, rounds):
        """Choose a clock and hold it for as long as the policy does, so many times."""
        for _ in range(rounds):
            decision = self.policy.select(CONTEXT, ARMS)
            self.arms.append(decision.arm)
            self.reasons.append(decision.reason)
            self.windows.append(self.hold(decision.arm))
            self.phases.append(self.policy.status()["phase"])
        return self

    def hold(self, arm):
        """The number of windows until the next choice."""
        count, held = 0, Decision(arm, "hold")
        while held.reason == "hold":
            assert held.arm == arm
            self.policy.update(outcome(self.window(arm), arm))
            held, count = self.policy.select(CONTEXT, ARMS), count + 1
        return count

    def window(self, arm):
        start_s, self.t_s = self.t_s, self.t_s + WINDOW_S
        edp = self.edp(arm) * float(np.exp(self.noise * self.rng.normal()))
        return self.make_window(
            start_s=start_s,
            end_s=self.t_s,
            energy_j=80.0,
            itl_sum_s=300 * edp / 80.0,
            itl_count=300,
            running=float(self.rng.uniform(2, 10)),
            prompt_tokens=int(self.rng.integers(0, 3000)),
        )


def valley(arm):
    """EDP in J s, least at 1230 MHz."""
    f = (arm or 1800) / 1230
    return 2.0 * (f + 1 / f)


def flat(arm):
    return 4.0


def arm_of(edps, rewards=None):
    rewards = rewards or [0.0] * len(edps)
    return ReferenceArm(visits=len(edps), reward_sum=sum(rewards), edps=list(edps))


# -- numbers of the description ------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "expected"), [(0, 10.0), (100, 1.35), (200, 0.18), (231, 0.1)])
def test_alpha_falls_exponentially_to_its_floor(rounds, expected):
    assert alpha(rounds) == pytest.approx(expected, abs=0.005)
    assert alpha(10_000) == 0.1


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.25, 1.5), (0.5, 1.0), (0.9, 0.2), (1, 0), (1.11, -0.22), (1.5, -1), (2, -2), (9, -2)],
)
def test_rewards_are_those_of_the_reference(ratio, expected):
    assert reward_of(3.0 * ratio, 3.0) == pytest.approx(expected)


def test_the_seven_features_are_amounts_per_window(make_window):
    window = make_window(waiting=0.3, kv_cache_usage=0.25, prompt_tokens=0)
    expected = [1.0, 1e-3, 300.0, 2300 / 80, 4.0, 25.0, 25.0]
    assert raw_features(window) == pytest.approx(expected)


def test_z_scores_are_those_of_all_values_so_far_and_clipped():
    normaliser, rng = Normaliser(), np.random.default_rng(0)
    values = rng.normal(5, 2, size=(50, 7))
    for n, row in enumerate(values, 1):
        scores = normaliser.add(row.tolist())
        if n == 1:
            assert scores == [0.0] * 7
            continue
        expected = (row - values[:n].mean(axis=0)) / values[:n].std(axis=0, ddof=1)
        np.testing.assert_allclose(scores, np.clip(expected, -3, 3), rtol=1e-6)
    assert normaliser.add([1e9] * 7) == [3.0] * 7


def test_linucb_is_a_ridge_regression_with_lambda_5():
    rng, arm = np.random.default_rng(1), ReferenceArm()
    xs, rewards = rng.normal(size=(20, 7)), rng.normal(size=20)
    for x, reward in zip(xs, rewards, strict=True):
        arm.learn(x.tolist(), float(reward), 1.0)
    inverse = np.linalg.inv(5 * np.eye(7) + xs.T @ xs)
    at = rng.normal(size=7)
    means, widths = predict([arm, ReferenceArm()], at.tolist())
    assert means == pytest.approx([at @ inverse @ (xs.T @ rewards), 0.0])
    assert widths == pytest.approx([np.sqrt(at @ inverse @ at), np.linalg.norm(at) / np.sqrt(5)])


# -- flaws that are kept -------------------------------------------------------------------------


def test_f1_at_the_mean_load_every_arm_predicts_nothing(make_window):
    loop = Loop(make_window, valley, noise=0.1).run(150)
    arms = list(loop.policy.state.arms.values())
    assert max(abs(arm.mean_reward) for arm in arms) > 0.2
    means, widths = predict(arms, [0.0] * 7)
    assert not means.any()
    assert not widths.any()


def test_f3_relearning_flips_the_phase_and_changes_nothing_else(make_window):
    loop = Loop(make_window, flat, noise=0.02).run(60)
    state = loop.policy.state
    state.actions, state.space = [1200] * 100, [1200, 1215]  # what leads to convergence
    state.rounds, state.feedbacks = 150, 0
    loop.run(1)
    assert loop.phases[-1] == "exploit"
    loop.run(100)
    assert set(loop.phases[-100:]) == {"exploit"}
    pruned, rounds = list(loop.policy.state.pruned), loop.policy.state.rounds
    loop.edp = lambda arm: 40.0
    loop.run(50)
    assert 20 <= loop.policy.status()["relearnings"] <= 25  # on and off every other window
    assert loop.policy.state.pruned == pruned
    assert loop.policy.state.rounds == rounds + 50  # alpha went on falling
    assert "sweep" not in loop.reasons[-50:]


def test_f8_empty_windows_train_zero_and_look_excellent(make_window):
    loop = Loop(make_window, flat).run(15)
    arm = choice(loop.policy)
    loop.t_s += 1.6 + 0.3  # two windows that the loop did not hand over, and their settling
    loop.run(1)
    assert loop.windows[-1] == 2  # the empty ones were to settle and for the reward
    assert loop.policy.state.arms[arm].edps == [0.0]
    assert loop.policy.state.arms[arm].reward_sum == 0.0
    assert loop.policy.state.rounds == 6


def test_from_the_third_empty_window_on_it_is_idle_and_starts_with_a_new_context(make_window):
    loop = Loop(make_window, flat).run(15)
    seen = loop.policy.state.normaliser.count
    loop.t_s += 100.0
    loop.run(1)
    assert loop.windows[-1] == 1
    assert loop.policy.state.rounds == 6
    assert loop.policy.state.normaliser.count == seen + 1
    loop.t_s += 0.5  # a change of the clock, no window
    loop.run(1)
    assert loop.windows[-1] == 4


def test_a_round_takes_four_windows_while_learning_and_three_while_exploiting(make_window):
    loop = Loop(make_window, flat).run(30)
    assert loop.windows == [1] * 10 + [4] * 20
    loop.policy.state.exploiting = True
    assert loop.run(5).windows[-5:] == [3] * 5


def test_f15_the_objective_knows_nothing_of_ttft(make_window):
    loops = [Loop(make_window, valley, noise=0.1) for _ in range(2)]
    slow = loops[1].window
    loops[1].window = lambda arm: replace(slow(arm), ttft_sum_s=60.0)
    assert loops[0].run(200).arms == loops[1].run(200).arms


# -- phases --------------------------------------------------------------------------------------


def test_baseline_then_one_sweep_from_the_highest_clock_down(make_window):
    loop = Loop(make_window, valley, noise=0.1).run(33)
    assert loop.arms[:10] == [None] * 10
    assert loop.reasons[:10] == ["baseline"] * 10
    assert loop.arms[10:32] == GRID[::-1]
    assert loop.reasons[32] == "learn"


def test_the_reward_is_relative_to_nine_tenths_of_the_first_ten_windows(make_window):
    loop = Loop(make_window, lambda arm: 4.0 if arm is None else 2.0).run(11)
    assert loop.policy.state.arms[2100].mean_reward == pytest.approx(2 * (1 - 2.0 / 3.6))


def test_the_context_of_a_reward_is_the_window_before_the_choice(make_window):
    loop = Loop(make_window, flat).run(12)
    before = list(loop.policy.state.context)
    arm = choice(loop.policy)
    loop.run(1)
    assert loop.policy.state.context != before
    gram = np.array(loop.policy.state.arms[arm].gram)
    np.testing.assert_allclose(gram, 5 * np.eye(7) + np.outer(before, before))


def test_only_the_second_window_of_a_round_is_the_reward(make_window):
    loop = Loop(make_window, flat).run(10)
    for edp in (1.0, 2.0, 3.0, 5.0):
        loop.edp = lambda arm, edp=edp: edp
        loop.policy.update(outcome(loop.window(2100), 2100))
    assert loop.policy.state.arms[2100].edps == [pytest.approx(2.0)]


def test_convergence_counts_choices_whatever_they_brought(make_window):
    loop = Loop(make_window, flat, noise=0.3).run(50)
    state = loop.policy.state
    state.rounds, state.actions = 98, [1200] * 30 + [1290] * 20 + [1380] * 10 + GRID[:20] * 2
    loop.run(1)
    assert loop.phases[-1] == "learn"  # round 99
    loop.run(1)
    state.actions = [1200] * 30 + [1290] * 20 + [1380] * 11 + (GRID[:9] * 5)[:39]
    loop.run(1)
    assert loop.phases[-1] == "exploit"


def test_the_space_is_replaced_after_80_learning_rounds(make_window):
    loop = Loop(make_window, valley, noise=0.1).run(10 + 79)
    assert loop.policy.state.space == []
    loop.run(1)
    space = loop.policy.state.space
    assert len(space) <= 21
    assert np.unique(np.diff(space)).tolist() == [15]
    loop.run(1)
    assert loop.arms[-1] in space


def test_windows_at_default_clocks_later_on_teach_no_arm(make_window):
    loop = Loop(make_window, valley).run(40)
    rounds, arm = loop.policy.state.rounds, choice(loop.policy)
    loop.policy.update(outcome(loop.window(arm), arm))
    loop.policy.update(outcome(loop.window(None), None))
    assert loop.policy.state.rounds == rounds
    assert loop.run(1).windows[-1] == 4  # the round began anew
    assert len(loop.policy.state.baseline_edps) == 10


def test_while_idle_it_locks_210_mhz():
    policy = AgftReferencePolicy()
    assert policy.select_idle(ARMS).arm == 210
    assert policy.select_idle([345, 360]).arm == 345


def test_a_snapshot_in_any_phase_continues_identically(make_window):
    for windows in (5, 20, 60, 95, 300):
        loop = Loop(make_window, valley, seed=windows, noise=0.2).run(windows)
        copy = Loop(make_window, valley, noise=0.2)
        copy.policy.restore(json.loads(json.dumps(loop.policy.snapshot())))
        copy.t_s = loop.t_s
        for each in (loop, copy):
            each.rng = np.random.default_rng(7)
        assert loop.run(150).arms[-150:] == copy.run(150).arms
        assert loop.policy.snapshot() == copy.policy.snapshot()


# -- the action space ----------------------------------------------------------------------------


def test_the_first_grid_knows_of_the_list_only_minimum_and_maximum():
    assert first_grid(ARMS) == GRID
    assert first_grid([210, 330, 345, 420]) == [210, 330, 420]
    assert first_grid([1200]) == [1200]


def test_the_refined_grid_starts_at_the_anchor_less_150():
    assert refined_grid(1237, 210, 2100) == list(range(1087, 1388, 15))
    assert len(refined_grid(1230, 210, 2100)) == 21
    assert refined_grid(2100, 210, 2100) == list(range(1950, 2101, 15))
    assert refined_grid(300, 210, 2100)[0] == 210


@pytest.mark.parametrize(
    ("rewards", "extreme"),
    [([-2, -2], False), ([-1.2, -1.2, -1.2], True), ([-2, -2, 1], False), ([-1.19] * 3, False)],
)
def test_extreme_pruning_needs_three_visits_and_a_mean_of_minus_1_2(rewards, extreme):
    assert is_extreme(arm_of([1.0] * len(rewards), rewards)) == extreme


def test_extreme_arms_below_half_of_the_maximum_take_those_below_along(make_window):
    loop = Loop(make_window, lambda arm: 4.0 if arm is None or arm > 600 else 40.0).run(90)
    assert loop.policy.state.pruned[:1] == [210]
    assert max(loop.policy.state.pruned) in (300, 390, 480, 570)
    assert cascade(570, GRID, 2100) == [570, 210, 300, 390, 480]
    assert cascade(1050, GRID, 2100) == [1050]


def test_historical_pruning_needs_nine_arms_to_be_possible():
    def space(good):
        return {1000 + i: arm_of([1.0] * 6) for i in range(good)} | {500: arm_of([99.0] * 6)}

    # one outlier among k arms lies k / sqrt(k - 1) sigma off: above 4 from k = 15 on
    assert historically_bad(space(13)) == []
    assert historically_bad(space(14)) == [500]
    # the extreme case of the description: one arm at either end, the rest between
    nine = {1000 + i: arm_of([1.0 + 98.0 * (i == 0) + 49.0 * (0 < i < 8)] * 6) for i in range(9)}
    assert historically_bad(nine) == [1000]
    eight = {k: v for k, v in nine.items() if k != 1007}
    assert historically_bad(eight) == []


def test_historical_pruning_leaves_out_what_is_little_known_and_small_spreads():
    good = {1000 + i: arm_of([1.0] * 6) for i in range(30)}
    assert historically_bad(good | {500: arm_of([99.0] * 5)}) == []
    assert historically_bad(good | {500: arm_of([99.0] * 5 + [0.0])}) == []
    assert historically_bad(good | {500: arm_of([1.19] * 6)}) == []
    assert historically_bad(good | {500: arm_of([1.21] * 6)}) == [500]
    assert historically_bad({k: good[k] for k in (1000, 1001)}) == []


def test_the_statistical_anchor_compares_within_the_tier_of_the_latest_window():
    arms = {
        # low EDPs are best at 900, high ones at 1200
        900: arm_of([1.0, 1.1, 1.2, 5.0, 9.0, 9.1, 9.2]),
        1200: arm_of([2.0, 2.1, 2.2, 5.0, 6.0, 6.1, 6.2]),
        1500: arm_of([0.1] * 5),  # too few to be split
    }
    arms[1800] = arm_of([3.0, 3.1, 3.2, 5.0, 7.0, 7.1, 3.0])
    assert statistical_anchor(arms, 1800) == 900
    arms[1800] = arm_of([3.0, 3.1, 3.2, 5.0, 7.0, 7.1, 7.2])
    assert statistical_anchor(arms, 1800) == 1200
    assert statistical_anchor(arms, 1500) == 1500  # the fallback: lowest mean of 4 samples
    assert statistical_anchor({900: arm_of([1.0] * 3)}, 900) is None


def test_f8_a_clock_with_empty_windows_becomes_the_anchor():
    arms = {900: arm_of([3.0, 3.0, 3.0, 3.0]), 1830: arm_of([9.0, 0.0, 0.0, 0.0])}
    assert statistical_anchor(arms, 900) == 1830


def test_the_predictive_anchor_is_the_cheapest_of_those_with_nearly_the_best_ucb():
    x = [1.0] + [0.0] * 6

    def arm(theta, edps):
        gram = (1e6 * np.eye(7)).tolist()  # no width to speak of
        response = [1e6 * theta] + [0.0] * 6
        return ReferenceArm(gram=gram, response=response, visits=len(edps), edps=edps)

    arms = {
        900: arm(1.0, [3.0] * 4),
        1200: arm(0.85, [2.0] * 4),
        1500: arm(0.7, [1.0] * 4),
        1800: arm(0.9, [0.5] * 3),
        2100: ReferenceArm(),
    }
    assert predictive_anchor(arms, x, 400) == 1200
    assert predictive_anchor({k: arms[k] for k in (1800, 2100)}, x, 400) == 1800
    assert predictive_anchor({2100: ReferenceArm()}, x, 400) is None
    worse = {900: arm(-1.0, [3.0] * 4), 1200: arm(-1.2, [2.0] * 4), 1500: arm(-1.4, [1.0] * 4)}
    assert predictive_anchor(worse, x, 400) == 1200
