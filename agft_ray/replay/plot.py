"""A picture of a replay: `agft-ray plot DIRECTORY` (needs the extra `report`)."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agft_ray.errors import AgftError
from agft_ray.results.chart_style import new_figure, plain_axes

SMOOTH_S = 30.0
COLOURS = {"tuned": "#1b7f4d", "holdout": "#b3471d"}


def plot(directory: Path, out: Path) -> None:
    """Draw SM clock, power and energy per output token over time, tuned against holdout.

    Reads the `timeline.csv` of a replay; the format of `out` is that of its suffix (svg, png,
    pdf). Raises `AgftError` if there is no time line or matplotlib is not installed.
    """
    figure = new_figure(6.4)
    replicas = _read(directory / "timeline.csv")
    clock, power, energy = figure.subplots(3, 1, sharex=True)
    for (role, _), rows in sorted(replicas.items()):
        t_s = rows[:, 0] - min(series[0, 0] for series in replicas.values())
        style = {"color": COLOURS[role], "alpha": 0.85, "linewidth": 1.2, "label": role}
        clock.plot(t_s, _smooth(t_s, rows[:, 1]), **style)
        power.plot(t_s, _rate(rows[:, 0], rows[:, 2]), **style)
        tokens = rows[:, 3] - rows[0, 3]
        seen = tokens > 500
        energy.plot(t_s[seen], (rows[:, 2] - rows[0, 2])[seen] / tokens[seen], **style)
    for axes, label in (
        (clock, "SM clock, MHz"),
        (power, "power, W"),
        (energy, "energy per output\ntoken so far, J"),
    ):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        plain_axes(axes)
    energy.set_xlabel("simulated time, s")
    handles, labels = clock.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    clock.legend(unique.values(), unique.keys(), loc="lower right", frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _read(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """By role and replica: rows of (time, SM clock, energy, output tokens)."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise AgftError(f"{path}: {error.strerror}; name the directory of a replay") from None
    replicas: dict[tuple[str, str], list[Sequence[float]]] = defaultdict(list)
    for row in rows:
        columns = ("t_s", "sm_clock_mhz", "energy_j", "generation_tokens")
        series = replicas[row["role"], row["replica"]]
        if not series or float(row["t_s"]) > series[-1][0]:
            series.append([float(row[name]) for name in columns])
    if not replicas:
        raise AgftError(f"{path} is empty: the server had no status page to draw from")
    return {key: np.array(series) for key, series in replicas.items() if len(series) > 1}


def _smooth(t_s: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean over the last `SMOOTH_S`."""
    starts = np.searchsorted(t_s, t_s - SMOOTH_S)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _rate(t_s: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Rise of a counter per second over the last `SMOOTH_S`."""
    starts = np.minimum(np.searchsorted(t_s, t_s - SMOOTH_S), np.arange(len(t_s)) - 1).clip(0)
    spans = np.maximum(t_s - t_s[starts], 1e-9)
    rates: np.ndarray = (counter - counter[starts]) / spans
    rates[0] = rates[1]
    return rates
