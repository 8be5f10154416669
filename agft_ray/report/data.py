"""What a report is made of: records, and rows where there are any, grouped by scenario."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agft_ray.errors import AgftError
from agft_ray.files import RUNS_FILE, STUDY_FILE
from agft_ray.results.labels import DEFAULT
from agft_ray.results.learning import FleetWindows
from agft_ray.results.record import RunRecord, policies_of, read_runs
from agft_ray.study.policy_specs import SEARCHES
from agft_ray.study.rows import read_columns
from agft_ray.study.study import run_folder

WINDOW_COLUMNS = (
    "replica",
    "index",
    "start_s",
    "end_s",
    "energy_j",
    "sm_clock_mhz",
    "itl_sum_s",
    "itl_count",
    "running",
    "waiting",
)
Columns = dict[str, np.ndarray]


@dataclass(slots=True)
class Section:
    """All runs of one scenario."""

    records: list[RunRecord] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """Where rows may be."""

    @property
    def title(self) -> str:
        """What was simulated, in a line."""
        first = self.records[0]
        parts = [f"{first.model} on {first.replicas} × {first.gpu}", str(first.trace)]
        if first.keep not in (None, 1.0):
            parts.append(f"{first.keep:g} of its requests")
        if first.world:
            parts.append(f"in world {first.world}")
        elif first.profile_change:
            parts.append(f"with {first.profile_change}")
        if first.noise and not first.world:
            parts.append("with noise")
        return ", ".join(parts)

    @property
    def seeds(self) -> list[int]:
        """All of its runs, ascending."""
        return sorted({r.seed for r in self.records if r.seed is not None})

    @property
    def named(self) -> list[str]:
        """Policies that ran as such and kept rows, in order."""
        return [p for p in policies_of(self.records) if next(self.rows_of(p), None) is not None]

    @property
    def frontier(self) -> list[str]:
        """Fixed clocks by clock, if there are enough for a line."""
        fixed = [p for p in policies_of(self.records) if p.startswith("fixed:")]
        return sorted(fixed, key=lambda p: int(p.partition(":")[2])) if len(fixed) > 2 else []

    def rows_of(self, policy: str) -> Iterator[Path]:
        """The folders with this policy's rows, by seed."""
        if policy in SEARCHES:
            return
        for seed in self.seeds:
            for folder in self.folders:
                path = run_folder(folder, policy, seed)
                if (path / "windows.csv").exists():
                    yield path

    def windows(self, policy: str) -> Iterator[Columns]:
        """The windows of each run of a policy, by seed."""
        for path in self.rows_of(policy):
            yield read_columns(path / "windows.csv", WINDOW_COLUMNS)

    def latencies(self, policy: str, name: str) -> np.ndarray:
        """One latency of all requests of all seeds, in seconds."""
        found = [
            read_columns(path / "requests.csv", (name,))[name] for path in self.rows_of(policy)
        ]
        values: np.ndarray = np.concatenate([*found, np.empty(0)])
        known: np.ndarray = values[np.isfinite(values)]
        return known


def by_grid(windows: Columns) -> Columns:
    """Sums (energy, latencies, queues) and means (clock, times) over replicas, by index."""
    index = windows["index"].astype(int)
    counts = np.bincount(index)
    sums = {name: np.bincount(index, values) for name, values in windows.items()}
    means = {name: sums[name] / np.maximum(counts, 1) for name in ("sm_clock_mhz", "start_s")}
    ends = {"end_s": sums["end_s"] / np.maximum(counts, 1)}
    return sums | means | ends | {"replicas": counts}


def fleet_windows(windows: Columns) -> FleetWindows:
    """As a run's own."""
    grid = by_grid(windows)
    return FleetWindows(grid["energy_j"], grid["itl_sum_s"], grid["itl_count"])


def load(runs: Sequence[Path]) -> tuple[list[Section], list[dict[str, Any]]]:
    """Sections by scenario, and what each folder says it was made with.

    A run is a folder that `--out` named, or a file that `--json` wrote. Raises `AgftError` for
    anything else.
    """
    sections: dict[tuple[Any, ...], Section] = {}
    studies = []
    for run in runs:
        path = run / RUNS_FILE if run.is_dir() else run
        if run.is_dir() and not path.exists():
            raise AgftError(
                f"{run}: holds no {RUNS_FILE}; name a folder that --out of agft-ray simulate named"
            )
        if run.is_dir() and (run / STUDY_FILE).exists():
            studies.append(_study(run / STUDY_FILE))
        for record in read_runs(path):
            section = sections.setdefault(_scenario(record), Section())
            section.records.append(record)
            if run.is_dir() and run not in section.folders:
                section.folders.append(run)
    if not sections:
        raise AgftError(f"{', '.join(map(str, runs))}: no run was finished, nothing to report")
    return [_deduplicated(section) for section in sections.values()], studies


def _study(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AgftError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise AgftError(f"{path}: is not what agft-ray simulate writes")
    return content


def _scenario(record: RunRecord) -> tuple[Any, ...]:
    return (
        record.gpu,
        record.model,
        record.trace,
        record.replicas if record.role is None else None,
        record.keep,
        record.router,
        record.profile_change,
        bool(record.noise),
        record.world,
    )


def _deduplicated(section: Section) -> Section:
    """Each policy and seed once (default clocks are in every study), default clocks first."""
    unique: dict[tuple[Any, ...], RunRecord] = {}
    for record in section.records:
        unique.setdefault((record.policy, record.role, record.seed), record)
    records = sorted(unique.values(), key=lambda record: record.policy != DEFAULT)
    return Section(records, section.folders)
