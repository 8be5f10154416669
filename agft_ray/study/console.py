"""A study on the terminal: progress over runs and simulated time, then the comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from agft_ray.results.comparison import PolicyStanding, standings
from agft_ray.results.figures import METRIC, METRICS, Metric
from agft_ray.results.labels import DEFAULT
from agft_ray.results.numbers import NO_VALUE, change_text, spread_text, verdict
from agft_ray.results.record import RunRecord
from agft_ray.results.spread import Spread
from agft_ray.results.terminal import PlainProgress, coloured
from agft_ray.study.policy_specs import SEARCHES
from agft_ray.study.pool import OnProgress
from agft_ray.study.study import OnPhase

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CHANGES = (
    ("energy", "energy_j"),
    ("TTFT", "ttft_s.mean"),
    ("TTFT p99", "ttft_s.p99"),
    ("TPOT", "tpot_s.mean"),
    ("TPOT p99", "tpot_s.p99"),
    ("E2E", "e2e_s.mean"),
    ("EDP", "edp_j_s"),
)
CONDUCT = (
    ("mean W", "mean_power_w"),
    ("J/token", "energy_per_output_token_j"),
    ("SLO kept %", "slo_attainment"),
    ("changes", "clock_changes"),
    ("regret %", "energy_regret"),
    ("low after", "windows_to_low_regret"),
    ("worst x", "worst_exploration_tpot_ratio"),
    ("over %", "windows_over_bound"),
    ("vs oracle %", "regret"),
)
NOTES = {
    "energy_regret": "regret: energy beyond the best clocks'",
    "windows_to_low_regret": "low after: windows until that stays below 2 %",
    "worst_exploration_tpot_ratio": "worst: TPOT of a window before, by default clocks'",
    "windows_over_bound": "over: windows over a latency bound",
    "regret": "vs oracle: EDP beyond that of oracle_pair",
}
"""Of columns that need one."""
DETAIL_COLUMNS = 3
PLAIN_WIDTH = 100
LABEL_WIDTH = 20
"""Longer names of policies are folded."""


def print_study(
    records: Sequence[RunRecord], notes: Sequence[str], console: Console, *, details: bool
) -> None:
    """Changes against default clocks, then how they came about; with details every metric."""
    from rich.markup import escape

    found = standings(records)
    if found:
        console.print(_changes(found, records))
        console.print(_conduct(found))
    else:
        console.print("No run was finished.")
    for start in range(0, len(found) if details else 0, DETAIL_COLUMNS):
        console.print(_details(found[start : start + DETAIL_COLUMNS]))
    for note in notes:
        console.print(f"[dim]•[/dim] {escape(note)}", highlight=False)


def _title(records: Sequence[RunRecord]) -> str:
    first = records[0]
    seeds = sorted({record.seed for record in records if record.seed is not None})
    kept = "" if first.keep in (None, 1.0) else f", {first.keep:g} of it"
    return (
        f"{first.model} on {first.replicas} x {first.gpu}, {first.trace}{kept}, "
        f"{first.requests:,} requests in {first.duration_s:,.0f} s, "
        f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    )


def _changes(found: Sequence[PolicyStanding], records: Sequence[RunRecord]) -> Table:
    several = any(len(standing.runs) > 1 for standing in found)
    caption = "95 % intervals over seeds, paired by seed" if several else "a single seed"
    table = _table(found, _title(records), f"change against default clocks in %; {caption}")
    for label, _ in CHANGES:
        table.add_column(label, justify="right", no_wrap=True)
    for standing in found:
        if standing.policy == DEFAULT:
            cells = [_absolute(standing, METRIC[name]) for _, name in CHANGES]
        else:
            cells = [_percent(standing.changes_percent.get(name)) for _, name in CHANGES]
        table.add_row(_label(standing), *cells)
    return table


def _conduct(found: Sequence[PolicyStanding]) -> Table:
    shown = [(label, name) for label, name in CONDUCT if any(name in s.values for s in found)]
    notes = [NOTES[name] for _, name in shown if name in NOTES]
    table = _table(found, None, "; ".join(notes) or None)
    for label, _ in shown:
        table.add_column(label, justify="right", no_wrap=True)
    for standing in found:
        cells = [_spread(standing, METRIC[name]) for _, name in shown]
        table.add_row(_label(standing), *cells)
    return table


def _details(found: Sequence[PolicyStanding]) -> Table:
    table = _table(found, None, None)
    for standing in found:
        table.add_column(_label(standing), justify="right", no_wrap=True)
    for metric in METRICS:
        if not any(metric.name in standing.values for standing in found):
            continue
        cells = []
        for standing in found:
            change = standing.changes_percent.get(metric.name)
            percent = "" if change is None or standing.policy == DEFAULT else _percent(change)
            cells.append(f"{_spread(standing, metric)} {percent}".rstrip())
        table.add_row(metric.heading, *cells)
    return table


def _table(found: Sequence[PolicyStanding], title: str | None, caption: str | None) -> Table:
    from rich import box
    from rich.table import Table

    width = min(max(len(standing.policy) for standing in found), LABEL_WIDTH)
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=width)
    return table


def _label(standing: PolicyStanding) -> str:
    """The policy; a search with what it chose, if that is the same for all seeds."""
    choices = {run.choice for run in standing.runs}
    if standing.policy in SEARCHES and len(choices) == 1 and (choice := choices.pop()):
        return f"{standing.policy} {choice.partition(',')[0]}"
    return standing.policy


def _absolute(standing: PolicyStanding, metric: Metric) -> str:
    spread = standing.values.get(metric.name)
    if spread is None:
        return NO_VALUE
    return f"{spread_text(replace(spread, half_width=None), scale=metric.scale)} {metric.unit}"


def _spread(standing: PolicyStanding, metric: Metric) -> str:
    spread = standing.values.get(metric.name)
    partial = standing.partial(metric.name)
    return spread_text(spread, scale=metric.scale) + (f" ({partial})" if partial else "")


def _percent(change: Spread | None) -> str:
    """Coloured where the interval excludes no change."""
    if change is None:
        return NO_VALUE
    return coloured(change_text(change), verdict(change), same="dim")


def wide_console() -> Console:
    """Standard output; 100 columns where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


