"""Least squares over some numbers of a settings model, keeping those the data do not identify.

Needs scipy (the extra `calibrate`), imported only when a fit is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from agft_ray.errors import AgftError

Array = NDArray[np.float64]
PartT = TypeVar("PartT", bound=BaseModel)

MAX_RELATIVE_ERROR = 0.5
"""A number whose standard error exceeds this share of it, or of the base's, is not identified."""
MIN_NOISE = 1e-3
"""Relative error that every measurement is taken to have at least."""

_SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that may be fitted."""

    name: str
    """Dotted, below the settings model that is fitted."""
    low: float = 0.0
    high: float = math.inf
    starts: tuple[float, ...] = ()
    """Where to start besides the base's value: the best end is taken."""
    missing: str | None = None
    """What the measurements lack to fit it."""


@dataclass(frozen=True, slots=True)
class FittedNumber:
    """A number that the measurements identify, with its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Fit:
    """How one quantity was fitted."""

    rows: int
    r2: float
    """Share of the variance explained; NaN if the measured values are all the same."""
    mape: float
    """Mean relative error."""
    worst: float
    """Largest relative error."""
    fitted: Mapping[str, FittedNumber]
    """By parameter name."""
    kept: Mapping[str, str]
    """Parameter left as in the base -> why."""


@dataclass(frozen=True, slots=True)
class _Solution(Generic[PartT]):
    part: PartT
    errors: Mapping[str, float]
    """Standard errors by name; infinite where a number has no effect."""
    cost: float
    """Half the sum of squared relative errors."""


def fit(
    base: PartT,
    parameters: Sequence[Parameter],
    predict: Callable[[PartT], Array],
    measured: Array,
) -> tuple[Fit, PartT]:
    """Minimise the relative errors of `predict` over the parameters that can be identified.

    While standard errors are too large, one of the numbers that have them goes back to the base's
    value, and the rest is fitted anew: the number that the fit misses least, and of those missed
    about as little the last. `parameters` come in order of importance. Raises `AgftError` without
    scipy.
    """
    kept = {p.name: p.missing for p in parameters if p.missing is not None}
    free = [p for p in parameters if p.missing is None]
    while len(free) >= len(measured):
        kept[free.pop().name] = "too few lines"
    solution = _solve(base, free, predict, measured)
    while vague := [p for p in free if not _is_identified(base, p, solution)]:
        without = {p.name: [other for other in free if other is not p] for p in vague}
        trials = {name: _solve(base, others, predict, measured) for name, others in without.items()}
        least = min(trial.cost for trial in trials.values())
        near = 1.1 * least + len(measured) * MIN_NOISE**2 / 2.0
        dropped = next(name for name in reversed(trials) if trials[name].cost <= near)
        unused = math.isinf(solution.errors[dropped])
        kept[dropped] = "does not matter here" if unused else "not identified"
        free, solution = without[dropped], trials[dropped]
    fitted = {
        p.name: FittedNumber(value_at(solution.part, p.name), solution.errors[p.name]) for p in free
    }
    return _quality(predict(solution.part), measured, fitted, kept), solution.part


def value_at(part: BaseModel, name: str) -> float:
    """The number at a dotted name."""
    value: Any = reduce(getattr, name.split("."), part)
    return float(value)


def replaced(part: PartT, name: str, value: float) -> PartT:
    """A copy of settings with the number at a dotted name changed, unchecked."""
    head, _, rest = name.partition(".")
    new: Any = replaced(getattr(part, head), rest, value) if rest else value
    return part.model_copy(update={head: new})


def _with_values(part: PartT, free: Sequence[Parameter], values: Array) -> PartT:
    for parameter, value in zip(free, values, strict=True):
        part = replaced(part, parameter.name, float(value))
    return part


def _is_identified(base: BaseModel, parameter: Parameter, solution: _Solution[Any]) -> bool:
    name = parameter.name
    scale = max(abs(value_at(solution.part, name)), abs(value_at(base, name)))
    return solution.errors[name] <= MAX_RELATIVE_ERROR * scale


def _solve(
    base: PartT, free: Sequence[Parameter], predict: Callable[[PartT], Array], measured: Array
) -> _Solution[PartT]:
    """The best fit, its numbers rounded."""
    if not free:
        errors = predict(base) / measured - 1.0
        return _Solution(base, {}, float(errors @ errors) / 2.0)
    solve = least_squares()

    def residuals(values: Array) -> Array:
        return predict(_with_values(base, free, values)) / measured - 1.0

    bounds = [p.low for p in free], [p.high for p in free]
    results = [
        solve(residuals, start, bounds=bounds, x_scale="jac") for start in _starts(base, free)
    ]
    best = min(results, key=lambda result: float(result.cost))
    variance = 2.0 * best.cost / (len(measured) - len(free))
    errors = standard_errors(best.jac, max(math.sqrt(variance), MIN_NOISE))
    values = np.array([float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in best.x])
    return _Solution(
        part=_with_values(base, free, values),
        errors=dict(zip((p.name for p in free), errors.tolist(), strict=True)),
        cost=float(best.cost),
    )


def _starts(base: BaseModel, free: Sequence[Parameter]) -> list[Array]:
    inside = [
        np.clip(value_at(base, p.name), p.low + 1e-9 * (1.0 + abs(p.low)), p.high - 1e-9)
        for p in free
    ]
    starts = [np.array(inside)]
    for index, parameter in enumerate(free):
        for value in parameter.starts:
            other = np.array(inside)
            other[index] = value
            starts.append(other)
    return starts


def standard_errors(jacobian: Array, noise: float) -> Array:
    norms = np.linalg.norm(jacobian, axis=0)
    used = norms > 1e-12
    errors = np.full(len(norms), math.inf)
    if used.any():
        _, singular, rows = np.linalg.svd(jacobian[:, used] / norms[used], full_matrices=False)
        singular = np.maximum(singular, 1e-9 * singular[0])
        errors[used] = noise * np.linalg.norm(rows / singular[:, None], axis=0) / norms[used]
    return errors


def _quality(
    predicted: Array, measured: Array, fitted: dict[str, FittedNumber], kept: dict[str, str]
) -> Fit:
    relative = np.abs(predicted / measured - 1.0)
    spread = float(((measured - measured.mean()) ** 2).sum())
    missed = float(((predicted - measured) ** 2).sum())
    return Fit(
        rows=len(measured),
        r2=1.0 - missed / spread if spread else math.nan,
        mape=float(relative.mean()),
        worst=float(relative.max()),
        fitted=fitted,
        kept=kept,
    )


def least_squares() -> Callable[..., Any]:
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise AgftError(
            "scipy is missing: calibration needs the extra 'calibrate': "
            "pip install 'agft-ray[calibrate]'"
        ) from None
    return cast(Callable[..., Any], least_squares)
