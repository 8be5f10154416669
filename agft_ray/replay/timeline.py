"""What the time line of a replay says of the fleet: energy, counters, clocks, and oddities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from agft_ray.replay.result import ReplayResult, ReplicaStatus

COLUMNS = 60
"""Points of a group's clock over time."""
MIN_SEEN_SHARE = 1e-6
"""Of a column; below that a duration is the rounding error of the times it is the difference of."""

Interval = tuple[ReplicaStatus, ReplicaStatus]
"""Two successive sightings of a replica. What happened between is put down to the first's role."""


def intervals(result: ReplayResult) -> Iterator[Interval]:
    """All of the time line, replica by replica."""
    for sightings in _sightings(result).values():
        yield from pairwise(sightings)


def _sightings(result: ReplayResult) -> dict[str, list[ReplicaStatus]]:
    found: dict[str, list[ReplicaStatus]] = {}
    for status in result.timeline:
        for replica in status.replicas:
            found.setdefault(replica.replica, []).append(replica)
    return found


def growth(interval: Interval, name: str) -> float:
    """Of a counter: one that went back was reset to zero between."""
    before, after = (float(getattr(status, name)) for status in interval)
    return after - before if after >= before else after


def edges(intervals: Sequence[Interval]) -> np.ndarray:
    """The bounds of the columns of a clock over time, shape (COLUMNS + 1,), simulated seconds."""
    times_s = [status.t_s for interval in intervals for status in interval] or [0.0]
    return np.linspace(min(times_s), max(times_s), COLUMNS + 1)


def mean_clocks_mhz(intervals: Sequence[Interval], edges_s: np.ndarray) -> tuple[float | None, ...]:
    """Mean clock between each two edges, over all replicas then seen: integral over duration."""
    spans = [(a.t_s, b.t_s, a.sm_clock_mhz, b.sm_clock_mhz) for a, b in intervals if b.t_s > a.t_s]
    start_s, end_s, first_mhz, last_mhz = np.array(spans).reshape(-1, 4).T
    slope = (last_mhz - first_mhz) / (end_s - start_s)
    elapsed_s = [np.clip(edge_s, start_s, end_s) - start_s for edge_s in edges_s]
    durations_s = np.diff([e.sum() for e in elapsed_s])
    integrals = np.diff([(first_mhz * e + slope * e**2 / 2).sum() for e in elapsed_s])
    shortest_s = MIN_SEEN_SHARE * np.diff(edges_s)
    return tuple(
        float(integral / duration_s) if duration_s > least_s else None
        for integral, duration_s, least_s in zip(integrals, durations_s, shortest_s, strict=True)
    )


def replica_notes(result: ReplayResult) -> Iterator[str]:
    """A sentence for whatever makes a replica's figures less than those of the whole run."""
    for name, sightings in _sightings(result).items():
        yield from _replica_notes(name, sightings, result)


def _replica_notes(
    name: str, sightings: Sequence[ReplicaStatus], result: ReplayResult
) -> Iterator[str]:
    first, last = sightings[0], sightings[-1]
    if first not in result.timeline[0].replicas:
        yield f"Replica {name} appeared during the run, counted from {first.t_s:.1f} s."
    if last not in result.timeline[-1].replicas or not last.alive:
        yield f"Replica {name} vanished during the run, counted until {last.t_s:.1f} s."
    if len({status.role for status in sightings}) > 1:
        yield f"Replica {name} changed its role; energy and tokens follow, to within a poll."
    counters = ("energy_j", "generation_tokens", "windows")
    if any(getattr(b, c) < getattr(a, c) for a, b in pairwise(sightings) for c in counters):
        yield f"Counters of replica {name} restarted; what fell between two polls is missing."
