"""One run of one policy in virtual time, from a picklable job to its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agft_ray.config import StrictModel
from agft_ray.evaluation.convergence import FleetWindows, windows_to_converge, worst_tpot_ratio
from agft_ray.evaluation.policy_specs import DEFAULT, PolicySpec
from agft_ray.evaluation.pool import Report
from agft_ray.evaluation.run_record import RunRecord
from agft_ray.evaluation.run_rows import RunRows, run_rows
from agft_ray.evaluation.scenario import Scenario
from agft_ray.evaluation.virtual_time import FleetSetup, FleetTotals, run_fleet
from agft_ray.policy.default import DefaultConfig
from agft_ray.policy.step import StepGovernor
from agft_ray.types import RequestTimings


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its record and its windows, which other runs are compared with."""

    record: RunRecord
    windows: FleetWindows


class Abandoned(Exception):  # noqa: N818: it is no error
    """Raised by a watch when a run need not go on: it cannot be the answer any more."""


class Watch:
    """Looks at a run while it goes on; the base lets everything pass."""

    def on_request(self, timings: RequestTimings) -> None:
        """A request is answered; may raise `Abandoned`."""

    def on_time(self, t_s: float) -> None:
        """Simulated time has come to `t_s`; may raise `Abandoned`."""


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
                scenario.requests(job.seed),
                fleet_setup(scenario, job.spec, job.seed),
                on_request=on_request,
                on_window=rows.on_window,
                on_progress=on_progress,
            )
        except Abandoned:
            return None
        return _run(job, rows, totals)


def fleet_setup(scenario: Scenario, spec: PolicySpec, seed: int) -> FleetSetup:
    """The fleet of one run."""
    assert spec.settings is not None
    governor = step_governor(spec.settings) if spec.is_step_governor else None
    policy = DefaultConfig() if governor else spec.settings
    return FleetSetup(
        gpu=scenario.profile(),
        model=scenario.model,
        engine=scenario.engine,
        tuner=scenario.tuner(policy),
        governor=governor,
        replicas=scenario.replicas,
        router=scenario.router,
        seed=seed,
        duration_s=scenario.duration_s or 0.0,
        grid_s=scenario.window_s,
    )


def step_governor(settings: StrictModel) -> Callable[[int], StepGovernor]:
    """Makes one for each replica."""
    return partial(_build_governor, settings)


def _build_governor(settings: StrictModel, replica: int) -> StepGovernor:
    raise NotImplementedError


def _run(job: Job, rows: RunRows, totals: FleetTotals) -> Run:
    windows = rows.windows()
    learning: dict[str, Any] = {"windows_to_converge": None}
    default = windows if job.spec.label == DEFAULT else job.default and job.default.windows
    if default is not None:
        converged = windows_to_converge(windows, default)
        worst = worst_tpot_ratio(windows, default, converged)
        learning = {"windows_to_converge": converged, "worst_exploration_tpot_ratio": worst}
    return Run(_record(job, rows, totals, learning), windows)


def _record(job: Job, rows: RunRows, totals: FleetTotals, learning: dict[str, Any]) -> RunRecord:
    scenario, energy_j = job.scenario, totals.energy_j
    latencies = rows.distributions()
    mean_e2e_s = latencies["e2e_s"].mean
    judged = rows.requests + totals.rejected
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
        edp_j_s=None if mean_e2e_s is None else energy_j * mean_e2e_s,
        slo_attainment=_ratio(rows.kept_slo, judged) if scenario.request_slo else None,
        clock_changes=totals.clock_changes,
        failed=totals.rejected,
        prompt_tokens=totals.prompt_tokens,
        sm_clock_mhz=rows.sm_clock_mhz,
        keep=scenario.keep,
        router=scenario.router,
        slo_ttft_s=scenario.slo.ttft_s,
        slo_tpot_s=scenario.slo.tpot_s,
        **latencies,
        **learning,
    )


def _ratio(value: float, per: float) -> float | None:
    return value / per if per else None
