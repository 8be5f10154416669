"""`simulate --sweep-uncertainty`: does the ranking of policies survive the profile's ranges?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import AgftError
from agft_ray.results.comparison import standings
from agft_ray.results.record import RunRecord, write_runs
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.study.pool import Pool
from agft_ray.study.study import OnPhase, Study

if TYPE_CHECKING:
    from rich.console import Console

FIRST = "governor."
"""Ranges that come first: much of the saving at light load hangs on the default governor."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of one range (or the profile as it is, without a path) and what came of it."""

    path: str | None
    value: float | None
    records: tuple[RunRecord, ...]

    @property
    def changes_percent(self) -> dict[str, float]:
        """EDP against default clocks, by policy, the best first."""
        changes = {
            standing.policy: standing.changes_percent["edp_j_s"].mean
            for standing in standings(self.records)
            if "edp_j_s" in standing.changes_percent
        }
        return dict(sorted(changes.items(), key=lambda item: item[1]))

    @property
    def ranking(self) -> list[str]:
        """Policies by EDP, the best first."""
        return list(self.changes_percent)


def ranges_of(profile: GpuProfile, model: str) -> dict[str, tuple[float, float]]:
    """The ranges that matter to one model, the governor's first."""
    others = tuple(f"models.{name}." for name in profile.models if name != model)
    kept = {p: ends for p, ends in profile.ranges.items() if not p.startswith(others)}
    return dict(sorted(kept.items(), key=lambda item: not item[0].startswith(FIRST)))


def sweep(study: Study, pool: Pool, on_phase: OnPhase) -> Iterator[End]:
    """The study with the profile as it is, then at each end of each range, one at a time.

    Raises `AgftError` if the profile has no ranges, or one of them leads to an invalid profile.
    """
    profile = study.scenario.profile()
    ranges = ranges_of(profile, study.scenario.model)
    if not ranges:
        raise AgftError(
            f"GPU profile {profile.name} has no ranges to sweep; give its uncertain numbers one "
            "under `ranges`"
        )
    for path, ends in ranges.items():
        for value in ends:
            profile.with_value(path, value)
    yield End(None, None, tuple(_fresh(study, {}).run(pool, on_phase)))
    for path, ends in ranges.items():
        for value in ends:
            records = _fresh(study, {path: value}).run(pool, on_phase)
            yield End(path, value, tuple(records))


def _fresh(study: Study, values: dict[str, float]) -> Study:
    scenario = study.scenario.model_copy(update={"profile_values": values})
    return replace(study, scenario=scenario, folder=None, records=[], notes=[])


def sweep_and_print(
    study: Study, pool: Pool, console: Console, *, json_path: Path | None = None
) -> int:
    """Sweep, print the table and the verdict; the exit status: 0 done, 130 interrupted."""
    from agft_ray.study.console import study_progress

    ends: list[End] = []
    status = 0
    try:
        with study_progress(study.scenario.duration_s) as on_phase:
            ends.extend(sweep(study, pool, on_phase))
    except KeyboardInterrupt:
        status = 130
    if json_path is not None:
        write_runs(json_path, [record for end in ends for record in end.records])
    if ends:
        print_sweep(ends, console)
    return status


def print_sweep(ends: Sequence[End], console: Console) -> None:
    """A row an end: its ranking, and where it differs from that of the profile as it is."""
    from rich import box
    from rich.table import Table

    nominal = ends[0]
    table = Table(
        box=box.SIMPLE_HEAD,
        title="EDP against default clocks in %, the best first",
    )
    for header in ("range", "value", "ranking", ""):
        table.add_column(header, overflow="fold")
    for end in ends:
        changed = end.ranking != nominal.ranking
        table.add_row(
            (end.path or "profile as it is").removeprefix(f"models.{nominal.records[0].model}."),
            "" if end.value is None else f"{end.value:g}",
            ", ".join(f"{policy} {change:+.1f}" for policy, change in end.changes_percent.items()),
            "[red]differs[/]" if changed else "",
        )
    console.print(table)
    console.print(verdict(ends), highlight=False)


def verdict(ends: Sequence[End]) -> str:
    """One sentence: whether the ranking survived, and where not."""
    nominal = ends[0].ranking
    changed = [f"{end.path}={end.value:g}" for end in ends[1:] if end.ranking != nominal]
    if not changed:
        return f"The ranking survives all {len(ends) - 1} ends: {', '.join(nominal)}."
    return f"The ranking changes at {len(changed)} of {len(ends) - 1} ends: {', '.join(changed)}."
