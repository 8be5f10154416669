"""A load test against a profile: each line simulated, and how far the profile is off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agft_ray.calibration.load_run import Arrivals, Load, LoadResult, run_load
from agft_ray.calibration.load_table import QUANTITIES, LoadRow
from agft_ray.errors import ConfigError
from agft_ray.simulation.physics import idle_power_w
from agft_ray.simulation.profiles import GpuProfile

Array = NDArray[np.float64]

REQUESTS = 200
"""Simulated of each line; its p99 is then good to some 5 % over three seeds."""
SEEDS = (0, 1, 2)
SEEDS_A_LINE = 100
"""How far apart the seeds of two lines are, where each has arrivals of its own."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """One measured number of a line, and what the simulator says."""

    row: LoadRow
    quantity: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.simulated / self.measured - 1.0


@dataclass(frozen=True, slots=True)
class Quality:
    """How well one quantity is reproduced, over all lines that have it."""

    count: int
    mean_absolute: float
    """Mean relative error, regardless of sign."""
    mean: float
    """Mean relative error."""
    worst: Misfit


@dataclass(frozen=True, slots=True)
class Change:
    """A lower clock against the highest one at equal load, relative."""

    sm_clock_mhz: int
    reference_sm_clock_mhz: int
    rate_per_s: float
    quantity: str
    measured: float
    simulated: float


@dataclass(frozen=True, slots=True)
class LoadCheck:
    """All measured numbers of a load test beside the simulated ones."""

    misfits: tuple[Misfit, ...]

    def of(self, quantity: str) -> list[Misfit]:
        """Those of one quantity, in the order of the lines."""
        return [misfit for misfit in self.misfits if misfit.quantity == quantity]

    def quality(self) -> dict[str, Quality]:
        """By quantity, those that were measured."""
        found = {}
        for quantity in QUANTITIES:
            if misfits := self.of(quantity):
                errors = np.array([misfit.error for misfit in misfits])
                found[quantity] = Quality(
                    count=len(misfits),
                    mean_absolute=float(np.abs(errors).mean()),
                    mean=float(errors.mean()),
                    worst=max(misfits, key=lambda misfit: abs(misfit.error)),
                )
        return found

    def changes(self, rates_per_s: Sequence[float] | None = None) -> list[Change]:
        """Each lower clock against the highest at these rates (default: the highest clock's).

        Numbers between two measured rates are interpolated; a clock has no change at rates
        beyond those it was measured at. Loads of other lengths are not compared.
        """
        found: list[Change] = []
        for quantity in QUANTITIES:
            for curves in self._curves(quantity).values():
                reference = max(curves)
                rates = rates_per_s or [misfit.row.load.rate_per_s for misfit in curves[reference]]
                for clock in sorted(set(curves) - {reference}, reverse=True):
                    found.extend(_changes(quantity, curves, clock, reference, rates))
        return found

    def _curves(self, quantity: str) -> dict[tuple[int, int], dict[int, list[Misfit]]]:
        """Lengths -> locked clock -> lines, by rate."""
        curves: dict[tuple[int, int], dict[int, list[Misfit]]] = {}
        for misfit in sorted(self.of(quantity), key=lambda misfit: misfit.row.load.rate_per_s):
            load = misfit.row.load
            if load.sm_clock_mhz is not None and load.rate_per_s:
                lengths = load.prompt_tokens, load.output_tokens
                curves.setdefault(lengths, {}).setdefault(load.sm_clock_mhz, []).append(misfit)
        return curves


def _changes(
    quantity: str,
    curves: Mapping[int, list[Misfit]],
    clock: int,
    reference: int,
    rates_per_s: Sequence[float],
) -> Iterator[Change]:
    for rate in rates_per_s:
        low, high = _at(curves[clock], rate), _at(curves[reference], rate)
        if low is not None and high is not None:
            measured, simulated = low / high - 1.0
            yield Change(clock, reference, rate, quantity, float(measured), float(simulated))


def _at(curve: Sequence[Misfit], rate_per_s: float) -> Array | None:
    """Measured and simulated at a rate; None beyond the measured rates."""
    rates = [misfit.row.load.rate_per_s for misfit in curve]
    if not rates[0] * 0.999 <= rate_per_s <= rates[-1] * 1.001:
        return None
    columns = [misfit.measured for misfit in curve], [misfit.simulated for misfit in curve]
    return np.array([np.interp(rate_per_s, rates, column) for column in columns])


def check_load_table(
    rows: Sequence[LoadRow],
    gpu: GpuProfile,
    model: str,
    *,
    arrivals: Arrivals = "poisson",
    requests: int = REQUESTS,
    seeds: Sequence[int] = SEEDS,
    same_arrivals: bool = True,
) -> LoadCheck:
    """Simulate each line with every seed; means over the seeds.

    With the same arrivals at every clock, changes between clocks are exact, but all lines share
    the luck of these arrivals; with arrivals of each line's own it averages out over the lines.

    Raises `ConfigError` if the profile does not know the model or a line is not of this GPU.
    """
    check_rows(rows, gpu, model)
    misfits: list[Misfit] = []
    for index, row in enumerate(rows):
        own = 0 if same_arrivals else SEEDS_A_LINE * index
        runs = [
            simulated(row, gpu, model, arrivals=arrivals, requests=requests, seed=own + seed)
            for seed in seeds
        ]
        misfits.extend(
            Misfit(row, name, row.measured[name], float(value))
            for name, value in zip(row.measured, np.mean(runs, axis=0), strict=True)
        )
    return LoadCheck(tuple(misfits))


def simulated(
    row: LoadRow, gpu: GpuProfile, model: str, *, arrivals: Arrivals, requests: int, seed: int
) -> Array:
    """What the line measured, in the order of `row.measured`, as the profile has it."""
    if not row.load.rate_per_s:
        return np.array([_loaded_idle_w(row.load, gpu, model)])
    result = run_load(gpu, model, row.load, arrivals=arrivals, requests=requests, seed=seed)
    return np.array([_of(result, name) for name in row.measured])


def _loaded_idle_w(load: Load, gpu: GpuProfile, model: str) -> float:
    profile = gpu.model_profile(model)
    clock = load.sm_clock_mhz or gpu.governor.idle_sm_clock_mhz
    return profile.tensor_parallel * idle_power_w(gpu.power, clock, profile.spinning_activity)


def _of(result: LoadResult, quantity: str) -> float:
    if quantity == "power_w":
        return result.power_w
    kind, statistic, _ = quantity.split("_")
    values = result.ttft_s if kind == "ttft" else result.tpot_s
    if statistic == "mean":
        return float(values.mean())
    return float(np.quantile(values, int(statistic.removeprefix("p")) / 100.0))


def check_rows(rows: Sequence[LoadRow], gpu: GpuProfile, model: str) -> None:
    """Raise `ConfigError` with every line that cannot have been measured on this group."""
    parallel = gpu.model_profile(model).tensor_parallel
    low, high = gpu.min_sm_clock_mhz, gpu.max_sm_clock_mhz
    problems = []
    for row in rows:
        clock = row.load.sm_clock_mhz
        if clock is not None and not low <= clock <= high:
            problems.append(
                f"line {row.line}: sm_clock_mhz: {clock} is outside {low}..{high} MHz, the range "
                f"of {gpu.name}; say the card's own in a --card file"
            )
        if row.tensor_parallel not in (None, parallel):
            problems.append(
                f"line {row.line}: tensor_parallel: {row.tensor_parallel} is not {model}'s "
                f"{parallel}; choose a --model of this group, or describe it in a --card file"
            )
    if problems:
        raise ConfigError("load test", problems)
