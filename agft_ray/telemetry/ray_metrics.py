"""Ray Serve's own metrics of a replica, read from a node agent's Prometheus text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from agft_ray.telemetry.prometheus_text import read_series
from agft_ray.types import ServeSample, ServeWindow

_REQUESTS = "ray_serve_deployment_request_counter_total"
_LATENCY_SUM = "ray_serve_deployment_processing_latency_ms_sum"
_LATENCY_COUNT = "ray_serve_deployment_processing_latency_ms_count"
_IN_FLIGHT = "ray_serve_replica_processing_queries"
_NAMES = frozenset({_REQUESTS, _LATENCY_SUM, _LATENCY_COUNT, _IN_FLIGHT})
STATUS_ROUTE = "/agft/status"
"""Our own status page; its requests are no load on the engine."""


@dataclass(frozen=True, slots=True)
class ReplicaSeries:
    """The series of one replica in one scrape, wall seconds; None where a series is missing.

    The handle-side queue is not among them: it is kept per deployment on the handle's node.
    """

    requests: float | None = None
    latency_sum_s: float | None = None
    latency_count: float | None = None
    in_flight: float | None = None


def parse(lines: Iterable[str]) -> dict[str, ReplicaSeries]:
    """The series by replica (the metrics' `replica` label, unique in a cluster), routes summed.

    What is no number is passed over, so its series counts as missing.
    """
    values: dict[str, dict[str, float]] = {}
    for name, tags, value in read_series(lines, _NAMES):
        is_own = tags.get("route", "").endswith(STATUS_ROUTE)
        if "replica" not in tags or math.isnan(value) or is_own:
            continue
        series = values.setdefault(tags["replica"], {})
        series[name] = series.get(name, 0.0) + value
    return {replica: _series(found) for replica, found in values.items()}


def _series(found: dict[str, float]) -> ReplicaSeries:
    latency_sum_ms = found.get(_LATENCY_SUM)
    return ReplicaSeries(
        requests=found.get(_REQUESTS),
        latency_sum_s=None if latency_sum_ms is None else latency_sum_ms / 1000,
        latency_count=found.get(_LATENCY_COUNT),
        in_flight=found.get(_IN_FLIGHT),
    )


def to_sample(series: ReplicaSeries, *, t_s: float, speed: float) -> ServeSample:
    """A scrape at `t_s` of the loop's clock; wall latencies become the loop's seconds."""
    latency_sum_s = series.latency_sum_s
    return ServeSample(
        t_s=t_s,
        requests=series.requests,
        latency_sum_s=None if latency_sum_s is None else latency_sum_s * speed,
        latency_count=series.latency_count,
        in_flight=series.in_flight,
    )


class ServeMetrics:
    """The last two different scrapes of one replica, and the window between them."""

    def __init__(self, *, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._samples: tuple[ServeSample, ...] = ()

    def push(self, sample: ServeSample) -> None:
        """Keep a scrape; the same one delivered again is ignored."""
        if not self._samples or sample.t_s > self._samples[-1].t_s:
            self._samples = (*self._samples[-1:], sample)

    def window(self, now_s: float) -> ServeWindow | None:
        """Rates between the last two scrapes.

        None where the request counter is missing, went backwards or is older than `max_age_s`:
        absent data are never read as no requests.
        """
        if len(self._samples) < 2 or now_s - self._samples[-1].t_s > self._max_age_s:
            return None
        before, after = self._samples
        requests = _delta(before.requests, after.requests)
        if requests is None:
            return None
        latency_s, count = (
            _delta(before.latency_sum_s, after.latency_sum_s),
            _delta(before.latency_count, after.latency_count),
        )
        return ServeWindow(
            request_rate_per_s=requests / (after.t_s - before.t_s),
            mean_latency_s=latency_s / count if latency_s is not None and count else None,
            in_flight=after.in_flight,
            age_s=now_s - after.t_s,
        )


def _delta(before: float | None, after: float | None) -> float | None:
    if before is None or after is None or after < before:
        return None
    return after - before
