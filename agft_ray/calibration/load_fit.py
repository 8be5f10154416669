"""A GPU profile fitted to a load test of a running server, through the simulator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agft_ray.calibration.assembling import assembled
from agft_ray.calibration.fitting import Array, FittedNumber, replaced, value_at
from agft_ray.calibration.load_check import (
    REQUESTS,
    SEEDS,
    SEEDS_A_LINE,
    LoadCheck,
    check_load_table,
    check_rows,
    simulated,
)
from agft_ray.calibration.load_run import Arrivals
from agft_ray.calibration.load_solver import Free, LoadSolver, Solution, Values
from agft_ray.calibration.load_table import LATENCIES, LoadRow
from agft_ray.config import StrictModel
from agft_ray.errors import ConfigError
from agft_ray.simulation.profiles import GpuProfile, ModelProfile, PowerProfile, UtilizationDecode

USUAL_ERRORS = {
    "power_w": 0.05,
    "ttft_mean_s": 0.08,
    "ttft_p50_s": 0.08,
    "ttft_p99_s": 0.15,
    "tpot_mean_s": 0.05,
    "tpot_p50_s": 0.05,
    "tpot_p99_s": 0.10,
}
"""Relative: what each counts for in the fit. Percentiles of some hundred requests are noisy."""

_SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class LoadCalibration:
    """A new profile, and how it came about."""

    profile: GpuProfile
    model: str
    base: str
    fitted: Mapping[str, FittedNumber]
    """By dotted path in the profile."""
    kept: Mapping[str, str]
    """Path -> why it is as in the base."""
    before: LoadCheck
    """The base against the measurements."""
    after: LoadCheck


@dataclass(frozen=True, slots=True)
class LoadTest:
    """How a load test is simulated."""

    rows: Sequence[LoadRow]
    arrivals: Arrivals = "poisson"
    requests: int = REQUESTS

    def check(self, gpu: GpuProfile, model: str, *, other_arrivals: bool = False) -> LoadCheck:
        """All lines on this profile; or with arrivals that no fit has seen, each line its own."""
        return check_load_table(
            self.rows,
            gpu,
            model,
            arrivals=self.arrivals,
            requests=self.requests,
            seeds=[seed + 50 for seed in SEEDS] if other_arrivals else SEEDS,
            same_arrivals=not other_arrivals,
        )


class _Part(StrictModel):
    """What may be fitted."""

    power: PowerProfile
    model: ModelProfile


def calibrate_load(
    test: LoadTest,
    base: GpuProfile,
    model: str,
    *,
    name: str,
    progress: Callable[[str], None] = lambda text: None,
) -> LoadCalibration:
    """Fit step times and power of `base` to a load test of one LLM.

    Every line is simulated with arrivals of its own, the same ones throughout the fit. What the
    test does not determine keeps the base's value. `progress` is called with one line of text at
    each step of the solver.

    Raises `ConfigError` if the base does not know the model, a line is not of this GPU or there is
    too little to fit; `AgftError` without scipy.
    """
    check_rows(test.rows, base, model)
    if len(test.rows) < 3:
        raise ConfigError("load test", [f"{len(test.rows)} lines: at least 3 are needed to fit"])
    part = _Part(power=base.power, model=base.models[model])
    solution = _solver(test, base, part, model, progress).solve()
    for path, number in solution.fitted.items():
        part = replaced(part, path, number.value)
    paths = {path: _full_path(path, model) for path in (*solution.fitted, *solution.kept)}
    fitted = {paths[path]: number for path, number in solution.fitted.items()}
    profile = assembled(base, part.power, (model, part.model), name, fitted)
    return LoadCalibration(
        profile=profile,
        model=model,
        base=base.name,
        fitted=fitted,
        kept={paths[path]: reason for path, reason in solution.kept.items()},
        before=test.check(base, model, other_arrivals=True),
        after=test.check(profile, model, other_arrivals=True),
    )


def _full_path(path: str, model: str) -> str:
    return f"models.{model}.{path.removeprefix('model.')}" if path.startswith("model.") else path


def _solver(
    test: LoadTest,
    base: GpuProfile,
    part: _Part,
    model: str,
    progress: Callable[[str], None],
) -> LoadSolver:
    names = [name for row in test.rows for name in row.measured]
    sigma = np.array([USUAL_ERRORS[name] for name in names])

    def simulate(values: Values, quick: bool) -> Array:
        tried = part
        for path, value in values.items():
            tried = replaced(tried, path, value)
        gpu = base.model_copy(update={"power": tried.power, "models": {model: tried.model}})
        seeds = SEEDS[:1] if quick else SEEDS
        means = [
            np.mean(
                [_run(test, row, gpu, model, SEEDS_A_LINE * i + seed) for seed in seeds], axis=0
            )
            for i, row in enumerate(test.rows)
        ]
        logarithms: Array = np.log(np.concatenate(means))
        return logarithms

    def tell(runs: int, residuals: Array) -> None:
        progress(f"fit {runs}: {_errors(names, np.exp(residuals * sigma) - 1.0)}")

    return _Rounded(
        simulate=simulate,
        measured=np.log([row.measured[name] for row in test.rows for name in row.measured]),
        sigma=sigma,
        parameters=list(_parameters(test.rows, part)),
        progress=tell,
    )


class _Rounded(LoadSolver):
    """Its numbers as they are written."""

    def solve(self) -> Solution:
        found = LoadSolver.solve(self)
        rounded = {
            path: replace(number, value=float(f"{number.value:.{_SIGNIFICANT_DIGITS}g}"))
            for path, number in found.fitted.items()
        }
        return replace(found, fitted=rounded)


def _run(test: LoadTest, row: LoadRow, gpu: GpuProfile, model: str, seed: int) -> Array:
    return simulated(row, gpu, model, arrivals=test.arrivals, requests=test.requests, seed=seed)


def _errors(names: Sequence[str], errors: Array) -> str:
    """Mean absolute errors by quantity, as one line."""
    shown = [name for name in USUAL_ERRORS if name in names]
    chosen = {name: [other == name for other in names] for name in shown}
    return ", ".join(f"{name} {np.abs(errors[chosen[name]]).mean():.1%}" for name in shown)


def _parameters(rows: Sequence[LoadRow], part: _Part) -> Iterator[Free]:
    """In order of importance."""
    yield from _time_parameters(_Lacks.of(rows, part), part)
    yield from _power_parameters(_Lacks.of(rows, part), part)


def _time_parameters(lacks: _Lacks, part: _Part) -> Iterator[Free]:
    weights_ms, token_ms = part.model.weights_ms, part.model.token_ms
    clocks = lacks.latency or lacks.two_clocks
    group = lacks.latency or lacks.group
    yield _free(part, "model.weights_ms", 0.04 * weights_ms, low=1e-3, missing=lacks.latency)
    yield _free(part, "model.token_ms", 0.04 * token_ms, low=1e-6, missing=lacks.latency)
    yield _free(part, "model.host_ms", 0.03 * weights_ms, missing=lacks.latency)
    yield _free(part, "model.issue_share", 0.03, low=0.02, high=1.0, missing=clocks)
    yield _free(part, "model.prefill_host_ms", 0.1 * weights_ms, missing=lacks.ttft)
    yield _free(part, "model.all_reduce_token_ms", 0.1 * token_ms, missing=group)
    yield _free(part, "model.clock_exponent", 1.5, low=1.0, high=50.0, missing=clocks)
    yield _free(part, "model.all_reduce_ms", 0.03 * weights_ms, missing=group)


def _power_parameters(lacks: _Lacks, part: _Part) -> Iterator[Free]:
    # Power is smooth: small steps do.
    clocks = lacks.power or lacks.two_clocks
    yield _free(part, "power.busy_clock_w", 5.0, missing=lacks.power)
    yield _free(part, "power.busy_base_w", 5.0, missing=lacks.power)
    if part.model.tensor_parallel > 1:
        yield _free(part, "model.spinning_activity", 0.003, high=1.0, missing=clocks)
    yield _free(part, "power.idle_base_w", 5.0, missing=lacks.power)
    yield _free(part, "power.idle_clock_w", 3.0, missing=lacks.power or lacks.idle)
    yield _free(part, "power.voltage_rise", 0.02, missing=lacks.power or lacks.four_clocks)
    if isinstance(part.power.decode, UtilizationDecode):
        yield _free(part, "power.decode.memory_w", 5.0, missing=lacks.power)


def _free(
    part: _Part,
    path: str,
    step: float,
    *,
    low: float = 0.0,
    high: float = math.inf,
    missing: str | None,
) -> Free:
    return Free(path, value_at(part, path), step, low=low, high=high, missing=missing)


@dataclass(frozen=True, slots=True)
class _Lacks:
    """Why numbers of a kind cannot be fitted to a load test; None if they can."""

    power: str | None
    latency: str | None
    ttft: str | None
    idle: str | None
    two_clocks: str | None
    four_clocks: str | None
    group: str | None

    @classmethod
    def of(cls, rows: Sequence[LoadRow], part: _Part) -> _Lacks:
        found = {name for row in rows for name in row.measured}
        clocks = len({row.load.sm_clock_mhz for row in rows})
        idle = len({row.load.sm_clock_mhz for row in rows if not row.load.rate_per_s})
        return cls(
            power=None if "power_w" in found else "no power was measured",
            latency=None if found & set(LATENCIES) else "no latency was measured",
            ttft=None if found & set(LATENCIES[:3]) else "no TTFT was measured",
            idle=None if idle >= 2 else "fewer than two idle lines (rate 0) at different clocks",
            two_clocks=None if clocks >= 2 else "one clock only",
            four_clocks=None if clocks >= 4 else "fewer than four clocks",
            group=None if part.model.tensor_parallel > 1 else "one GPU",
        )
