"""Means over seeds and medians of ratios, with their 95 % intervals."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds; `half_width` of its 95 % interval is None for a single seed."""

    count: int
    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of at least one value, else None."""
        n = len(values)
        if not n:
            return None
        mean = math.fsum(values) / n
        if n == 1:
            return cls(1, mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(n, mean, t_quantile(n - 1) * math.sqrt(variance / n))


@functools.cache
def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t below which |T| stays with probability `level`, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < level:
        high *= 2.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        if t_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return high


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's t: the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    square = math.cos(theta) ** 2
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= square * power / (power + 1)
    if odd:
        return 2.0 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def median_interval(values: Sequence[float], *, seed: int) -> tuple[float, float, float]:
    """The median and the bounds of its 95 % bootstrap percentile interval."""
    rng = np.random.default_rng(seed)
    samples = rng.choice(values, (BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return statistics.median(values), float(low), float(high)
