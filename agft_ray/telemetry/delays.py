"""How long something took, over and over: a histogram that can be handed on and added up."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

UPPER_MS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 20.0, 50.0, 100.0, 1000.0)
"""Upper ends of the bins; what took longer is in the last."""


class Delays:
    """Counts by bin."""

    def __init__(self, counts: Iterable[int] = (0,) * len(UPPER_MS)) -> None:
        self.counts = list(counts)

    def add(self, delay_s: float) -> None:
        """Count one."""
        bins = (index for index, upper_ms in enumerate(UPPER_MS) if 1e3 * delay_s <= upper_ms)
        self.counts[next(bins, -1)] += 1

    def merge(self, counts: Iterable[int]) -> None:
        """Count those of another histogram, too."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]

    def percentile_ms(self, share: float) -> float:
        """What this share of all took at most: the upper end of a bin; 0 if there are none."""
        total = sum(self.counts)
        reached = zip(UPPER_MS, accumulate(self.counts), strict=True)
        return next((upper_ms for upper_ms, n in reached if total and n >= share * total), 0.0)

    def lines(self, width: int = 50) -> list[str]:
        """A row a bin, up to the last one that holds any."""
        total, most = sum(self.counts), max(self.counts)
        last = max((index for index, count in enumerate(self.counts) if count), default=-1)
        rows = zip((0.0, *UPPER_MS), UPPER_MS, self.counts[: last + 1], strict=False)
        return [
            f"{lower:7g} to {upper:7g} ms {n / total:6.1%} {'#' * round(width * n / most)}".rstrip()
            for lower, upper, n in rows
        ]
