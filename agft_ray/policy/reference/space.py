"""The action space of the policy `agft_reference`: first grid, pruning, refinement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from agft_ray.policy.arms import nearest
from agft_ray.policy.reference.bandit import ReferenceArm, alpha, predict

GRID_STEP_MHZ = 90
REFINED_SPAN_MHZ, REFINED_STEP_MHZ = 150, 15
EXTREME_VISITS, EXTREME_REWARD = 3, -1.2
HISTORICAL_SAMPLES = 6
HISTORICAL_SIGMAS, MIN_SIGMA_J_S = 4.0, 0.05
MIN_ARMS = 2
"""Historical pruning always leaves so many."""
TIER_SAMPLES, TIER_MIN = 6, 2
ANCHOR_SAMPLES = 4


def first_grid(arms: Sequence[int]) -> list[int]:
    """The lowest clock, every 90 MHz above it, and the highest, ascending.

    Of the supported list only minimum and maximum enter; the clocks between are arithmetic. Here
    they are snapped to supported ones, as the loop sets no others.
    """
    supported = sorted(arms)
    low, high = supported[0], supported[-1]
    targets = [*range(low, high, GRID_STEP_MHZ), high]
    return sorted({nearest(supported, target) for target in targets})


def refined_grid(anchor_mhz: int, low_mhz: int, high_mhz: int) -> list[int]:
    """Every 15 MHz within 150 MHz of the anchor and within the limits: at most 21 clocks."""
    start = max(low_mhz, anchor_mhz - REFINED_SPAN_MHZ)
    end = min(high_mhz, anchor_mhz + REFINED_SPAN_MHZ)
    return list(range(start, end + 1, REFINED_STEP_MHZ))


# -- pruning -----------------------------------------------------------------------------------


def is_extreme(arm: ReferenceArm) -> bool:
    """Three visits or more with a mean reward of at most -1.2."""
    return arm.visits >= EXTREME_VISITS and arm.mean_reward <= EXTREME_REWARD


def historically_bad(arms: Mapping[int, ReferenceArm]) -> list[int]:
    """Which of the available arms the historical rule removes, worst first.

    Mean EDP more than 4 * max(sigma, 0.05 J s) above the best mean, sigma being the deviation of
    the means of arms with 6 positive EDPs; raw EDPs of different loads are compared.
    """
    means = {}
    for clock, arm in arms.items():
        positive = [edp for edp in arm.edps if edp > 0]
        if arm.visits >= HISTORICAL_SAMPLES and len(positive) >= HISTORICAL_SAMPLES:
            means[clock] = sum(positive) / len(positive)
    if len(arms) <= MIN_ARMS or len(means) < 2:
        return []
    limit = HISTORICAL_SIGMAS * max(float(np.std(list(means.values()))), MIN_SIGMA_J_S)
    best = min(means.values())
    bad = [clock for clock, mean in means.items() if mean - best > limit]
    return sorted(bad, key=lambda clock: -means[clock])[: len(arms) - MIN_ARMS]


def cascade(trigger_mhz: int, available: Sequence[int], highest_mhz: int) -> list[int]:
    """What goes with a pruned arm: below half of the highest clock, all arms up to it."""
    if trigger_mhz >= highest_mhz // 2:
        return [trigger_mhz]
    return [trigger_mhz, *(clock for clock in available if clock < trigger_mhz)]


# -- refinement --------------------------------------------------------------------------------


def statistical_anchor(arms: Mapping[int, ReferenceArm], latest_mhz: int) -> int | None:
    """The arm with the lowest mean EDP in the load tier of the latest window, if one is known.

    The tier is where the latest EDP lies in its own arm's history: up to the 33rd percentile,
    above the 67th, or between. Otherwise the lowest mean EDP of arms with 4 samples.
    """
    latest = arms.get(latest_mhz)
    if latest is not None and len(latest.edps) >= TIER_SAMPLES:
        tier, means = _tiers(latest.edps)[-1], {}
        for clock, arm in arms.items():
            if len(arm.edps) < TIER_SAMPLES:
                continue
            pairs = zip(arm.edps, _tiers(arm.edps), strict=True)
            same = [edp for edp, other in pairs if other == tier]
            if len(same) >= TIER_MIN:
                means[clock] = sum(same) / len(same)
        if means:
            return min(means, key=lambda clock: means[clock])
    return _lowest_mean_edp(arms)


def predictive_anchor(
    arms: Mapping[int, ReferenceArm], x: Sequence[float], rounds: int
) -> int | None:
    """Of the explored arms with nearly the best UCB at this context, the one with the lowest mean
    EDP over 4 samples; the best UCB if none has as many."""
    explored = [clock for clock, arm in arms.items() if arm.visits]
    if not explored:
        return None
    means, widths = predict([arms[clock] for clock in explored], x)
    scores = means + alpha(rounds) * widths
    best = float(scores.max())
    limit = 0.8 * best if best > 0 else best - 0.3
    near = {clock: arms[clock] for clock, s in zip(explored, scores, strict=True) if s >= limit}
    return _lowest_mean_edp(near) or explored[int(np.argmax(scores))]


def _tiers(edps: Sequence[float]) -> list[int]:
    """For each EDP of a history, 0 low, 1 medium or 2 high within it."""
    low, high = np.percentile(edps, [33, 67])
    return [0 if edp <= low else 2 if edp > high else 1 for edp in edps]


def _lowest_mean_edp(arms: Mapping[int, ReferenceArm]) -> int | None:
    sampled = [clock for clock, arm in arms.items() if len(arm.edps) >= ANCHOR_SAMPLES]
    return min(sampled, key=lambda clock: arms[clock].mean_edp_j_s, default=None)