@contextmanager
def study_progress(
    duration_s: float | None,
    *,
    console: Console | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> Iterator[OnPhase]:
    """A context whose value is an `on_phase` of `Study.run`.

    On a terminal, a bar a phase: runs, and simulated time over all of them; elsewhere a plain line
    at the start of a phase, and every ten seconds of `now_s`.
    """
    from rich.console import Console

    screen = console or Console(stderr=True)
    show = _live if screen.is_terminal else _plain
    with show(duration_s, screen, now_s) as on_phase:
        yield on_phase


class _Phase:
    """Sums up how far the runs of a phase are; a search learns of more of them as it goes on."""

    def __init__(self, name: str, duration_s: float | None) -> None:
        self.name = name
        self._duration_s = duration_s
        self._at_s: list[float] = []

    @property
    def runs(self) -> int:
        """Those known of."""
        return len(self._at_s)

    def add(self, runs: int) -> int:
        """So many more; the number of the first of them."""
        self._at_s += [0.0] * runs
        return len(self._at_s) - runs

    def at(self, number: int, t_s: float) -> None:
        """Run `number` has come to `t_s`."""
        self._at_s[number] = t_s

    @property
    def simulated_s(self) -> float:
        """Over all runs."""
        return sum(self._at_s)

    @property
    def total_s(self) -> float | None:
        """What it comes to at the end, if known."""
        return None if self._duration_s is None else self._duration_s * self.runs

    @property
    def begun(self) -> int:
        """How many runs have begun."""
        return sum(t_s > 0 for t_s in self._at_s)


@contextmanager
def _live(
    duration_s: float | None, console: Console, now_s: Callable[[], float]
) -> Iterator[OnPhase]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description:<16} run {task.fields[begun]:,} of {task.fields[runs]:,}")
    time_column = TextColumn("{task.completed:,.0f} s simulated")
    with Progress(text, BarColumn(24), time_column, TimeElapsedColumn(), console=console) as bar:
        phase = _Phase("", duration_s)

        def on_phase(name: str, runs: int) -> OnProgress:
            nonlocal phase
            if name != phase.name:
                phase = _Phase(name, duration_s)
                for before in bar.task_ids:
                    bar.remove_task(before)
                bar.add_task(name, total=None, begun=0, runs=runs)
            now, first, (task,) = phase, phase.add(runs), bar.task_ids
            bar.update(task, total=now.total_s, runs=now.runs)

            def on_progress(number: int, t_s: float) -> None:
                now.at(first + number, t_s)
                bar.update(task, completed=now.simulated_s, begun=now.begun)

            return on_progress

        yield on_phase


@contextmanager
def _plain(
    duration_s: float | None, console: Console, now_s: Callable[[], float]
) -> Iterator[OnPhase]:
    def write(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    lines = PlainProgress(write, now_s)
    phase = _Phase("", duration_s)

    def on_phase(name: str, runs: int) -> OnProgress:
        nonlocal phase
        if name != phase.name:
            phase = _Phase(name, duration_s)
            if runs:
                lines.at_once(f"{name}: {runs:,} run{'s' if runs > 1 else ''}")
        now, first = phase, phase.add(runs)

        def on_progress(number: int, t_s: float) -> None:
            now.at(first + number, t_s)
            done = f"{now.begun:,} of {now.runs:,}, {now.simulated_s:,.0f} s simulated"
            lines.show(f"{name}: run {done}")

        return on_progress

    yield on_phase
