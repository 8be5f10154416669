"""Latency bounds of the oracle: over all seeds together, and while a run still goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from agft_ray.results.distribution import Distribution
from agft_ray.results.record import RunRecord
from agft_ray.settings import SloConfig
from agft_ray.study.run import AbandonedError, Watch
from agft_ray.workloads.requests import RequestTimings


@dataclass(frozen=True, slots=True)
class Bound:
    """What the mean and the p99 of one latency may be, of so many requests of one seed."""

    count: int
    mean_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the latencies of a plan of clocks may be with one seed."""

    ttft: Bound
    tpot: Bound
    e2e: Bound

    @classmethod
    def of(cls, default: RunRecord, slo: SloConfig, bound: float) -> Bounds:
        """With an SLO: its statistic of what it bounds within it. Without one: mean and p99 of all
        three at most `bound` above default clocks, as a share."""
        latencies = (default.ttft_s, default.tpot_s, default.e2e_s)
        limits_s = (slo.ttft_s, slo.tpot_s, slo.e2e_s)
        if limits_s == (None, None, None):
            return cls(*(_raised(latency, 1.0 + bound) for latency in latencies))
        is_mean = slo.statistic == "mean"
        pairs = zip(latencies, limits_s, strict=True)
        return cls(
            *(
                Bound(each.count, limit if is_mean else None, None if is_mean else limit)
                for each, limit in pairs
            )
        )


def _raised(latency: Distribution, factor: float) -> Bound:
    mean_s, p99_s = latency.mean, latency.p99
    return Bound(
        latency.count,
        None if mean_s is None else mean_s * factor,
        None if p99_s is None else p99_s * factor,
    )


def allowed(bounds: Sequence[Bounds], runs: Sequence[RunRecord]) -> bool:
    """Whether runs with several seeds, each with its own bounds, keep them together.

    Of each latency relative to its bound, the mean over seeds of the runs' means is at most 1, and
    so is the median over seeds of their p99s: a p99 hangs on a few requests of one seed.
    """
    means, p99s = [], []
    for name in ("ttft", "tpot", "e2e"):
        pairs: list[tuple[Bound, Distribution]] = [
            (getattr(bound, name), getattr(run, f"{name}_s"))
            for bound, run in zip(bounds, runs, strict=True)
        ]
        means.append(_relative([(latency.mean, bound.mean_s) for bound, latency in pairs]))
        p99s.append(_relative([(latency.p99, bound.p99_s) for bound, latency in pairs]))
    kept = all(not values or fmean(values) <= 1.0 for values in means)
    return kept and all(not values or median(values) <= 1.0 for values in p99s)


def _relative(pairs: Sequence[tuple[float | None, float | None]]) -> list[float]:
    return [value / bound for value, bound in pairs if value is not None and bound]


class BoundsWatch(Watch):
    """Abandons a run that is certain to break a bound, however the rest of it fares.

    The mean is broken once the sum exceeds what it may be for all requests, of all seeds if those
    were to take no time; the p99 (between two order statistics) once so many requests are above it
    that the lower of the two must be. With several seeds a p99 alone is not certain to break it.
    """

    def __init__(self, bounds: Bounds, seeds: int = 1) -> None:
        tracked = (bounds.ttft, bounds.tpot, bounds.e2e)
        self._tracks = [_Track(bound if seeds == 1 else _shared(bound, seeds)) for bound in tracked]

    def on_request(self, timings: RequestTimings) -> None:
        """Count a finished request."""
        latencies_s = (timings.ttft_s, timings.tpot_s, timings.e2e_s)
        for track, latency_s in zip(self._tracks, latencies_s, strict=True):
            if latency_s is not None:
                track.take(latency_s)


def _shared(bound: Bound, seeds: int) -> Bound:
    return Bound(bound.count, None if bound.mean_s is None else bound.mean_s * seeds, None)


class _Track:
    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._sum_s = 0.0
        self._above = 0
        self._too_many = bound.count - int(0.99 * max(bound.count - 1, 0))

    def take(self, latency_s: float) -> None:
        bound = self._bound
        self._sum_s += latency_s
        if bound.mean_s is not None and self._sum_s > bound.mean_s * bound.count * (1 + 1e-9):
            raise AbandonedError
        if bound.p99_s is not None and latency_s > bound.p99_s:
            self._above += 1
            if self._above >= self._too_many:
                raise AbandonedError
