"""`simulate --sweep-uncertainty`: does the ranking of policies survive the profile's ranges?"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import AgftError
from agft_ray.results.comparison import standings
from agft_ray.results.labels import DEFAULT
from agft_ray.results.record import RunRecord, write_runs
from agft_ray.results.spread import Spread
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.study.pool import Pool
from agft_ray.study.study import OnPhase, Study

if TYPE_CHECKING:
    from rich.console import Console

FIRST = "governor."
"""Ranges that come first: much of the saving at light load hangs on the default governor."""
NOISE = "noise."
"""Ranges that matter only to a simulation with noise."""
Pair = tuple[str, str]
"""Two policies, by name."""


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

    @property
    def seeds(self) -> int:
        """How many the policies were run with."""
        return len({record.seed for record in self.records})

    def is_apart(self, pair: Pair) -> bool:
        """Whether these two differ, seed by seed, beyond their difference's 95 % interval."""
        first, second = (self._changes_by_seed(policy) for policy in pair)
        spread = Spread.of([second[seed] - first[seed] for seed in first if seed in second])
        return spread is not None and abs(spread.mean) > (spread.half_width or 0.0)

    def _changes_by_seed(self, policy: str) -> Mapping[int | None, float]:
        edp: dict[str, dict[int | None, float]] = {DEFAULT: {}, policy: {}}
        for record in self.records:
            if record.policy in edp and record.edp_j_s:
                edp[record.policy][record.seed] = record.edp_j_s
        default = edp[DEFAULT]
        return {s: 100.0 * (v / default[s] - 1.0) for s, v in edp[policy].items() if s in default}


def ranges_of(profile: GpuProfile, model: str) -> dict[str, tuple[float, float]]:
    """The ranges that matter to one model, the governor's first."""
    others = tuple(f"models.{name}." for name in profile.models if name != model)
    kept = {p: ends for p, ends in profile.ranges.items() if not p.startswith(others)}
    return dict(sorted(kept.items(), key=lambda item: not item[0].startswith(FIRST)))


def swept_ranges(study: Study) -> dict[str, tuple[float, float]]:
    """Those that matter to the study."""
    scenario = study.scenario
    ranges = ranges_of(scenario.profile(), scenario.model)
    return {p: ends for p, ends in ranges.items() if scenario.noise or not p.startswith(NOISE)}


def sweep(study: Study, pool: Pool, on_phase: OnPhase) -> Iterator[End]:
    """The study with the profile as it is, then at each end of each range, one at a time.

    Raises `AgftError` if the profile has no ranges, or one of them leads to an invalid profile.
    """
    profile = study.scenario.profile()
    ranges = swept_ranges(study)
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
        print_sweep(ends, console, planned=2 * len(swept_ranges(study)))
    return status


def print_sweep(ends: Sequence[End], console: Console, *, planned: int) -> None:
    """A row an end: its ranking, and where it differs from that of the profile as it is.

    `planned`: how many ends there are; an interrupted sweep has fewer.
    """
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
    console.print(verdict(ends, planned=planned), highlight=False)
    if missing := planned - (len(ends) - 1):
        console.print(f"Interrupted: {missing} of {planned} ends were not run.", highlight=False)


def verdict(ends: Sequence[End], *, planned: int) -> str:
    """Whether the ranking survived, where not, and how far seeds bear it out.

    It is called stable only if all `planned` ends were run and no two neighbours are, at any of
    them, within the spread over seeds.
    """
    nominal, count = ends[0], len(ends) - 1
    changed = [end for end in ends[1:] if end.ranking != nominal.ranking]
    text = f"The ranking changes at {len(changed)} of {count} ends: {_named(changed)}."
    if not changed:
        text = f"The order is the same at {count} of {planned} ends: {', '.join(nominal.ranking)}."
    if nominal.seeds < 2:
        return f"{text} One seed cannot tell whether that is more than noise; name several."
    if changed:
        sure = [end for end in changed if _changed_beyond_seeds(nominal, end)]
        text += f" Beyond the spread over seeds it does at {len(sure)}"
        text += f": {_named(sure)}." if sure else "."
    if close := _close(ends):
        pairs = ", ".join(f"{a} and {b} (at {n})" for (a, b), n in close.most_common())
        return f"{text} Within the spread over seeds, of {count + 1} settings: {pairs}."
    if changed or count < planned:
        return text
    return f"{text} It is stable: all differ beyond the spread over seeds."


def _named(ends: Sequence[End]) -> str:
    return ", ".join(f"{end.path}={end.value:g}" for end in ends)


def _close(ends: Sequence[End]) -> Counter[Pair]:
    """Neighbours in a ranking that are not apart, and at how many ends."""
    found: Counter[Pair] = Counter()
    for end in ends:
        for first, second in itertools.pairwise(end.ranking):
            if not end.is_apart((first, second)):
                found[min(first, second), max(first, second)] += 1
    return found


def _changed_beyond_seeds(nominal: End, end: End) -> bool:
    """Whether two policies have changed places, and are apart before and after."""
    before = {policy: place for place, policy in enumerate(nominal.ranking)}
    return any(
        before.get(first, -1) > before.get(second, -1)
        and nominal.is_apart((first, second))
        and end.is_apart((first, second))
        for first, second in itertools.combinations(end.ranking, 2)
    )
