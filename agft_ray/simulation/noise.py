"""Random numbers that depend on a seed and a key alone, not on what was drawn before."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agft_ray.simulation.decode_series import Series
    from agft_ray.simulation.profiles import ClockChangeProfile, NoiseProfile

_SCALE = 2.0**-64
_CLOCK_DELAY, _STEP, _OUTLIER, _COUNTER = 1, 2, 3, 4
"""Streams of random numbers; a `Device` has others."""
_P95_SCORE = 1.6448536269514722
"""95th percentile of the standard normal distribution."""
_MARGIN_SD = 4.0


def standard_normal(seed: int, stream: int, key: float) -> float:
    """A draw from the standard normal distribution: a hash of the arguments by Box and Muller.

    The same arguments give the same number on every machine; other seeds, streams or keys an
    independent one.
    """
    message = struct.pack("<Qqd", seed % 2**64, stream, key)
    radius, angle = struct.unpack("<QQ", hashlib.blake2b(message, digest_size=16).digest())
    return math.sqrt(-2.0 * math.log((radius + 1) * _SCALE)) * math.cos(math.tau * angle * _SCALE)


def change_delay_s(change: ClockChangeProfile, seed: int, calls: int) -> float:
    """Until a change of clock is in force: log-normal, by how many calls there have been."""
    sigma = math.log(change.p95_to_median) / _P95_SCORE
    return change.median_s * math.exp(sigma * standard_normal(seed, _CLOCK_DELAY, calls))


def counter_j(energy_j: float, before_j: float, sd_j: float, seed: int, t_s: float) -> float:
    """What an energy counter shows of `energy_j` from its update at `t_s` on.

    It was at `before_j`, and never runs backwards; `sd_j` is the noise's standard deviation.
    """
    if not sd_j:
        return energy_j
    return max(energy_j + sd_j * standard_normal(seed, _COUNTER, t_s), before_j)


@dataclass(frozen=True, slots=True)
class StepNoise:
    """How much longer steps take than the profile says: log-normal with mean 1, and rare outliers.

    The mean over steps is `1 + outlier_share (outlier_factor - 1)`.
    """

    cv: float
    outlier_share: float
    outlier_factor: float

    @classmethod
    def of(cls, noise: NoiseProfile) -> StepNoise:
        """As a profile says."""
        return cls(noise.step_cv, noise.outlier_share, noise.outlier_factor)

    def factor(self, seed: int, start_s: float, steps: int = 1) -> float:
        """The time of so many like steps from `start_s` on, relative to what it is without noise.

        One draw, with the mean and the variance that the mean of `steps` independent steps has:
        `cv^2 / steps` (log-normal again, as Fenton and Wilkinson put a sum of log-normals), and a
        binomial number of outliers.
        """
        if not (self.cv or self.outlier_share):
            return 1.0
        variance = math.log1p(self.cv**2 / steps)
        draw = standard_normal(seed, _STEP, start_s)
        factor = math.exp(math.sqrt(variance) * draw - variance / 2.0)
        if self.outlier_share:
            uniform = 0.5 * math.erfc(standard_normal(seed, _OUTLIER, start_s) / math.sqrt(2.0))
            outliers = _binomial(uniform, steps, self.outlier_share)
            factor += outliers * (self.outlier_factor - 1.0) / steps
        return factor

    def in_series(self, series: Series, seed: int, start_s: float, until_s: float) -> Series:
        """A series that has until `until_s`, with noise: one factor for all its steps.

        How many steps the factor is drawn for must not depend on it, or short ones would be
        preferred: as many as surely fit. The last steps before `until_s` are left to be run one by
        one, or, if none but the first may fit, it has the factor it would have by itself.
        """
        limit_s, durations_s = until_s - start_s, series.durations_s
        steps = durations_s.count_within(limit_s, series.steps)
        if not steps or not (self.cv or self.outlier_share):
            return series
        margin = 1.0 + _MARGIN_SD * self.cv / math.sqrt(steps)
        steps = max(durations_s.count_within(limit_s / margin, steps), 1)
        return series.stretched(self.factor(seed, start_s, steps), steps)


def _binomial(uniform: float, trials: int, share: float) -> int:
    """The number of successes at which the distribution function reaches `uniform`."""
    successes, probability = 0, (1.0 - share) ** trials
    while uniform > probability and successes < trials:
        uniform -= probability
        successes += 1
        probability *= (trials - successes + 1) / successes * share / (1.0 - share)
    return successes
