"""Energy against latency, the plot that a report begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agft_ray.report.data import Section
from agft_ray.results.chart_style import DEFAULT_INK, colours, inline_svg, new_figure, plain_axes
from agft_ray.results.comparison import PolicyStanding, standings
from agft_ray.results.labels import DEFAULT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_GAP = 0.07
"""Between two labelled fixed clocks, as a share of an axis."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture as inline SVG, its heading and its caption."""

    heading: str
    caption: str
    svg: str


def trade_off(section: Section) -> Plot | None:
    """Energy against latency: every policy, and the static frontier."""
    panels = (("tpot_s.mean", "mean TPOT, ms"), ("ttft_s.mean", "mean TTFT, ms"))
    needed = {"energy_j", *(name for name, _ in panels)}
    found = {s.policy: s for s in standings(section.records) if needed <= s.values.keys()}
    frontier = [found[policy] for policy in section.frontier if policy in found]
    default = found.get(DEFAULT)
    shown = [s for s in found.values() if s not in frontier]
    if not shown:
        return None
    figure = new_figure(4.0)
    palette = colours([s.policy for s in shown], DEFAULT)
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        plain_axes(axes)
        axes.set_xlabel(label)
        _focus(axes, [*shown, *frontier], default, name)
        if frontier:
            _frontier_line(axes, frontier, name)
        for standing in shown:
            _point(axes, standing, name, palette[standing.policy])
        _names(axes, shown, name, palette)
        if name == "tpot_s.mean":
            axes.set_ylabel("energy, kJ")
    caption = (
        "Each point is the mean over seeds, with 95 % intervals; lower left is better. "
        + ("The grey line joins the fixed clocks (MHz): the static frontier. " if frontier else "")
        + "Clocks that are too slow for the axes are left out."
    )
    return Plot("Energy against latency", caption, inline_svg(figure, "Energy against latency"))


def _frontier_line(axes: Axes, frontier: list[PolicyStanding], name: str) -> None:
    points = [(_mean(s, name) * 1e3, _mean(s, "energy_j") / 1e3) for s in frontier]
    axes.plot(*zip(*points, strict=True), "-o", color="#b6bcc4", markersize=3, zorder=1)
    low, high = axes.get_xlim()
    top = max(y for _, y in points)
    labelled = [(-1.0, -1.0)]
    for (x, y), standing in zip(points, frontier, strict=True):
        share = (x - low) / (high - low), y / top
        apart = max(abs(a - b) for a, b in zip(share, labelled[-1], strict=True))
        if 0 < share[0] < 0.95 and apart > LABEL_GAP:
            labelled.append(share)
            axes.annotate(
                standing.policy.partition(":")[2],
                (x, y),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
                color=DEFAULT_INK,
            )


def _point(axes: Axes, standing: PolicyStanding, name: str, colour: str) -> None:
    x, y = standing.values[name], standing.values["energy_j"]
    axes.errorbar(
        x.mean * 1e3,
        y.mean / 1e3,
        xerr=(x.half_width or 0.0) * 1e3,
        yerr=(y.half_width or 0.0) / 1e3,
        fmt="o",
        markersize=6,
        color=colour,
        elinewidth=1,
        zorder=3,
    )


def _names(axes: Axes, shown: list[PolicyStanding], name: str, palette: dict[str, str]) -> None:
    """One below the other at the upper right, where no good policy lies, with lines to points."""
    low, high = axes.get_xlim()
    inside = [s for s in shown if low < _mean(s, name) * 1e3 < high]
    by_energy = sorted(inside, key=lambda s: (-_mean(s, "energy_j"), _mean(s, name)))
    for place, standing in enumerate(by_energy):
        axes.annotate(
            standing.policy,
            (_mean(standing, name) * 1e3, _mean(standing, "energy_j") / 1e3),
            xytext=(0.5, 0.95 - 0.065 * place),
            textcoords="axes fraction",
            color=palette[standing.policy],
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": palette[standing.policy],
                "linewidth": 0.6,
                "relpos": (0.0, 0.5),
                "shrinkB": 4,
            },
        )


def _focus(
    axes: Axes, found: list[PolicyStanding], default: PolicyStanding | None, name: str
) -> None:
    """Axes around what is at most twice default clocks' latency."""
    values = [_mean(standing, name) * 1e3 for standing in found]
    limit = 2.2 * (_mean(default, name) * 1e3 if default else min(values))
    kept = [value for value in values if value <= limit]
    span = max(kept) - min(kept) or max(kept)
    axes.set_xlim(min(kept) - 0.08 * span, max(kept) + 0.3 * span)


def _mean(standing: PolicyStanding, name: str) -> float:
    return standing.values[name].mean
