"""The oracle `oracle_pair`: the best constant pair of clocks on this very trace, in hindsight.

It stands outside the policy interface and looks into the simulator: it knows the trace, the power
cap and what every pair would have come to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from agft_ray.errors import ConfigError
from agft_ray.results.distribution import Distribution
from agft_ray.results.labels import BEST_STATIC, ORACLE_PAIR
from agft_ray.results.record import RunRecord
from agft_ray.settings import SloConfig
from agft_ray.simulation.physics import StepWork, effective_sm_clock_mhz
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.study.policy_specs import fixed, pair
from agft_ray.study.run import AbandonedError, Job, Run, Watch
from agft_ray.workloads.requests import RequestTimings

OracleObjective = Literal["edp", "energy"]
MAX_INCREASE = 0.10
"""How much TTFT, TPOT and E2E may exceed those of default clocks where there is no SLO."""
MAX_DURATION = 1.5
"""A static clock that needs so many times default clocks' time for the trace is drowned."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What the mean and the p99 of one latency may be at most, of so many requests."""

    count: int
    mean_s: float | None
    p99_s: float | None

    def allows(self, latency: Distribution) -> bool:
        """Whether the finished run kept it."""
        pairs = ((self.mean_s, latency.mean), (self.p99_s, latency.p99))
        return all(b is None or value is None or value <= b for b, value in pairs)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Latencies that a constant pair of clocks must keep."""

    ttft: Bound
    tpot: Bound
    e2e: Bound

    @classmethod
    def of(cls, default: RunRecord, slo: SloConfig) -> Bounds:
        """With an SLO: the p99 of TTFT and TPOT within it. Without one: mean and p99 of all three
        at most `MAX_INCREASE` above default clocks."""
        latencies = (default.ttft_s, default.tpot_s, default.e2e_s)
        if slo == SloConfig():
            return cls(*(_raised(latency) for latency in latencies))
        limits_s = (slo.ttft_s, slo.tpot_s, None)
        return cls(
            *(Bound(la.count, None, limit) for la, limit in zip(latencies, limits_s, strict=True))
        )

    def allow(self, record: RunRecord) -> bool:
        """Whether a finished run kept all of them."""
        checks = ((self.ttft, record.ttft_s), (self.tpot, record.tpot_s), (self.e2e, record.e2e_s))
        return all(bound.allows(latency) for bound, latency in checks)


def _raised(latency: Distribution) -> Bound:
    factor = 1.0 + MAX_INCREASE
    mean_s, p99_s = latency.mean, latency.p99
    return Bound(
        latency.count,
        None if mean_s is None else mean_s * factor,
        None if p99_s is None else p99_s * factor,
    )


class BoundsWatch(Watch):
    """Abandons a run that is certain to break a bound, however its remaining requests fare.

    The mean is broken once the sum exceeds what it may be for all requests; the p99 (between two
    order statistics) once so many requests are above it that the lower of the two must be.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._tracks = [_Track(bound) for bound in (bounds.ttft, bounds.tpot, bounds.e2e)]

    def on_request(self, timings: RequestTimings) -> None:
        """Count a finished request."""
        latencies_s = (timings.ttft_s, timings.tpot_s, timings.e2e_s)
        for track, latency_s in zip(self._tracks, latencies_s, strict=True):
            if latency_s is not None:
                track.take(latency_s)


class _Track:
    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._sum_s = 0.0
        self._above = 0
        self._too_many = bound.count - int(0.99 * max(bound.count - 1, 0))

    def take(self, latency_s: float) -> None:
        bound = self._bound
        self._sum_s += latency_s
        if bound.mean_s is not None and self._sum_s > bound.mean_s * bound.count * (1 + 1e-9):
            raise AbandonedError
        if bound.p99_s is not None and latency_s > bound.p99_s:
            self._above += 1
            if self._above >= self._too_many:
                raise AbandonedError


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


def pair_jobs(template: Job, default: Run, step_mhz: int) -> list[Job]:
    """Every pair of clocks on the grid, each abandoned when it breaks a bound.

    Clocks that the power cap makes alike are taken once: for steps with prefill, and for decode
    steps of a single sequence, which draw the least. They differ only in the 25 ms until a change
    of clock acts, when the lowest draws the least: that one is kept.
    """
    scenario = template.scenario
    profile = scenario.profile()
    grid = clock_grid(profile, step_mhz, "--oracle-step-mhz")
    bounds = Bounds.of(default.record, scenario.slo)
    return [
        replace(
            template,
            spec=pair(prefill, decode),
            default=default,
            watch=BoundsWatch(bounds),
            folder=None,
        )
        for prefill in distinct(grid, profile, scenario.model, StepWork(prefill_tokens=1))
        for decode in distinct(grid, profile, scenario.model, StepWork(0, 1, 1))
    ]


def distinct(
    clocks: Sequence[int], profile: GpuProfile, model: str, work: StepWork
) -> tuple[int, ...]:
    """The clocks that are different machines for such a step: the lowest of those that the power
    cap makes equal."""
    model_profile = profile.model_profile(model)
    effective: dict[int, int] = {}
    for clock in sorted(clocks):
        effective.setdefault(effective_sm_clock_mhz(profile, model_profile, work, clock), clock)
    return tuple(effective.values())


def best_static(runs: Iterable[RunRecord]) -> RunRecord | None:
    """The fixed clock with the lowest EDP."""
    best = min((run for run in runs if run.edp_j_s is not None), key=_edp, default=None)
    if best is None:
        return None
    return replace(best, policy=BEST_STATIC, choice=best.policy.partition(":")[2])


def oracle_pair(
    runs: Iterable[RunRecord], bounds: Bounds, objective: OracleObjective
) -> RunRecord | None:
    """The pair with the lowest EDP (or energy) of those within the bounds; None if none is."""
    key = _edp if objective == "edp" else _energy
    best = min(_allowed(runs, bounds), key=key, default=None)
    if best is None:
        return None
    return replace(best, policy=ORACLE_PAIR, choice=best.policy.partition(":")[2])


def _allowed(runs: Iterable[RunRecord], bounds: Bounds) -> Iterator[RunRecord]:
    return (run for run in runs if run.edp_j_s is not None and bounds.allow(run))


def _edp(run: RunRecord) -> float:
    assert run.edp_j_s is not None
    return run.edp_j_s


def _energy(run: RunRecord) -> float:
    assert run.energy_j is not None
    return run.energy_j
