"""When requests arrive: processes in continuous time, without end, in seconds from 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from agft_ray.errors import TraceError
from agft_ray.workloads.lengths import BLOCK

HOURS_A_WEEK = 168.0


def poisson(rate_per_s: float, random: np.random.Generator) -> Iterator[float]:
    """A Poisson process: exponential gaps."""
    return _renewal(lambda count: random.exponential(1 / rate_per_s, count))


def gamma(rate_per_s: float, cv: float, random: np.random.Generator) -> Iterator[float]:
    """A renewal process with gamma gaps of mean `1 / rate_per_s` and coefficient of variation `cv`.

    Above 1 arrivals come in bursts, below 1 they are more even than Poisson's.
    """
    shape = cv**-2
    scale_s = 1.0 / (rate_per_s * shape)
    return _renewal(lambda count: random.gamma(shape, scale_s, count))


def groups(rate_per_s: float, size: int, random: np.random.Generator) -> Iterator[float]:
    """`size` arrivals at once, groups as a Poisson process; `rate_per_s` is of single arrivals."""
    for t_s in poisson(rate_per_s / size, random):
        yield from itertools.repeat(t_s, size)


def _renewal(draw_gaps_s: Callable[[int], np.ndarray]) -> Iterator[float]:
    blocks = (draw_gaps_s(BLOCK).tolist() for _ in itertools.count())
    return itertools.accumulate(itertools.chain.from_iterable(blocks))


@dataclass(frozen=True, slots=True)
class WeeklyRate:
    """A rate that repeats every week: linear between its points, across the end of the week too."""

    hours: tuple[float, ...]
    """Hours since the start of the week, ascending."""
    rates: tuple[float, ...]
    """Rates at these hours, in any unit."""

    @classmethod
    def read(cls, path: str | Path, column: str) -> Self:
        """From CSV with the columns `hour_of_week` and `column`.

        Raises `TraceError` for a file that cannot be read and for what is no such rate.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
        lines = [line.split(",") for line in text.splitlines()] or [[""]]
        names = ("hour_of_week", column)
        if missing := [name for name in names if name not in lines[0]]:
            raise TraceError(f"{path}: line 1: must name the columns {', '.join(missing)}")
        indices = [lines[0].index(name) for name in names]
        points: list[tuple[float, float]] = []
        for number, cells in enumerate(lines[1:], 2):
            try:
                points.append(_point([cells[i] for i in indices], after=points[-1:]))
            except (ValueError, IndexError) as error:
                raise TraceError(f"{path}: line {number}: {error}") from None
        if not any(rate for _, rate in points):
            raise TraceError(f"{path}: must hold a rate above 0 in the column {column}")
        return cls(tuple(hour for hour, _ in points), tuple(rate for _, rate in points))

    @property
    def mean(self) -> float:
        """The rate's mean over the week, exactly."""
        hours = np.array([*self.hours, self.hours[0] + HOURS_A_WEEK])
        rates = np.array([*self.rates, self.rates[0]])
        return float(np.sum(np.diff(hours) * (rates[1:] + rates[:-1]) / 2)) / HOURS_A_WEEK

    def at(self, hours: np.ndarray) -> np.ndarray:
        """The rate at these hours since the start of some week."""
        return np.asarray(np.interp(hours, self.hours, self.rates, period=HOURS_A_WEEK))

    def arrivals(
        self, rate_per_s: float, start_hour: float, random: np.random.Generator
    ) -> Iterator[float]:
        """An inhomogeneous Poisson process whose mean over a week is `rate_per_s`.

        Begins at `start_hour` of the week. By thinning (Lewis and Shedler 1979): arrivals at the
        highest rate, each kept with the share that the rate then is of the highest.
        """
        highest = max(self.rates)
        candidates_per_s = rate_per_s * highest / self.mean
        t_s = 0.0
        for _ in itertools.count():
            times_s = t_s + np.cumsum(random.exponential(1 / candidates_per_s, BLOCK))
            t_s = float(times_s[-1])
            kept = random.random(BLOCK) * highest < self.at(start_hour + times_s / 3600)
            yield from times_s[kept].tolist()


def _point(cells: list[str], *, after: list[tuple[float, float]]) -> tuple[float, float]:
    hour, rate = map(float, cells)
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"rate: must be a number, 0 or more, got {rate}")
    least = after[0][0] if after else -1.0
    if not (0 <= hour < HOURS_A_WEEK and hour > least):
        raise ValueError(f"hour_of_week: must rise from line to line within 0..168, got {hour}")
    return hour, rate
