"""The plan of least predicted energy among those within the bounds and within reach.

Power of a plan at this load, in W:
    prefill share x P_p + decode share x P_d + idle share x P_i.
As steps slow, so does the engine fill: if a share i of the time is empty at a ratio r0 of E2E, then
`i^(r/r0)` at r (M/G/infinity: the engine is empty with probability exp(-rate x E2E)).

Reach: nothing slows faster than 1/f, so from the lowest clock measured, f at slowdown h, a clock f'
slows at most to h f/f'. `StepTimes.slowdown` says just that below what was measured: a plan whose
predicted latencies keep the bounds keeps them in truth, as far as the load's part goes. In addition
no clock lies more than `walk` below the lowest one measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.phases.latency import LatencyModel, Ratios, Slowdowns
from agft_ray.policy.phases.load import Load
from agft_ray.policy.phases.power import IDLE_DEFAULT, IDLE_LAST, IDLE_LOWEST, Powers
from agft_ray.policy.phases.step_time import StepTimes
from agft_ray.types import Arm, Plan

DELAY_EXPONENTS = {"energy": 0.0, "edp": 1.0, "ed2p": 2.0}
OFFSETS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 15, 20])
"""Clocks of a phase that are considered at once: so many places from the present one."""
LONG_STEP = 1.0
"""A pair pays where a step with prefill lasts longer than so many clock changes."""


CURIOSITY = 0.004
"""What a clock not measured yet is worth trying for, as a share."""
TTFT_MARGINS = 4.0
"""Margins that predictions of TTFT, which are coarser, stay below its bound."""


@dataclass(frozen=True, slots=True)
class Models:
    """All that a choice is made by."""

    prefill: StepTimes
    decode: StepTimes
    powers: Powers
    load: Load
    switch_s: float
    """Time from the knowledge that a prompt is there until its clock is."""
    gpus: int
    """Set as one."""


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
    config: PhasesConfig, models: Models, arms: Sequence[int], now: Plan, may: tuple[bool, bool]
) -> Choice | None:
    """The best plan; None where nothing but default clocks keeps the bounds. `may` says of which
    phases, prefill and decode, enough is known to leave their highest clock."""
    top, lowest = max(arms), min(arms)
    one = uses_one_clock(config, models)
    grid = _candidates(config, models, arms, now, may, one)
    latency = LatencyModel(models.load, models.switch_s)
    costs, ratios = _predict(config, models, latency, grid, top, lowest)
    explores = (grid.prefill < models.prefill.lowest_mhz) | (grid.decode < models.decode.lowest_mhz)
    # What is not measured is predicted at its worst: there the margin is not needed.
    margin = np.where(explores, 0.0, config.margin)
    fits = _within(config, models.load, latency, ratios, margin)
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


def uses_one_clock(config: PhasesConfig, models: Models) -> bool:
    """Prefill and decode share a clock: by settings, as several GPUs would have to change at once,
    or as steps are too short for a change."""
    if config.clocks != "auto":
        return config.clocks == "one"
    step_s = models.load.prefill_step_s
    return models.gpus > 1 or 0 < step_s < LONG_STEP * models.switch_s


def _candidates(
    config: PhasesConfig, models: Models, arms: Sequence[int], now: Plan,
    may: tuple[bool, bool], one: bool,
) -> _Grid:  # fmt: skip
    ordered = np.array(sorted(arms), dtype=float)
    both = (models.prefill, now.prefill, may[0]), (models.decode, now.decode, may[1])
    prefill, decode = (_reachable(config, ordered, *each) for each in both)
    kinds = np.array([IDLE_DEFAULT, IDLE_LOWEST, IDLE_LAST])
    if one:
        lowest = max(prefill[0], decode[0])
        common = np.union1d(prefill, decode)
        common = common[common >= lowest]
        clocks, idle = np.meshgrid(common, kinds, indexing="ij")
        return _Grid(clocks.ravel(), clocks.ravel(), idle.ravel())
    p, d, idle = np.meshgrid(prefill, decode, kinds, indexing="ij")
    return _Grid(p.ravel(), d.ravel(), idle.ravel())


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
    config: PhasesConfig, models: Models, latency: LatencyModel, grid: _Grid,
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
    return watts * likely.e2e ** DELAY_EXPONENTS[config.objective], ratios


def _within(
    config: PhasesConfig, load: Load, latency: LatencyModel, ratios: Ratios, margin: np.ndarray
) -> np.ndarray:
    seen = latency.seen
    fits = np.ones(ratios.tpot.shape, dtype=bool)
    for ratio, now, latest_s, slo_s, margins in (
        (ratios.ttft, seen.ttft, load.ttft_s, config.ttft_slo_s, TTFT_MARGINS),
        (ratios.tpot, seen.tpot, load.tpot_s, config.tpot_slo_s, 1.0),
        (ratios.e2e, seen.e2e, load.e2e_s, config.e2e_slo_s, 1.0),
    ):
        limit = 1.0 + config.bound - margins * margin
        if slo_s is not None and latest_s > 0:
            limit = np.maximum(1.0, slo_s / (latest_s / float(now[0])) - margins * margin)
        fits &= ratio <= limit
    return fits


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
