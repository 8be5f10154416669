"""The plots of a report: each a figure, and the sentence that says what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from agft_ray.report.data import Columns, Section, by_grid, fleet_windows
from agft_ray.report.trade_off import Plot, trade_off
from agft_ray.results.chart_style import (
    DEFAULT_INK,
    colours,
    inline_svg,
    label_ends,
    new_figure,
    plain_axes,
)
from agft_ray.results.labels import DEFAULT
from agft_ray.results.learning import BLOCK, FleetWindows, block_edp_ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 360
"""Of a line, at most: more cannot be told apart on a page."""
LOAD_BINS = 8


def plots(section: Section) -> Iterator[Plot]:
    """All that the section's rows allow."""
    makers: tuple[Callable[[Section], Plot | None], ...] = (
        trade_off,
        over_time,
        latency_cdfs,
        learning_curve,
        clocks_by_load,
    )
    for maker in makers:
        plot = maker(section)
        if plot is not None:
            yield plot


def over_time(section: Section) -> Plot | None:
    """Clock, power and load of the first seed's runs."""
    runs = {policy: by_grid(next(section.windows(policy))) for policy in section.named}
    if not runs:
        return None
    figure = new_figure(6.0)
    panels = figure.subplots(3, 1, sharex=True)
    palette = colours(runs, DEFAULT)
    for axes, (label, value) in zip(panels, _SERIES.items(), strict=True):
        plain_axes(axes)
        ends = []
        for policy, grid in runs.items():
            t_s, y = _thinned(grid["end_s"], value(grid))
            axes.plot(t_s, y, color=palette[policy], linewidth=1.1, alpha=0.9)
            ends.append((float(np.nanmean(y[-max(len(y) // 10, 1) :])), policy, palette[policy]))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        label_ends(axes, ends, 1.5)
    panels[-1].set_xlabel("simulated time, s")
    caption = (
        f"Seed {section.seeds[0]}, mean over replicas. Load is the number of requests running and "
        "waiting: a slower policy carries the same traffic with more of them at once."
    )
    return Plot("Clock, power and load over time", caption, inline_svg(figure, caption))


_SERIES: dict[str, Callable[[Columns], np.ndarray]] = {
    "SM clock, MHz": lambda g: g["sm_clock_mhz"],
    "power per\nreplica, W": lambda g: (
        g["energy_j"] / np.maximum(g["end_s"] - g["start_s"], 1e-9) / g["replicas"]
    ),
    "requests per\nreplica": lambda g: (g["running"] + g["waiting"]) / g["replicas"],
}


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of successive points, so that no more than `POINTS` are left."""
    size = -(-len(x) // POINTS)
    edges = np.arange(0, len(x), size)
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def latency_cdfs(section: Section) -> Plot | None:
    """The share of requests by latency, all seeds together."""
    policies = section.named
    if not policies:
        return None
    figure = new_figure(3.4)
    palette = colours(policies, DEFAULT)
    shares = np.linspace(0.0, 1.0, 300)
    panels = (("ttft_s", "TTFT, s"), ("tpot_s", "TPOT, ms"), ("e2e_s", "E2E, s"))
    for axes, (name, label) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        plain_axes(axes)
        scale = 1e3 if name == "tpot_s" else 1.0
        for policy in policies:
            values = np.quantile(section.latencies(policy, name), shares) * scale
            axes.plot(values, shares, color=palette[policy], linewidth=1.4)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        _plain_log_ticks(axes)
    handles = [(policy, palette[policy]) for policy in policies]
    _keys(figure, handles)
    figure.axes[0].set_ylabel("share of requests")
    caption = "Left and steep is better. All seeds together; the horizontal axes are logarithmic."
    return Plot("Latency distributions", caption, inline_svg(figure, f"Latency CDFs. {caption}"))


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _keys(figure: Figure, handles: list[tuple[str, str]]) -> None:
    """The names, in their colours, above everything."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, linewidth=2.5) for _, colour in handles]
    figure.legend(
        lines,
        [name for name, _ in handles],
        loc="outside upper center",
        ncols=min(len(handles), 6),
        frameon=False,
        labelcolor=[colour for _, colour in handles],
    )


def learning_curve(section: Section) -> Plot | None:
    """EDP of twenty windows relative to default clocks, over time."""
    if DEFAULT not in section.named or len(section.named) < 2:
        return None
    default = [fleet_windows(windows) for windows in section.windows(DEFAULT)]
    if min(map(len, default)) < 2 * BLOCK:
        return None
    figure = new_figure(3.6)
    axes = figure.subplots()
    plain_axes(axes)
    policies = [policy for policy in section.named if policy != DEFAULT]
    palette = colours(policies, DEFAULT)
    axes.axhline(0.0, color=DEFAULT_INK, linewidth=1.2)
    ends = [(0.0, DEFAULT, DEFAULT_INK)]
    lowest = highest = 0.0
    for policy in policies:
        runs = [fleet_windows(windows) for windows in section.windows(policy)]
        changes = _changes_percent(runs, default)
        windows = np.arange(changes.shape[1], dtype=float)
        x, y = _thinned(windows, changes.mean(axis=0))
        _, low = _thinned(windows, changes.min(axis=0))
        _, high = _thinned(windows, changes.max(axis=0))
        axes.fill_between(x, low, high, color=palette[policy], alpha=0.12, linewidth=0)
        axes.plot(x, y, color=palette[policy], linewidth=1.4)
        ends.append((float(y[-max(len(y) // 10, 1) :].mean()), policy, palette[policy]))
        lowest, highest = (
            min(lowest, float(low.min())),
            max(highest, float(np.quantile(high, 0.98))),
        )
    axes.set_ylim(lowest - 5.0, min(highest, 100.0) + 5.0)
    axes.set_xlabel("window")
    axes.set_ylabel("EDP of 20 windows against\ndefault clocks, %")
    axes.margins(x=0.01)
    label_ends(axes, ends, 3.0)
    caption = (
        f"Mean over seeds of the EDP of {BLOCK} successive windows, relative to default clocks in "
        "the same windows; the band spans the seeds. Lower is better, and a flat line has learned."
    )
    return Plot("Learning curve", caption, inline_svg(figure, f"Learning curve. {caption}"))


def _changes_percent(runs: list[FleetWindows], default: list[FleetWindows]) -> np.ndarray:
    """A row a seed, as long as the shortest; where nothing was emitted, the value before."""
    ratios = [block_edp_ratios(r, d) for r, d in zip(runs, default, strict=False)]
    length = min(map(len, ratios))
    changes = 100.0 * (np.array([ratio[:length] for ratio in ratios]) - 1.0)
    for row in changes:
        known = np.flatnonzero(np.isfinite(row))
        row[:] = np.interp(np.arange(length), known, row[known]) if known.size else 0.0
    return changes


def clocks_by_load(section: Section) -> Plot | None:
    """Which clock ran at which number of running requests."""
    policies = section.named
    runs = {p: list(section.windows(p)) for p in policies}
    if not runs:
        return None
    figure = new_figure(3.6)
    axes = figure.subplots()
    plain_axes(axes)
    palette = colours(policies, DEFAULT)
    ends = []
    for policy, columns in runs.items():
        running = np.concatenate([c["running"] for c in columns])
        clock = np.concatenate([c["sm_clock_mhz"] for c in columns])
        centres, middle, low, high = _by_load(running, clock)
        axes.fill_between(centres, low, high, color=palette[policy], alpha=0.13)
        axes.plot(centres, middle, "-o", markersize=3.5, color=palette[policy], linewidth=1.4)
        ends.append((float(middle[-1]), policy, palette[policy]))
    axes.set_xlabel("requests running on a replica at the end of a window")
    axes.set_ylabel("SM clock, MHz")
    axes.set_ylim(bottom=0)
    label_ends(axes, ends, 3.0)
    caption = (
        "Median effective SM clock of the windows with so many running requests; the band holds "
        "the middle half of them. All seeds and replicas together."
    )
    return Plot("Clocks chosen by load", caption, inline_svg(figure, f"Clocks by load. {caption}"))


def _by_load(load: np.ndarray, clock: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centres of bins with about equally many windows, and quartiles of the clock in each."""
    edges = np.unique(np.quantile(load, np.linspace(0, 1, LOAD_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, load, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for place in range(max(len(edges) - 1, 1)):
        inside = bins == place
        if inside.any():
            low, middle, high = np.quantile(clock[inside], (0.25, 0.5, 0.75))
            rows.append((load[inside].mean(), middle, low, high))
    return tuple(np.array(rows).T)
