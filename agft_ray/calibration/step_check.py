"""Measured steps against a profile, without a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agft_ray.calibration.calibrate import check_clocks, step_work
from agft_ray.calibration.measurements import Measurement
from agft_ray.simulation.physics import (
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    step_time_s,
)
from agft_ray.simulation.profiles import GpuProfile


@dataclass(frozen=True, slots=True)
class StepMisfit:
    """One measured number of a line, and what the profile says."""

    row: Measurement
    quantity: str
    """`power_w` of one GPU, or `step_ms`."""
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.simulated / self.measured - 1.0


def check_steps(rows: Sequence[Measurement], gpu: GpuProfile, model: str) -> list[StepMisfit]:
    """All measured numbers beside the profile's, within its power cap.

    Raises `ConfigError` if the profile does not know the model or a clock is outside its range.
    """
    check_clocks(rows, gpu)
    return [misfit for row in rows for misfit in _misfits(row, gpu, model)]


def _misfits(row: Measurement, gpu: GpuProfile, model: str) -> Iterator[StepMisfit]:
    profile = gpu.model_profile(model)
    work = step_work(row, profile)
    clock = int(row.sm_clock_mhz)
    if row.phase == "idle":
        power_w = idle_power_w(gpu.power, clock, profile.spinning_activity)
    else:
        clock = effective_sm_clock_mhz(gpu, profile, work, clock)
        power_w = busy_power_w(gpu, profile, work, clock)
    if row.power_w is not None:
        yield StepMisfit(row, "power_w", row.power_w, power_w)
    if row.step_ms is not None:
        yield StepMisfit(row, "step_ms", row.step_ms, 1e3 * step_time_s(profile, work, clock))
