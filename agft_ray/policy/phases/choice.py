"""The plan of least predicted energy among those within the bounds and within reach.

Power of a plan at this load, in W:
    prefill share x P_p + decode share x P_d + idle share x P_i.
As steps slow, so does the engine fill: if a share i of the time is empty at a ratio r0 of E2E, then
`i^(r/r0)` at r (M/G/infinity: the engine is empty with probability exp(-rate x E2E)).

Reach: nothing slows faster than 1/f, so from the lowest clock measured, f at slowdown h, a clock f'
slows at most to h f/f'. `StepTimes.slowdown` says just that below what was measured: a plan whose
predicted latencies keep the bounds keeps them in truth, as far as h there and the load are known.
In addition no clock lies more than `walk` below the lowest one measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agft_ray.policy.goals import DELAY_EXPONENTS, Goals, Objective
from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.phases.latency import MAX_RATIO, LatencyModel, Ratios, Slowdowns
from agft_ray.policy.phases.load import Load
from agft_ray.policy.phases.power import IDLE_DEFAULT, IDLE_LAST, IDLE_LOWEST, Powers
from agft_ray.policy.phases.step_time import StepTimes
from agft_ray.policy.phases.tails import Tails
from agft_ray.types import Arm, Plan

OFFSETS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 15, 20])
"""Clocks of a phase that are considered at once: so many places from the present one."""
OBJECTIVE: Objective = "energy"
"""Where none is asked for."""
KNOWN_RATIO = 0.95 * MAX_RATIO
"""Predictions end there: no plan is slower, whatever the bounds are."""
CURIOSITY = 0.004
"""What a clock not measured yet is worth trying for, as a share."""
TTFT_MARGINS = 5.0
"""Margins that predictions of TTFT, which are coarser, stay below its bound."""


@dataclass(frozen=True, slots=True)
class Models:
    """All that is known when a choice is made."""

    prefill: StepTimes
    decode: StepTimes
    powers: Powers
    load: Load
    switch_s: float
    """Time from the knowledge that a prompt is there until its clock is."""
    is_one: bool
    """A clock for both prefill and decode is better than one each, as far as changes go."""
    tails: Tails


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan, what is predicted of it, and of the one before it."""

    plan: Plan
    cost: float
    cost_before: float
    ttft: float
    tpot: float
    e2e: float


@dataclass(frozen=True, slots=True)
class _Grid:
    """Candidates, flat."""

    prefill: np.ndarray
    decode: np.ndarray
    idle_kind: np.ndarray


def choose(
    config: PhasesConfig, goals: Goals, models: Models, arms: Sequence[int], now: Plan,
    may: tuple[bool, bool],
) -> Choice | None:  # fmt: skip
    """The best plan; None where nothing but default clocks keeps the bounds. `may` says of which
    phases, prefill and decode, enough is known to leave their highest clock."""
    top, lowest = max(arms), min(arms)
    one = config.clocks == "one" or (config.clocks == "auto" and models.is_one)
    grid = _candidates(config, models, arms, now, may, one)
    latency = LatencyModel(models.load, models.switch_s)
    costs, ratios = _predict(goals, models, latency, grid, top, lowest)
    explores = (grid.prefill < models.prefill.lowest_mhz) | (grid.decode < models.decode.lowest_mhz)
    # What is not measured is predicted at its worst: there the margin is not needed.
    margin = np.where(explores, 0.0, config.margin)
    fits = _within(goals, models, latency.seen, ratios, margin)
    costs = np.where(explores, costs * (1.0 - CURIOSITY), costs)
    if not fits.any():
        return None
    before = _index(grid, now, top, lowest)
    best = int(np.argmin(np.where(fits, costs, np.inf)))
    cost_before = float(costs[before]) if before is not None and fits[before] else np.inf
    if before is not None and costs[best] >= cost_before * (1.0 - config.gain):
        best = before
    plan = _plan(grid, best, lowest)
    if not may[0]:  # evidence of default clocks is still needed
        plan = replace(plan, prefill=None, decode=None if one else plan.decode)
    return Choice(
        plan, float(costs[best]), cost_before,
        float(ratios.ttft[best]), float(ratios.tpot[best]), float(ratios.e2e[best]),
    )  # fmt: skip


def _candidates(
    config: PhasesConfig, models: Models, arms: Sequence[int], now: Plan,
    may: tuple[bool, bool], one: bool,
) -> _Grid:  # fmt: skip
    ordered = np.array(sorted(arms), dtype=float)
    both = (models.prefill, now.prefill, may[0]), (models.decode, now.decode, may[1])
    prefill, decode = (_reachable(config, ordered, *each) for each in both)
    common = np.union1d(prefill, decode)
    p = d = common[common >= max(prefill[0], decode[0])]
    if not one:
        each_p, each_d = np.meshgrid(prefill, decode, indexing="ij")
        p, d = np.append(p, each_p), np.append(d, each_d)
    kinds = IDLE_DEFAULT, IDLE_LOWEST, IDLE_LAST
    idle = np.repeat(kinds, len(p))
    return _Grid(np.tile(p, len(kinds)), np.tile(d, len(kinds)), idle)


