"""Worlds on the terminal: run, judge, print."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.results.labels import DEFAULT
from agft_ray.results.record import write_runs
from agft_ray.study.console import study_progress
from agft_ray.study.pool import Pool
from agft_ray.study.study import Study
from agft_ray.study.worlds import JUDGED, Judgement, Outcome, World, judge, run_worlds

if TYPE_CHECKING:
    from rich.console import Console

LISTED_VALUES = 4
"""A world with more is told by its description alone."""


def run_and_print(
    study: Study,
    worlds: Sequence[World],
    pool: Pool,
    console: Console,
    *,
    json_path: Path | None = None,
) -> int:
    """Run all, write the records, print the judgement; the exit status: 0 done, 130 interrupted."""
    outcomes: list[Outcome] = []
    status = 0
    try:
        with study_progress(study.scenario.duration_s) as on_phase:
            outcomes.extend(run_worlds(study, worlds, pool, on_phase))
    except KeyboardInterrupt:
        status = 130
    if json_path is not None:
        write_runs(json_path, [record for each in outcomes for record in each.records])
    print_judgement(outcomes, len(study.seeds), console)
    if missing := len(worlds) - len(outcomes):
        console.print(f"Interrupted: {missing} of {len(worlds)} worlds were not run.")
    return status


def print_judgement(outcomes: Sequence[Outcome], seeds: int, console: Console) -> None:
    """Median and worst world of each figure of each policy."""
    from rich import box
    from rich.table import Table

    found = judge(outcomes)
    if not found:
        console.print("No policy was run in any world.")
        return
    count = f"{len(outcomes)} world{'s' if len(outcomes) != 1 else ''}"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{count}, {seeds} seed{'s' if seeds != 1 else ''} each",
        caption="change against default clocks in the same world in %, mean over seeds",
    )
    for header in ("", "figure", "median", "in world", "worst", "in world"):
        number = header in ("median", "worst")
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    labels = {metric: label for label, metric in JUDGED}
    for policy, figures in itertools.groupby(found, key=lambda judgement: judgement.policy):
        for place, judgement in enumerate(figures):
            cells = [_change(judgement, world) for world in (judgement.median, judgement.worst)]
            median, worst = zip(cells, (judgement.median, judgement.worst), strict=True)
            table.add_row("" if place else policy, labels[judgement.metric], *median, *worst)
        table.add_section()
    console.print(table)
    console.print(_winners(found), highlight=False)


def _change(judgement: Judgement, world: str) -> str:
    return f"{judgement.changes_percent[world]:+.1f}"


def _winners(found: Sequence[Judgement]) -> str:
    """In how many worlds which policy has the lowest EDP, default clocks included."""
    edp = [judgement for judgement in found if judgement.metric == "edp_j_s"]
    best: Counter[str] = Counter()
    for world in dict.fromkeys(world for judgement in edp for world in judgement.changes_percent):
        changes = {each.policy: each.changes_percent.get(world, 0.0) for each in edp}
        _, policy = min((change, policy) for policy, change in {DEFAULT: 0.0, **changes}.items())
        best[policy] += 1
    return "Lowest EDP: " + ", ".join(f"{policy} in {n}" for policy, n in best.most_common()) + "."


def print_worlds(worlds: Sequence[World], model: str, console: Console) -> None:
    """Each world's name and what it is."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for header in ("world", "what", "numbers"):
        table.add_column(header, overflow="fold")
    for world in worlds:
        values = {p.removeprefix(f"models.{model}."): v for p, v in world.values.items()}
        text = ", ".join(f"{path}={value:g}" for path, value in values.items())
        few = len(values) <= LISTED_VALUES
        table.add_row(world.name, world.about, text if few else f"{len(values)} numbers")
    console.print(table)
