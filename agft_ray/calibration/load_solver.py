"""Robust least squares over a noisy simulation: which numbers a load test determines, and to what.

A step of the solver costs one simulation of every line for each number, so it is frugal: numbers
are dropped by the linearised problem rather than by further fits. Needs scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from agft_ray.calibration.fitting import (
    MAX_RELATIVE_ERROR,
    Array,
    FittedNumber,
    least_squares,
    standard_errors,
)

Values = Mapping[str, float]
Simulate = Callable[[Values, bool], Array]
"""Values of all numbers, whether it may be quick -> what is measured, logarithms."""
Progress = Callable[[int, Array], None]
"""Called with the simulations so far and the residuals, in units of their usual error."""

MIN_NOISE = 0.1
"""Least scatter that is believed, in units of a quantity's usual error."""
MAX_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Free:
    """A number that may be fitted, in order of importance."""

    name: str
    base: float
    step: float
    """Of finite differences: its effect must stand out from how a p99 jumps with the arrivals, as
    jumps would pass for what tells one number from another."""
    low: float = 0.0
    high: float = math.inf
    missing: str | None = None
    """What the load test lacks to fit it."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The values found, with standard errors, and why others were kept."""

    values: Mapping[str, float]
    fitted: Mapping[str, FittedNumber]
    kept: Mapping[str, str]


@dataclass(slots=True)
class LoadSolver:
    """One fit. `measured` are logarithms, `sigma` their usual relative errors."""

    simulate: Simulate
    measured: Array
    sigma: Array
    parameters: Sequence[Free]
    progress: Progress
    kept: dict[str, str] = field(default_factory=dict)
    _runs: int = 0

    def solve(self) -> Solution:
        """Fit what is determined; the rest keeps the base's values."""
        base: Values = {p.name: p.base for p in self.parameters}
        self.kept.update({p.name: p.missing for p in self.parameters if p.missing is not None})
        free = [p for p in self.parameters if p.missing is None]
        while len(free) >= len(self.measured):
            self.kept[free.pop().name] = "too few measured numbers"
        # Numbers without any hold on the data would only wander: their like is dropped first.
        slopes = self._slopes(base, free)
        free = self._identified(base, base, free, slopes, noise=1.0, limit=2 * MAX_RELATIVE_ERROR)
        values: Values = base
        errors = np.zeros(0)
        while free:
            values, slopes, noise = self._fitted(values, free)
            errors = standard_errors(slopes, noise)
            left = self._identified(base, values, free, slopes, noise, MAX_RELATIVE_ERROR)
            if len(left) == len(free):
                break
            free = left
            values = {**base, **{p.name: values[p.name] for p in free}}
        found = {
            p.name: FittedNumber(values[p.name], float(error))
            for p, error in zip(free, errors, strict=True)
        }
        return Solution(values, found, self.kept)

    def _identified(
        self,
        base: Values,
        values: Values,
        free: Sequence[Free],
        slopes: Array,
        noise: float,
        limit: float,
    ) -> list[Free]:
        """Those left once none has too large an error, beside the others left.

        Of those with too large errors, the one goes first that lies nearest to the base's value, in
        its errors, and of equals the least known.
        """
        left = list(range(len(free)))
        far = [abs(values[p.name] - base[p.name]) for p in free]
        sizes = [max(values[p.name], p.base, p.step) for p in free]
        while left:
            errors = dict(zip(left, standard_errors(slopes[:, left], noise).tolist(), strict=True))
            vague = [i for i in left if errors[i] > limit * sizes[i]]
            if not vague:
                break
            order = {i: (round(far[i] / errors[i], 1), -errors[i] / sizes[i]) for i in vague}
            worst = min(vague, key=order.__getitem__)
            unused = math.isinf(errors[worst])
            self.kept[free[worst].name] = "does not matter here" if unused else "not identified"
            left.remove(worst)
        return [free[i] for i in left]

    def _fitted(self, values: Values, free: Sequence[Free]) -> tuple[Values, Array, float]:
        """The best values, the slopes there, and the scatter about them."""
        # Off the bound at 0, where the solver would hardly move.
        starts = [max(values[p.name], 2.0 * p.step) for p in free]
        scales = np.array(starts)

        def at(x: Array) -> Values:
            new = {p.name: float(v) for p, v in zip(free, x * scales, strict=True)}
            return {**values, **new}

        bounds = [
            np.array([p.low for p in free]) / scales,
            np.array([p.high for p in free]) / scales,
        ]
        result = least_squares()(
            lambda x: self._residuals(at(x)),
            np.clip(np.ones(len(free)), bounds[0] + 1e-6, bounds[1] - 1e-6),
            jac=lambda x: self._slopes(at(x), free) * scales,
            bounds=bounds,
            loss="soft_l1",
            max_nfev=MAX_ROUNDS,
            ftol=2e-3,
            xtol=3e-3,
        )
        noise = math.sqrt(2.0 * float(result.cost) / (len(self.measured) - len(free)))
        return at(result.x), np.asarray(result.jac) / scales, max(noise, MIN_NOISE)

    def _residuals(self, values: Values) -> Array:
        self._runs += 1
        residuals = (self.simulate(values, False) - self.measured) / self.sigma
        self.progress(self._runs, residuals)
        return residuals

    def _slopes(self, values: Values, free: Sequence[Free]) -> Array:
        """Of the residuals, by number; both ends of a step see the same arrivals."""
        here = self.simulate(values, True)
        columns = []
        for p in free:
            step = -p.step if values[p.name] + p.step > p.high else p.step
            there = self.simulate({**values, p.name: values[p.name] + step}, True)
            columns.append((there - here) / (step * self.sigma))
        return np.array(columns).T if columns else np.zeros((len(self.measured), 0))
