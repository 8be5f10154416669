"""Policies x seeds of one scenario: which runs are needed, and what is chosen from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from agft_ray.errors import AgftError
from agft_ray.results.comparison import with_regret
from agft_ray.results.labels import BEST_STATIC, BEST_STEPS, DEFAULT, FRONTIER, ORACLE_PAIR
from agft_ray.results.record import RunRecord
from agft_ray.study.best_steps import perform_best_steps
from agft_ray.study.oracle import Axes, Oracle, OracleObjective
from agft_ray.study.policy_specs import SEARCHES, PolicySpec, parse_policy
from agft_ray.study.pool import OnProgress, Pool, Report
from agft_ray.study.run import Job, Run, measure, perform
from agft_ray.study.scenario import Scenario
from agft_ray.study.static import best_static, fixed_jobs

R = TypeVar("R")
WORTH_SPREADING_S = 10_000.0
"""Simulated seconds of all replicas together from which a run lasts longer than processes take to
start."""
OnPhase = Callable[[str, int], OnProgress]
"""Told a phase's name and its number of runs; says whom to tell how far they are."""


def run_folder(folder: Path, label: str, seed: int) -> Path:
    """Where the rows of one run go."""
    name = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in label)
    return folder / name / f"seed-{seed}"


@dataclass(slots=True)
class Study:
    """What `agft-ray simulate` was asked for, and the records so far.

    `run` fills `records` phase by phase, so that an interrupted study has what was finished.
    """

    scenario: Scenario
    specs: Sequence[PolicySpec]
    seeds: Sequence[int]
    folder: Path | None = None
    """Where the rows of the named policies' runs go."""
    clock_step_mhz: int = 90
    oracle_step_mhz: int = 30
    oracle_objective: OracleObjective = "edp"
    processes: int = 1
    """How many may run at once: where there are fewer runs, their replicas are spread."""
    records: list[RunRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader of the results should know."""

    def run(self, pool: Pool, on_phase: OnPhase) -> list[RunRecord]:
        """All records: default clocks first, then policies in their order, each by seed.

        The same study gives the same records on any pool. Raises `AgftError` for what is wrong
        with the scenario.
        """
        try:
            default = self._default(pool, on_phase)
            self._named(pool, on_phase, default)
            self._fixed(pool, on_phase, default)
            self._oracle(pool, on_phase, default)
            self._best_steps(pool, on_phase, default)
        finally:
            self.records = self._ordered(with_regret(self.records))
        return self.records

    def _wants(self, name: str) -> bool:
        return any(spec.label == name for spec in self.specs)

    def _job(self, spec: PolicySpec, seed: int, default: Run | None = None) -> Job:
        folder = self.folder and run_folder(self.folder, spec.label, seed)
        return Job(self.scenario, spec, seed, folder, default)

    def _spread(self, jobs: Sequence[Job]) -> list[Job]:
        """The same, over all processes if there are fewer jobs."""
        scenario = self.scenario
        replica_s = (scenario.duration_s or math.inf) * scenario.replicas
        if not jobs or replica_s < WORTH_SPREADING_S:
            return list(jobs)
        workers = max(1, self.processes // len(jobs))
        return [replace(job, workers=workers) for job in jobs]

    def _default(self, pool: Pool, on_phase: OnPhase) -> dict[int, Run]:
        jobs = [self._job(parse_policy(DEFAULT), seed) for seed in self.seeds]
        runs = _all(pool, perform, self._spread(jobs), on_phase("default clocks", len(jobs)))
        found = {seed: run for seed, run in zip(self.seeds, runs, strict=True) if run is not None}
        self.records += [run.record for run in found.values()]
        for seed, run in found.items():
            if not run.record.requests:
                raise AgftError(
                    f"seed {seed}: no request was served; lengthen --duration, or raise --keep or "
                    "--rate"
                )
        if failed := sum(run.record.failed for run in found.values()):
            self.notes.append(
                f"{failed} requests of {len(found)} runs exceed max_model_len and were rejected."
            )
        return found

    def _named(self, pool: Pool, on_phase: OnPhase, default: dict[int, Run]) -> None:
        specs = [spec for spec in self.specs if spec.settings and spec.label != DEFAULT]
        jobs = [self._job(spec, seed, default[seed]) for spec in specs for seed in self.seeds]
        for _, record in pool(measure, self._spread(jobs), on_phase("policies", len(jobs))):
            if record is not None:
                self.records.append(record)

    def _fixed(self, pool: Pool, on_phase: OnPhase, default: dict[int, Run]) -> None:
        if not (self._wants(FRONTIER) or self._wants(BEST_STATIC)):
            return
        jobs = [
            job
            for seed in self.seeds
            for job in fixed_jobs(self._template(seed), default[seed], self.clock_step_mhz)
        ]
        runs = _all(pool, measure, jobs, on_phase("fixed clocks", len(jobs)))
        found = [run for run in runs if run is not None]
        if drowned := len(runs) - len(found):
            self.notes.append(
                f"{drowned} runs at the lowest fixed clocks could not keep up and were left out."
            )
        if self._wants(FRONTIER):
            have = {(record.policy, record.seed) for record in self.records}
            self.records += [r for r in found if (r.policy, r.seed) not in have]
        if self._wants(BEST_STATIC):
            chosen = (best_static(r for r in found if r.seed == seed) for seed in self.seeds)
            self.records += [record for record in chosen if record is not None]

    def _oracle(self, pool: Pool, on_phase: OnPhase, default: dict[int, Run]) -> None:
        if not self._wants(ORACLE_PAIR):
            return

        def measured(jobs: Sequence[Job]) -> list[RunRecord | None]:
            return _all(pool, measure, jobs, on_phase(ORACLE_PAIR, len(jobs)))

        scenario = self.scenario
        found = Oracle(
            templates={seed: self._template(seed) for seed in default},
            defaults=default,
            axes=Axes.of(scenario.profile(), scenario.model, self.oracle_step_mhz),
            objective=self.oracle_objective,
            measure=measured,
        ).best()
        self.records += found
        if not found:
            self.notes.append("oracle_pair: no plan of clocks keeps the bounds.")

    def _best_steps(self, pool: Pool, on_phase: OnPhase, default: dict[int, Run]) -> None:
        if self._wants(BEST_STEPS):
            jobs = [replace(self._template(s), default=default[s]) for s in self.seeds]
            on_progress = on_phase(BEST_STEPS, len(jobs))
            found: list[RunRecord] = _all(pool, perform_best_steps, jobs, on_progress)
            self.records += [_without_clock_regret(record) for record in found]

    def _template(self, seed: int) -> Job:
        return Job(self.scenario, parse_policy(DEFAULT), seed)

    def _ordered(self, records: Sequence[RunRecord]) -> list[RunRecord]:
        """Default clocks, named policies in their order, the static frontier by clock, searches."""
        labels = [spec.label for spec in self.specs if spec.settings]
        order = {label: place for place, label in enumerate(dict.fromkeys([DEFAULT, *labels]))}
        last = {label: len(order) + 1 + place for place, label in enumerate(SEARCHES)}
        seeds = {seed: place for place, seed in enumerate(self.seeds)}

        def key(record: RunRecord) -> tuple[int, int, int]:
            place = (order | last).get(record.policy, len(order))
            clock = int(record.policy.partition(":")[2]) if place == len(order) else 0
            return place, clock, seeds[record.seed or 0]

        return sorted(records, key=key)


def _without_clock_regret(record: RunRecord) -> RunRecord:
    """Of what was never run."""
    return replace(
        record,
        energy_regret_j=None,
        energy_regret=None,
        windows_to_low_regret=None,
        windows_over_bound=None,
    )


def _all(
    pool: Pool, work: Callable[[Any, Report], R], jobs: Sequence[Any], on_progress: OnProgress
) -> list[R]:
    """The results in the order of the jobs, whichever is done first."""
    results: dict[int, R] = dict(pool(work, jobs, on_progress))
    return [results[number] for number in range(len(jobs))]
