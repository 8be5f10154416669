"""One run of one policy in virtual time, from a picklable job to its record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from agft_ray.policy.baselines.default import DefaultConfig
from agft_ray.policy.registry import GovernorConfig, build_governor
from agft_ray.policy.step import StepGovernor
from agft_ray.results.labels import DEFAULT
from agft_ray.results.learning import FleetWindows, worst_tpot_ratio
from agft_ray.results.record import RunRecord
from agft_ray.study.policy_specs import PolicySpec, is_governor
from agft_ray.study.pool import Report
from agft_ray.study.rows import RunRows, run_rows
from agft_ray.study.scenario import Scenario
from agft_ray.virtual.run import FleetSetup, FleetTotals, run_fleet
from agft_ray.workloads.requests import Request, RequestTimings

KEPT = 32
"""Seeds whose requests a process keeps."""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its record and its windows, which other runs are compared with."""

    record: RunRecord
    windows: FleetWindows


class AbandonedError(Exception):
    """Raised by a watch when a run need not go on: it cannot be the answer any more."""


class Watch:
    """Looks at a run while it goes on; the base lets everything pass."""

    def on_request(self, timings: RequestTimings) -> None:
        """A request is answered; may raise `AbandonedError`."""

    def on_time(self, t_s: float) -> None:
        """Simulated time has come to `t_s`; may raise `AbandonedError`."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be had. `default` is the run at default clocks of the same scenario and seed."""

    scenario: Scenario
    spec: PolicySpec
    seed: int
    folder: Path | None = None
    """Where rows of requests and windows go."""
    default: Run | None = None
    watch: Watch | None = None
    workers: int = 1
    """Processes over which the fleet is spread."""
    keeps_requests: bool = False
    """The process keeps the requests in memory for further runs of them, as in a search."""


def perform(job: Job, report: Report) -> Run | None:
    """Simulate; None if the job's watch has abandoned the run.

    The same job gives the same result, whatever process it runs in. Raises `AgftError` for what is
    wrong with the scenario, and whatever `report` raises.
    """
    watch = job.watch or Watch()
    scenario = job.scenario

    def on_progress(t_s: float) -> None:
        watch.on_time(t_s)
        report(t_s)

    with run_rows(scenario.replicas, scenario.request_slo, job.folder) as rows:

        def on_request(replica: int, timings: RequestTimings) -> None:
            rows.on_request(replica, timings)
            watch.on_request(timings)

        try:
            totals = run_fleet(
                _requests(job),
                fleet_setup(scenario, job.spec, job.seed),
                workers=job.workers,
                on_request=on_request,
                on_window=rows.on_window,
                on_progress=on_progress,
            )
        except AbandonedError:
            return None
        return _run(job, rows, totals)


def _requests(job: Job) -> Iterable[Request]:
    if not job.keeps_requests:
        return job.scenario.requests(job.seed)
    return _kept_requests(job.scenario.model_dump_json(), job.seed)


@functools.lru_cache(maxsize=KEPT)
def _kept_requests(scenario: str, seed: int) -> tuple[Request, ...]:
    return tuple(Scenario.model_validate_json(scenario).requests(seed))


def measure(job: Job, report: Report) -> RunRecord | None:
    """`perform`, of which only the record is kept."""
    run = perform(job, report)
    return None if run is None else run.record


def fleet_setup(scenario: Scenario, spec: PolicySpec, seed: int) -> FleetSetup:
    """The fleet of one run."""
    settings = spec.settings
    assert settings is not None
    governor = _governors(settings) if is_governor(settings) else None
    return FleetSetup(
        gpu=scenario.profile(),
        model=scenario.model,
        engine=scenario.engine,
        tuner=scenario.tuner(DefaultConfig() if governor else settings),
        governor=governor,
        replicas=scenario.replicas,
        router=scenario.router,
        seed=seed,
        duration_s=scenario.duration_s or 0.0,
        grid_s=scenario.window_s,
        noise=scenario.noise,
    )


def _governors(settings: GovernorConfig) -> Callable[[int], StepGovernor]:
    """One for each replica; they learn separately."""
    return functools.partial(_governor, settings)


def _governor(settings: GovernorConfig, replica: int) -> StepGovernor:
    return build_governor(settings)


def _run(job: Job, rows: RunRows, totals: FleetTotals) -> Run:
    windows = rows.windows()
    record = _record(job, rows, totals)
    default = windows if job.default is None else job.default.windows
    if job.spec.label == DEFAULT or job.default is not None:
        worst = worst_tpot_ratio(windows, default, record.windows_to_low_regret)
        record = replace(record, worst_exploration_tpot_ratio=worst)
    return Run(record, windows)


def _record(job: Job, rows: RunRows, totals: FleetTotals) -> RunRecord:
    scenario, energy_j = job.scenario, totals.energy_j
    ttft_s, tpot_s, e2e_s = rows.distributions()
    judged = rows.requests + totals.rejected
    regret = rows.clock_regret()
    return RunRecord(
        policy=job.spec.label,
        gpu=scenario.gpu,
        model=scenario.model,
        trace=scenario.trace_name,
        seed=job.seed,
        replicas=scenario.replicas,
        requests=rows.requests,
        duration_s=totals.duration_s,
        energy_j=energy_j,
        mean_power_w=_ratio(energy_j, totals.duration_s * scenario.replicas),
        output_tokens=totals.output_tokens,
        energy_per_output_token_j=_ratio(energy_j, totals.output_tokens),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=e2e_s,
        edp_j_s=None if e2e_s.mean is None else energy_j * e2e_s.mean,
        slo_attainment=_ratio(rows.kept_slo, judged) if scenario.request_slo else None,
        clock_changes=totals.clock_changes,
        energy_regret_j=regret.energy_j,
        energy_regret=regret.relative,
        windows_to_low_regret=regret.windows_to_low,
        windows_over_bound=regret.over_bound,
        failed=totals.rejected,
        prompt_tokens=totals.prompt_tokens,
        sm_clock_mhz=rows.sm_clock_mhz,
        keep=scenario.keep,
        router=scenario.router,
        slo_ttft_s=scenario.slo.ttft_s,
        slo_tpot_s=scenario.slo.tpot_s,
        profile_change=scenario.profile_change,
        noise=scenario.noise,
        world=scenario.world,
    )


def _ratio(value: float, per: float) -> float | None:
    return value / per if per else None
