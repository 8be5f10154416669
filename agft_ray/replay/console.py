"""A replay on the terminal: progress while it runs, the comparison when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agft_ray.replay.client import Progress
from agft_ray.replay.result import ReplicaStatus, ServerStatus
from agft_ray.replay.summary import Comparison, Group
from agft_ray.replay.timeline import growth
from agft_ray.results.distribution import Slo
from agft_ray.results.figures import EFFORT, METRIC, Metric
from agft_ray.results.numbers import NO_VALUE, change_text, number, verdict
from agft_ray.results.record import STATISTICS
from agft_ray.results.terminal import PlainProgress, coloured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
SECTIONS = (
    tuple(metric.name for metric in EFFORT),
    (
        "energy_j",
        "energy_per_output_token_j",
        "mean_power_w",
        "sm_clock_mhz",
        "clock_changes",
        "windows",
    ),
    *(
        tuple(f"{latency}.{statistic}" for statistic in STATISTICS)
        for latency in ("ttft_s", "tpot_s", "e2e_s")
    ),
    ("edp_per_output_token_j_s", "slo_attainment"),
)
"""The rows of the comparison."""
COMPARED = (
    "energy_per_output_token_j",
    "edp_per_output_token_j_s",
    *(name for section in SECTIONS[2:5] for name in section),
)
"""Those that have a change, if enough is known."""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table, the client's view, the clocks over time, notes and warnings."""
    from rich.markup import escape

    console.print(_table(comparison))
    console.print(_client_line(comparison))
    for line in _clock_lines(comparison):
        console.print(line, highlight=False, no_wrap=True, overflow="crop")
    for error, count in comparison.errors.items():
        console.print(f"[red]{count} failed:[/red] {escape(error)}", highlight=False)
    for note in comparison.notes:
        console.print(f"[dim]•[/dim] {escape(note)}", highlight=False)
    for warning in comparison.bottlenecks:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)


def _table(comparison: Comparison) -> Table:
    from rich.table import Table

    table = Table(title=_title(comparison), caption=_caption(comparison))
    table.add_column("")
    for group in comparison.groups:
        table.add_column(group.role, justify="right")
    if comparison.changes_percent:
        table.add_column("change", justify="right")
    for section in SECTIONS:
        for name in section:
            if name != "slo_attainment" or comparison.slo:
                table.add_row(*_cells(comparison, METRIC[name]))
        table.add_section()
    return table


def _title(comparison: Comparison) -> str:
    title = f"{comparison.requests:,} requests in {_spans(comparison)}"
    return title if comparison.valid else f"[bold red]NOT VALID, see below:[/] {title}"


def _spans(comparison: Comparison) -> str:
    if comparison.speed == 1:
        return f"{comparison.duration_s:,.0f} s"
    return f"{comparison.duration_s:,.0f} simulated s, {comparison.wall_s:,.0f} s of wall time"


def _caption(comparison: Comparison) -> str:
    simulated = "" if comparison.speed == 1 else ", in simulated seconds"
    caption = f"latencies: {comparison.latency_source}-side{simulated}"
    if not comparison.changes_percent:
        return caption
    has_intervals = any(c.half_width is not None for c in comparison.changes_percent.values())
    intervals = ", 95 % intervals" if has_intervals else ""
    return f"{caption}\nchange: at equal work (same lengths, same load){intervals}"


def _cells(comparison: Comparison, metric: Metric) -> Iterator[str]:
    slo = comparison.slo if metric.name == "slo_attainment" else None
    yield metric.heading if slo is None else f"within {_bounds(slo)}, %"
    for group in comparison.groups:
        yield number(_value(group, metric.name), scale=metric.scale)
    if comparison.changes_percent:
        yield _change(metric, comparison)


def _value(group: Group, name: str) -> float | None:
    value: object = group
    for part in name.split("."):
        value = getattr(value, part)
    return value if isinstance(value, int | float) else None


def _bounds(slo: Slo) -> str:
    named = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
    return ", ".join(f"{name} {bound:g} s" for name, bound in named if bound is not None)


def _change(metric: Metric, comparison: Comparison) -> str:
    """Coloured if it is more than chance; a dash where too little is known for one."""
    change = comparison.changes_percent.get(metric.name)
    if change is None:
        return NO_VALUE if metric.name in COMPARED else ""
    judged = change.half_width is not None and comparison.valid
    return coloured(f"{change_text(change)} %", verdict(change, judged=judged))


def _client_line(comparison: Comparison) -> str:
    ttft_s, e2e_s = comparison.client_ttft_s, comparison.client_e2e_s
    simulated = "" if comparison.speed == 1 else " (simulated seconds)"
    return (
        f"seen by the client{simulated}: TTFT mean {number(ttft_s.mean, scale=1e3)} ms, "
        f"p99 {number(ttft_s.p99, scale=1e3)} ms; "
        f"E2E mean {number(e2e_s.mean)} s, p99 {number(e2e_s.p99)} s"
    )


