"""Step time of a phase: `t = (b . w) h(f)`, b the cost of work w at default clocks, h the slowdown.

h is 1 at default clocks, does not fall as the clock does, and rises at most as 1/f: nothing on a
GPU slows faster than its clock. It is piecewise linear in f_max/f (a P-spline: Eilers and Marx,
Statistical Science 11(2), 1996: second differences of its values at knots are penalised), b a ridge
regression, fitted first. All is computed from sums by clock (`work.WorkSums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agft_ray.policy.phases.work import FEATURES, WorkSums

KNOTS = np.linspace(1.0, 4.0, 31)
"""Of f_max/f."""
ROUNDS = 3
RIDGE = 1e-4
"""Penalty on b as a share of its features' own weight."""
BEND = 0.04
"""Second difference of h between knots that is not unusual: a crossover has that of some. The
penalty weighs it against the spread of windows."""
NO_SCALES = (np.inf,) * FEATURES
DECODE_SCALES = (np.inf, 0.25, 1.0, np.inf)
"""Sixteen sequences more, or a full KV cache, lengthen a decode step by some such shares."""
LEAST_SPREAD = 1e-4
LEVEL = 1e-3
"""Pull of h to 1, in windows: only where nothing is known."""
DEFAULT_WEIGHT = 1e5
"""h is 1 at the highest clock as if so many windows had shown it: no lock is faster."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A fitted model of one phase. `clocks_mhz` and `slowdowns` are of what was measured."""

    costs: np.ndarray
    """b (4,), in s per unit of work at default clocks."""
    top_mhz: float
    clocks_mhz: np.ndarray
    """Measured with enough steps, ascending."""
    slowdowns: np.ndarray
    """h there."""
    curve: np.ndarray
    """h at the knots."""
    hope: np.ndarray
    """The lower end of h at the knots: near 1 where windows are too few for their spread."""
    edge: float = 1.0
    """h at the lowest clock measured, by its own windows where these say more than the curve: one
    that begins to rise there has not been seen to."""
    error: float = 0.0
    """Standard error of h, relative: of the mean time of the windows at default clocks."""

    def base_s(self, work: np.ndarray) -> float:
        """Time of this work at default clocks, in s."""
        return float(max(self.costs @ work, 0.0))

    @property
    def lowest_mhz(self) -> float:
        """The lowest clock measured; the highest there is if none was."""
        return float(self.clocks_mhz[0]) if len(self.clocks_mhz) else self.top_mhz

    def expected(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """h at clocks, as good a guess below the lowest one measured as above it."""
        clocks = np.minimum(clocks_mhz, self.top_mhz)
        return np.asarray(np.interp(self.top_mhz / clocks, KNOTS, self.curve))

    def lost(self, clocks_mhz: np.ndarray, before_mhz: np.ndarray) -> np.ndarray:
        """Share of the work that a step does less at the clock before its own is there."""
        return np.asarray(
            np.maximum(0.0, 1.0 - self._likely(clocks_mhz) / self._likely(before_mhz))
        )

    def _likely(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """h; below the lowest clock measured as 1/f from there, or where that still was as fast as
        default clocks (a power cap holds them down) as the root of it: the edge is not known yet.
        """
        inside = self.expected(np.maximum(clocks_mhz, self.lowest_mhz))
        falls = np.maximum(self.lowest_mhz / clocks_mhz, 1.0)
        is_edge_known = float(self.expected(np.array([self.lowest_mhz]))[0]) >= VISIBLE
        return np.asarray(inside * (falls if is_edge_known else np.sqrt(falls)))

    def hoped(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """The lower end of h at clocks: what makes it worth while to measure them."""
        clocks = np.minimum(clocks_mhz, self.top_mhz)
        return np.asarray(np.interp(self.top_mhz / clocks, KNOTS, self.hope))

    def slowdown(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """The upper end of h at clocks. Below the lowest one measured the worst that can be: as
        1/f, which is more than error, so that it has none on top."""
        lowest = self.lowest_mhz
        inside = self.expected(np.maximum(clocks_mhz, lowest)) * (1.0 + SIGMAS * self.error)
        worst = np.where(clocks_mhz < lowest, self.edge * lowest / clocks_mhz, inside)
        return np.asarray(np.clip(worst, 1.0, np.maximum(self.top_mhz / clocks_mhz, 1.0)))


VISIBLE = 1.01
"""A slowdown that is more than error."""
SIGMAS = 2.0
"""Standard errors of h up to its upper end."""
NEAR, SURE = 0.03, 0.02
"""Windows at clocks so near tell of h; an error of h of which it is sure enough."""
ALIKE = 0.012
"""Clocks that differ by less, as a share, are measured together."""


def fit(
    sums: WorkSums,
    top_mhz: float,
    min_steps: float,
    *,
    works: Sequence[np.ndarray] = (),
    scales: Sequence[float] = NO_SCALES,
) -> StepTimes:
    """The model of a phase from its sums; clocks with fewer steps are not taken as measured.

    Its error is the greatest at `works` (4,), or at the mean of default clocks' windows. `scales`
    (4,) is how large a cost b may be expected to be, in mean steps.
    """
    sums = sums.with_top(int(top_mhz))
    clocks = sums.clocks(top_mhz)
    basis = _hats(top_mhz / clocks)
    costs, gram = _costs(sums, scales)
    free, rest = _free_slowdowns(sums, costs)
    spread = _spread(sums, rest)
    curve = _curve(sums, costs, basis, spread)
    curve = _possible(curve)
    near = np.abs(np.log(clocks[:, None] / clocks[None, :])) < ALIKE
    near[:, 0] = False
    known = (near @ sums.steps >= min_steps) & (np.arange(len(clocks)) > 0)
    order = np.argsort(clocks[known])
    measured = clocks[known][order]
    variance = _default_variance(sums, float(rest[0]), spread)
    used = [work for work in works if costs @ work > 0] or [sums.grams[0] @ costs]
    error = max(_error(work, costs, variance * np.linalg.inv(gram)) for work in used)
    hope = _hope(curve, top_mhz / clocks, sums.windows, spread)
    smooth = (basis @ curve)[known][order]
    edge = _edge(smooth, free[known][order], sums.windows[known][order], spread)
    return StepTimes(costs, top_mhz, measured, smooth, curve, hope, edge, error)


def _edge(smooth: np.ndarray, free: np.ndarray, windows: np.ndarray, spread: float) -> float:
    """The greater of the curve and of what the lowest clock's own windows say, as they are known
    to `SURE`."""
    if not len(smooth):
        return 1.0
    weight = windows[0] / (windows[0] + spread / SURE**2)
    return float(smooth[0] + weight * max(0.0, free[0] - smooth[0]))


def _hope(curve: np.ndarray, x: np.ndarray, windows: np.ndarray, spread: float) -> np.ndarray:
    """h drawn to 1 as by so many windows as it takes to know it to `SURE`."""
    near = np.exp(-((np.log(KNOTS[:, None] / x[None, :]) / NEAR) ** 2)) @ windows
    return np.asarray(
        np.maximum.accumulate(1.0 + (curve - 1.0) * near / (near + spread / SURE**2 + 1e-9))
    )


def _free_slowdowns(sums: WorkSums, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best h of each clock for itself, and the squares that are left of the windows' relative
    times about it: as they are weighted by 1/t², without any fit these are their numbers."""
    squares = np.einsum("i,kij,j->k", costs, sums.grams, costs)
    pulls = sums.responses @ costs
    slowdowns = np.maximum(pulls / np.maximum(squares, 1e-12), 0.0)
    slowdowns[0] = 1.0
    rest = sums.windows - 2.0 * slowdowns * pulls + squares * slowdowns**2
    return slowdowns, np.maximum(rest, 0.0)


def _spread(sums: WorkSums, rest: np.ndarray) -> float:
    """Variance of a window's time about the fit, relative."""
    free = max(float(sums.windows.sum()) - FEATURES - len(rest), 1.0)
    return float(rest.sum()) / free


def _default_variance(sums: WorkSums, rest: float, spread: float) -> float:
    """Of a window's time at default clocks, relative. There no step loses time to a change of
    clock, so that they spread less; few of them are taken to spread as all."""
    return (rest + FEATURES * spread) / max(float(sums.windows[0]), 1.0)


def _error(work: np.ndarray, costs: np.ndarray, covariance: np.ndarray) -> float:
    """Of the time of this work at default clocks, which all h are relative to: large where default
    clocks have hardly seen its like, and 1 where nothing is known. sqrt(w' C w) / b w."""
    time_s = float(costs @ work)
    return float(np.sqrt(max(0.0, work @ covariance @ work))) / time_s if time_s > 0 else 1.0


def _hats(x: np.ndarray) -> np.ndarray:
    """Shares (K, knots) by which values at the knots are interpolated at x."""
    step = KNOTS[1] - KNOTS[0]
    x = np.clip(x, KNOTS[0], KNOTS[-1])
    return np.asarray(np.maximum(0.0, 1.0 - np.abs(x[:, None] - KNOTS[None, :]) / step))


def _costs(sums: WorkSums, scales: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """b, and what it is known by, the gram of its regression.

    Its size is from default clocks alone, its proportions from windows at any one clock too:
    Gauss-Newton on the squares with each clock's h free, which takes the direction of b out of its
    gram: a clock seen once says nothing of b. Else b would take for work what the clock has done.
    """
    default, locked = sums.grams[0], sums.grams[1:]
    per_s = float(sums.responses[0][0])
    step_s = float(sums.windows[0]) / per_s if per_s > 0 else 1.0
    expected = LEAST_SPREAD / (np.array(scales) * step_s) ** 2
    penalty = np.diag(RIDGE * np.diagonal(default) + RIDGE + expected)
    penalty[0, 0] = 1e-9
    costs = np.linalg.solve(default + penalty, sums.responses[0])
    for _ in range(ROUNDS):
        slowdowns, _ = _free_slowdowns(sums, costs)
        h = slowdowns[1:, None]
        times = locked @ costs
        squares = np.maximum(times @ costs, 1e-12)
        inner = h[:, :, None] ** 2 * (
            locked - times[:, :, None] * times[:, None, :] / squares[:, None, None]
        )
        gram = default + penalty + inner.sum(axis=0)
        rest = sums.responses[0] - (default + penalty) @ costs
        rest = rest + (h * (sums.responses[1:] - h * times)).sum(axis=0)
        costs = costs + np.linalg.solve(gram, rest)
    return costs, gram


def _curve(sums: WorkSums, costs: np.ndarray, basis: np.ndarray, spread: float) -> np.ndarray:
    weights = np.einsum("i,kij,j->k", costs, sums.grams, costs)
    pulls = sums.responses @ costs
    locked = basis[1:]
    left = locked.T @ (weights[1:, None] * locked)
    left += max(spread, LEAST_SPREAD) / BEND**2 * _SECOND + LEVEL * np.eye(len(KNOTS))
    left[0, 0] += DEFAULT_WEIGHT
    right = locked.T @ pulls[1:] + LEVEL
    right[0] += DEFAULT_WEIGHT
    return np.linalg.solve(left, right)


def _possible(curve: np.ndarray) -> np.ndarray:
    """Not below 1, never falling, and rising at most as x."""
    result = np.maximum.accumulate(np.maximum(curve, 1.0))
    for i in range(1, len(result)):
        result[i] = min(result[i], result[i - 1] * KNOTS[i] / KNOTS[i - 1])
    return result


def _second_differences() -> np.ndarray:
    second = np.diff(np.eye(len(KNOTS)), 2, axis=0)
    return np.asarray(second.T @ second)


_SECOND = _second_differences()
