"""Latencies of the requests of late, mean and p99, as they would be at default clocks.

An engine counts TTFT, TPOT and E2E of each request in buckets on a logarithmic scale. A window's
counts are moved down the scale by the ratio that its plan is predicted to have, and added to
discounted ones, which so are of default clocks whatever was in force. The assumption: percentiles
go as the mean, and the mean TPOT of requests as that of tokens. Where they grow faster, what is
measured at slower clocks raises what is kept here, and the bound in seconds holds all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from agft_ray.policy.phases.latency import Ratios
from agft_ray.types import BUCKETS_PER_DECADE, LATENCY_BUCKETS, Window

LATENCIES = ("ttft", "tpot", "e2e")
MIN_MEAN, MIN_P99 = 20.0, 100.0
"""Requests, discounted, below which a mean, or a p99, is not known."""
MEMORY_REQUESTS = 400.0
"""So many are remembered, however long it takes until they have come."""
_EDGES = np.arange(LATENCY_BUCKETS + 1)
_MIDDLES_S = 1e-3 * 10 ** ((_EDGES[:-1] + 0.5) / BUCKETS_PER_DECADE)


class Tails:
    """Counts of TTFT, TPOT and E2E by bucket, discounted, at default clocks."""

    def __init__(self) -> None:
        self._counts = np.zeros((len(LATENCIES), LATENCY_BUCKETS))

    def add(self, window: Window, ratios: Ratios, memory_s: float) -> None:
        """Count a window's requests, whose latencies had these ratios (1,) to default clocks."""
        forgotten = math.exp(-window.duration_s / memory_s)
        for row, name in enumerate(LATENCIES):
            counts = np.array(getattr(window, f"{name}_histogram").counts, dtype=float)
            new = float(counts.sum())
            if new > 0:
                shift = BUCKETS_PER_DECADE * math.log10(float(getattr(ratios, name)[0]))
                below = np.concatenate([[0.0], counts.cumsum()])
                counts = np.diff(np.interp(_EDGES + shift, _EDGES, below, left=0.0, right=new))
                counts[0] += new - counts.sum()
            self._counts[row] *= max(forgotten, 1.0 - new / MEMORY_REQUESTS)
            self._counts[row] += counts

    def mean_s(self, name: str) -> float | None:
        """The mean of a latency at default clocks; None while it is not known."""
        counts = self._counts[LATENCIES.index(name)]
        requests = counts.sum()
        return float(counts @ _MIDDLES_S / requests) if requests >= MIN_MEAN else None

    def p99_s(self, name: str) -> float | None:
        """The 99th percentile of a latency at default clocks; None while it is not known."""
        counts = self._counts[LATENCIES.index(name)]
        below = counts.cumsum()
        if below[-1] < MIN_P99:
            return None
        at = int(np.searchsorted(below, 0.99 * below[-1]))
        part = 1.0 - (below[at] - 0.99 * below[-1]) / counts[at]
        return float(1e-3 * 10 ** ((at + part) / BUCKETS_PER_DECADE))

    def snapshot(self) -> dict[str, Any]:
        """JSON-able, floats exact."""
        return dict(zip(LATENCIES, self._counts.tolist(), strict=True))

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any]) -> Tails:
        """The counts of a snapshot; raises `ValueError` if they are malformed."""
        tails = cls()
        counts = np.array([snapshot[name] for name in LATENCIES], dtype=float)
        if counts.shape != tails._counts.shape or not np.isfinite(counts).all() or counts.min() < 0:
            raise ValueError(f"counts of latencies are not {tails._counts.shape} amounts")
        tails._counts = counts
        return tails