def _reachable(
    config: PhasesConfig, arms: np.ndarray, times: StepTimes, now: Arm, may: bool
) -> np.ndarray:
    """Clocks near the present one, and the highest. One not measured yet is kept until it is."""
    top = arms[-1:]
    below = arms[arms <= times.top_mhz]  # those above change nothing
    if not may or not len(below):
        return top
    last = len(below) - 1
    at = last if now is None else min(int(np.searchsorted(below, now)), last)
    is_new = at < last and below[at] < times.lowest_mhz
    lowest = int(np.searchsorted(below, times.lowest_mhz * (1.0 - config.walk)))
    lowest = at if is_new else min(lowest, last)
    places = np.concatenate([at - OFFSETS, at + OFFSETS, [lowest]])
    return np.union1d(below[places[(places >= lowest) & (places <= last)]], top)


def _predict(
    goals: Goals, models: Models, latency: LatencyModel, grid: _Grid,
    top: int, lowest: int,
) -> tuple[np.ndarray, Ratios]:  # fmt: skip
    load, powers = models.load, models.powers
    idle_mhz = np.array([top, lowest, 0.0])[grid.idle_kind]
    idle_mhz = np.where(grid.idle_kind == IDLE_LAST, grid.decode, idle_mhz)
    slow = Slowdowns(
        models.prefill.slowdown(grid.prefill),
        models.decode.slowdown(grid.decode),
        models.prefill.lost(grid.prefill, grid.decode),
        models.prefill.lost(grid.prefill, idle_mhz),
    )
    seen = latency.seen
    # The bounds take the worst of what is not known, energy what is hoped; and so do TPOT and
    # E2E of prefill, whose own bound is on TTFT, lest decode leave it no room to be measured.
    expected = models.prefill.hoped(grid.prefill), models.decode.hoped(grid.decode)
    worst = latency.ratios(slow)
    rest = latency.ratios(replace(slow, prefill=expected[0]))
    ratios = Ratios(worst.ttft, rest.tpot, rest.e2e)
    likely = latency.ratios(replace(slow, prefill=expected[0], decode=expected[1]))
    idle = load.idle ** (likely.e2e / float(seen.e2e[0])) if load.idle > 0 else 0.0 * likely.e2e
    prefill = np.minimum(load.prefill / load.prefill_slowdown * expected[0], 1.0)
    decode = np.maximum(1.0 - idle - prefill, 0.0)
    watts = prefill * powers.prefill_w(grid.prefill) + decode * powers.decode_w(grid.decode)
    watts = watts + idle * powers.idle_w[grid.idle_kind]
    return _cost(goals, watts, likely.e2e), ratios


def _cost(goals: Goals, watts: np.ndarray, e2e: np.ndarray) -> np.ndarray:
    """Energy^w x E2E^m; without a latency in it, the weight w changes no order."""
    exponent = DELAY_EXPONENTS[goals.objective or OBJECTIVE]
    if not exponent:
        return watts
    return np.asarray(watts**goals.energy_weight * e2e**exponent)


def allowed_increase(goals: Goals) -> float:
    """How much longer latencies may be than at default clocks, as a share. Where only energy
    counts, and counts for less than usual, less latency is spent to save it."""
    is_energy = (goals.objective or OBJECTIVE) == "energy"
    return goals.bound * min(1.0, goals.energy_weight) if is_energy else goals.bound


def _within(
    goals: Goals, models: Models, seen: Ratios, ratios: Ratios, margin: np.ndarray
) -> np.ndarray:
    fits = np.ones(ratios.tpot.shape, dtype=bool)
    for name, slo_s, margins in (
        ("ttft", goals.ttft_s, TTFT_MARGINS),
        ("tpot", goals.tpot_s, 1.0),
        ("e2e", goals.e2e_s, 1.0),
    ):
        limit = np.maximum(1.0, 1.0 + allowed_increase(goals) - margins * margin)
        if slo_s is not None and (default_s := _default_s(goals, models, seen, name)):
            limit = np.maximum(1.0, slo_s / default_s - margins * margin)
        fits &= getattr(ratios, name) <= np.minimum(limit, KNOWN_RATIO)
    return fits


def _default_s(goals: Goals, models: Models, seen: Ratios, name: str) -> float | None:
    """What of a latency is bounded, as it would be at default clocks; None if not known yet."""
    if goals.statistic == "p99":
        return models.tails.p99_s(name)
    of_load_s = float(getattr(models.load, f"{name}_s") / getattr(seen, name)[0])
    return max(models.tails.mean_s(name) or 0.0, of_load_s) or None


def _index(grid: _Grid, plan: Plan, top: int, lowest: int) -> int | None:
    """Where a plan is among the candidates."""
    prefill, decode = plan.prefill or top, plan.decode or top
    at = (
        (grid.prefill == prefill)
        & (grid.decode == decode)
        & (grid.idle_kind == idle_kind(plan, lowest))
    )
    found = np.flatnonzero(at)
    return int(found[0]) if len(found) else None


def idle_kind(plan: Plan, lowest_mhz: int | None) -> int:
    """Which kind of idle clock a plan has; `lowest_mhz` is the lowest there is, if known."""
    if plan.idle is None:
        return IDLE_DEFAULT
    if plan.idle == plan.decode and plan.idle != lowest_mhz:
        return IDLE_LAST
    return IDLE_LOWEST


def _plan(grid: _Grid, at: int, lowest: int) -> Plan:
    prefill, decode = int(grid.prefill[at]), int(grid.decode[at])
    idle = (None, lowest, decode)[int(grid.idle_kind[at])]
    return Plan(prefill, decode, idle)
