"""Latencies of many requests in a few numbers, and the bounds that each must keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds that one request must keep, in seconds; None is no bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def is_met(self, latencies_s: Sequence[float | None]) -> bool:
        """Whether TTFT, TPOT and E2E keep the bounds; what was not measured breaks none."""
        bounds_s = (self.ttft_s, self.tpot_s, self.e2e_s)
        return all(
            bound is None or value is None or value <= bound
            for bound, value in zip(bounds_s, latencies_s, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles (NumPy's default: linear interpolation between order statistics)."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution:
        """Of those that are not None."""
        return cls.of_array(np.array([value for value in values if value is not None]))

    @classmethod
    def of_array(cls, values: np.ndarray) -> Distribution:
        """Of all of them."""
        if not values.size:
            return cls()
        p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
        return cls(values.size, float(values.mean()), p50, p95, p99)
