"""Fixed clocks on a grid: the static frontier, and the best of them in hindsight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from agft_ray.errors import ConfigError
from agft_ray.results.labels import BEST_STATIC
from agft_ray.results.record import RunRecord
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.study.policy_specs import fixed
from agft_ray.study.run import AbandonedError, Job, Run, Watch

MAX_DURATION = 1.5
"""A static clock that needs so many times default clocks' time for the trace is drowned."""


@dataclass(slots=True)
class DrownedWatch(Watch):
    """Abandons a run that takes longer than it may."""

    limit_s: float

    def on_time(self, t_s: float) -> None:
        """Look at the queue at this time."""
        if t_s > self.limit_s:
            raise AbandonedError


def clock_grid(profile: GpuProfile, step_mhz: int, option: str) -> tuple[int, ...]:
    """Supported clocks from the highest down, `step_mhz` apart, ascending.

    Raises `ConfigError` unless the step is a multiple of the GPU's own.
    """
    own = profile.sm_clock_step_mhz
    if step_mhz < own or step_mhz % own:
        raise ConfigError(
            option, [f"{step_mhz}: must be a multiple of {own} MHz, the step of {profile.name}"]
        )
    return tuple(sorted(range(profile.max_sm_clock_mhz, profile.min_sm_clock_mhz - 1, -step_mhz)))


def fixed_jobs(template: Job, default: Run, step_mhz: int) -> list[Job]:
    """Every fixed clock on the grid, each abandoned if it drowns."""
    watch = DrownedWatch(MAX_DURATION * default.record.duration_s)
    grid = clock_grid(template.scenario.profile(), step_mhz, "--clock-step-mhz")
    return [
        replace(template, spec=fixed(clock), default=default, watch=watch, folder=None)
        for clock in grid
    ]


def best_static(runs: Iterable[RunRecord]) -> RunRecord | None:
    """The fixed clock with the lowest EDP."""
    best = min((run for run in runs if run.edp_j_s is not None), key=_edp, default=None)
    if best is None:
        return None
    return replace(best, policy=BEST_STATIC, choice=best.policy.partition(":")[2])


def _edp(run: RunRecord) -> float:
    assert run.edp_j_s is not None
    return run.edp_j_s