def _clock_lines(comparison: Comparison) -> Iterator[str]:
    """A sparkline a role, on one scale."""
    known = [c for group in comparison.groups for c in group.sm_clock_over_time_mhz if c]
    if not known:
        return
    low_mhz, high_mhz = min(known), max(known)
    yield f"SM clock over time, {BLOCKS[0]} {low_mhz:.0f} MHz to {BLOCKS[-1]} {high_mhz:.0f} MHz"
    for group in comparison.groups:
        yield f"{group.role:>8} {sparkline(group.sm_clock_over_time_mhz, low_mhz, high_mhz)}"


def sparkline(values: tuple[float | None, ...], low: float, high: float) -> str:
    """A block a value, the lowest at `low` and the highest at `high`; a space where there is none.

    Where both are the same, so are all values, and they are drawn half as high.
    """
    return "".join(" " if value is None else _block(value, low, high) for value in values)


def _block(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high > low else 0.5
    return BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]


@contextmanager
def progress_display(
    total: int | None,
    *,
    last_arrival_s: float | None = None,
    console: Console | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[Progress], None]]:
    """A context whose value is an `on_progress` of `replay`; `total` requests, None if unknown, the
    last of them sent at `last_arrival_s` (simulated).

    On a terminal a bar with the fleet's state beneath it; elsewhere (a log) a plain line every ten
    seconds of `now_s`, and one at the end.
    """
    from rich.console import Console

    screen = console or Console()
    show = _live if screen.is_terminal else _plain
    with show(_Line(total, last_arrival_s), screen, now_s) as display:
        yield display


@contextmanager
def _live(
    line: _Line, console: Console, now_s: Callable[[], float]
) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Group as Lines
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    bar = Bar(BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    task = bar.add_task("", total=line.total)
    fleet = _Fleet()
    with Live(bar, console=console, refresh_per_second=4) as live:

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.done)
            lines = (line.text(progress), fleet.line(progress.status))
            live.update(Lines(bar, *(Text(line) for line in lines)))

        yield show


@contextmanager
def _plain(
    line: _Line, console: Console, now_s: Callable[[], float]
) -> Iterator[Callable[[Progress], None]]:
    fleet = _Fleet()

    def write(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    lines = PlainProgress(write, now_s)

    def show(progress: Progress) -> None:
        parts = (line.text(progress), fleet.line(progress.status))
        lines.show("; ".join(part for part in parts if part))

    yield show
    lines.end()


@dataclass(frozen=True, slots=True)
class _Line:
    """How far a replay is, in words."""

    total: int | None
    last_arrival_s: float | None

    def text(self, progress: Progress) -> str:
        """Wall time first, what is left of it, simulated time where it is another, requests."""
        of = "" if self.total is None else f" of {self.total:,}"
        return (
            f"{', '.join(self._times(progress))}: {progress.done:,}{of} done, "
            f"{progress.sent - progress.done:,} in flight, {progress.failed:,} failed"
        )

    def _times(self, progress: Progress) -> Iterator[str]:
        wall_s, simulated_s = progress.elapsed_wall_s, progress.elapsed_s
        speed = simulated_s / wall_s if wall_s > 0 else 1.0
        if abs(speed - 1.0) < 1e-6:
            yield f"{wall_s:,.0f} s"
        else:
            yield f"{wall_s:,.0f} s of wall time"
            yield f"{simulated_s:,.0f} s simulated"
        if self.last_arrival_s is not None and self.last_arrival_s > simulated_s:
            yield f"about {(self.last_arrival_s - simulated_s) / speed:,.0f} s left"


@dataclass(slots=True)
class _Fleet:
    """Remembers each replica's last sighting, since power is energy between two of them."""

    before: dict[str, ReplicaStatus] = field(default_factory=dict)
    power_w: dict[str, float] = field(default_factory=dict)

    def line(self, status: ServerStatus | None) -> str:
        """Queues of the fleet, then power and clock of each role; empty without a status."""
        if status is None:
            return ""
        for replica in status.replicas:
            self._see(replica)
        running = sum(replica.running for replica in status.replicas)
        waiting = sum(replica.waiting for replica in status.replicas)
        roles = sorted({replica.role for replica in status.replicas}, reverse=True)
        parts = [self._role(role, status) for role in roles]
        return ", ".join([f"running {running:,}, waiting {waiting:,}", *parts])

    def _see(self, replica: ReplicaStatus) -> None:
        before = self.before.setdefault(replica.replica, replica)
        if replica.energy_t_s > before.energy_t_s:
            energy_j = growth((before, replica), "energy_j")
            self.power_w[replica.replica] = energy_j / (replica.energy_t_s - before.energy_t_s)
            self.before[replica.replica] = replica

    def _role(self, role: str, status: ServerStatus) -> str:
        members = [replica for replica in status.replicas if replica.role == role]
        powers_w = [self.power_w[m.replica] for m in members if m.replica in self.power_w]
        power = f"{sum(powers_w) / len(powers_w):.0f}" if powers_w else NO_VALUE
        clock_mhz = sum(member.sm_clock_mhz for member in members) / len(members)
        return f"{role} {power} W {clock_mhz:.0f} MHz"
