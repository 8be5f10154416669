"""Rows of one simulated run, on their way to files: memory is constant in the run's length."""

from __future__ import annotations

import csv
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agft_ray.files import replacing
from agft_ray.results.clock_regret import ClockRegret
from agft_ray.results.distribution import Distribution, Slo
from agft_ray.results.learning import FleetWindows
from agft_ray.workloads.requests import RequestTimings

if TYPE_CHECKING:
    from _csv import Writer

    from agft_ray.virtual.run import GridWindow

REQUEST_COLUMNS = (
    "replica",
    "request_id",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "ttft_s",
    "tpot_s",
    "e2e_s",
)
CHUNK = 65536
"""Values held in memory of each column."""


class Spill:
    """Numbers in a temporary file, 8 bytes each; the file vanishes with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._chunk = array("d")

    def append(self, value: float) -> None:
        """Add one, at the end."""
        self._chunk.append(value)
        if len(self._chunk) == CHUNK:
            self._flush()

    def values(self) -> np.ndarray:
        """All of them, in order."""
        self._flush()
        self._file.seek(0)
        found: np.ndarray = np.fromfile(self._file)
        self._file.seek(0, 2)
        return found

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def _flush(self) -> None:
        self._chunk.tofile(self._file)
        self._chunk = array("d")


@dataclass(slots=True)
class RunRows:
    """Takes a run's requests and windows; keeps latencies and the fleet's windows in files.

    With writers, each row goes to a CSV file, too.
    """

    replicas: int
    slo: Slo | None = None
    requests: int = 0
    kept_slo: int = 0
    ttft_s: Spill = field(default_factory=Spill)
    tpot_s: Spill = field(default_factory=Spill)
    e2e_s: Spill = field(default_factory=Spill)
    clock_sum: float = 0.0
    clock_time_s: float = 0.0
    busy_windows: int = 0
    over_bound: int = 0
    """Of the busy windows of each replica."""
    _windows: tuple[Spill, ...] = field(default_factory=lambda: tuple(Spill() for _ in range(5)))
    """`FleetWindows`, then regret and the energy at the best clocks."""
    _pending: dict[int, list[float]] = field(default_factory=dict)
    """By index of the grid: how many replicas have told of it, and their sums."""
    _request_rows: Writer | None = None
    _window_rows: Writer | None = None

    def on_request(self, replica: int, timings: RequestTimings) -> None:
        """One finished request."""
        tpot_s = timings.tpot_s
        self.requests += 1
        self.ttft_s.append(timings.ttft_s)
        self.e2e_s.append(timings.e2e_s)
        if tpot_s is not None:
            self.tpot_s.append(tpot_s)
        if self.slo is not None:
            self.kept_slo += self.slo.is_met((timings.ttft_s, tpot_s, timings.e2e_s))
        if self._request_rows is not None:
            self._request_rows.writerow(
                (
                    replica,
                    timings.request_id,
                    timings.arrival_s,
                    timings.prompt_tokens,
                    timings.output_tokens,
                    timings.ttft_s,
                    tpot_s,
                    timings.e2e_s,
                )
            )

    def on_window(self, window: GridWindow) -> None:
        """One window of one replica; each replica tells of its windows in their order."""
        duration_s = window.end_s - window.start_s
        self.clock_sum += window.sm_clock_mhz * duration_s
        self.clock_time_s += duration_s
        self.busy_windows += window.busy_s > 0.0
        self.over_bound += window.over_bound
        latencies = (window.itl_sum_s, window.itl_count)
        values = (1, window.energy_j, *latencies, window.regret_j, window.best_energy_j)
        sums = self._pending.setdefault(window.index, [0.0] * len(values))
        for place, value in enumerate(values):
            sums[place] += value
        if sums[0] == self.replicas:
            self._close_window(self._pending.pop(window.index))
        if self._window_rows is not None:
            self._window_rows.writerow(astuple(window))

    def _close_window(self, sums: list[float]) -> None:
        for spill, value in zip(self._windows, sums[1:], strict=True):
            spill.append(value)

    def windows(self) -> FleetWindows:
        """The fleet's windows, of those that every replica has told of."""
        return FleetWindows(*(spill.values() for spill in self._windows[:3]))

    def clock_regret(self) -> ClockRegret:
        """Of the same windows."""
        regret_j, best_energy_j = (spill.values() for spill in self._windows[3:])
        return ClockRegret.of(
            regret_j, best_energy_j, over_bound=self.over_bound, busy=self.busy_windows
        )

    @property
    def sm_clock_mhz(self) -> float | None:
        """Mean over time and replicas."""
        return self.clock_sum / self.clock_time_s if self.clock_time_s else None

    def distributions(self) -> tuple[Distribution, Distribution, Distribution]:
        """TTFT, TPOT and E2E, exact, one column in memory at a time."""
        ttft_s, tpot_s = (Distribution.of_array(s.values()) for s in (self.ttft_s, self.tpot_s))
        return ttft_s, tpot_s, Distribution.of_array(self.e2e_s.values())

    def close(self) -> None:
        """Close its files."""
        for spill in (self.ttft_s, self.tpot_s, self.e2e_s, *self._windows):
            spill.close()


@contextmanager
def run_rows(replicas: int, slo: Slo | None, folder: Path | None) -> Iterator[RunRows]:
    """Rows of one run; in a folder, `requests.csv` and `windows.csv`, whole or not at all."""
    rows = RunRows(replicas, slo)
    with ExitStack() as stack:
        stack.callback(rows.close)
        if folder is not None:
            from agft_ray.virtual.run import GridWindow

            folder.mkdir(parents=True, exist_ok=True)
            names = [column.name for column in fields(GridWindow)]
            rows._request_rows = stack.enter_context(
                _table(folder / "requests.csv", REQUEST_COLUMNS)
            )
            rows._window_rows = stack.enter_context(_table(folder / "windows.csv", names))
        yield rows


@contextmanager
def _table(path: Path, header: Any) -> Iterator[Writer]:
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        yield writer


def read_columns(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of one of these files as numbers, an empty cell as NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
        found = np.genfromtxt(
            file, delimiter=",", usecols=[header.index(name) for name in names], ndmin=2
        )
    return {name: found[:, place] for place, name in enumerate(names)}
