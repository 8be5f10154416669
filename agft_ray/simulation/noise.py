"""Random numbers that depend on a seed and a key alone, not on what was drawn before."""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from statistics import NormalDist
from typing import TYPE_CHECKING

from agft_ray.simulation.profiles import ClockChangeProfile, NoiseProfile

if TYPE_CHECKING:
    from agft_ray.simulation.device_state import DeviceState

_SCALE = 2.0**-64
_CLOCK_DELAY, _STEP, _OUTLIER, _COUNTER = 1, 2, 3, 4
"""Streams of random numbers; a `Device` has others."""
_P95_SCORE = 1.6448536269514722
"""95th percentile of the standard normal distribution."""
PERIOD_STEPS = 2**16
"""After so many steps their noise repeats itself, so that it takes no more memory."""
_CHUNK_STEPS = 512


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


class Noise:
    """The noise of one GPU: of its steps and of its energy counter.

    The n-th step since the start takes `factor(n)` times as long: log-normal with mean 1, times
    `outlier_factor` for rare steps, so that the mean is `1 + outlier_share (outlier_factor - 1)`.
    It is the same whatever a policy does, and however a series of steps is cut.
    """

    def __init__(self, profile: NoiseProfile, seed: int) -> None:
        self.seed = seed
        self._profile = profile
        self.has_steps = bool(profile.step_cv or profile.outlier_share)
        variance = math.log1p(profile.step_cv**2)
        self._sigma, self._mu = math.sqrt(variance), -variance / 2.0
        share = profile.outlier_share
        self._outlier_below = NormalDist().inv_cdf(share) if share else -math.inf
        # Sums over the steps before each: of factor - 1, and of that times the step's number.
        self._sums, self._moments = array("d", [0.0]), array("d", [0.0])

    def for_seed(self, seed: int) -> Noise:
        """The like of another seed, or itself."""
        return self if seed == self.seed else Noise(self._profile, seed)

    def factor(self, step: int) -> float:
        """How long this step takes, relative to one without noise."""
        return 1.0 + self.excess(step, 1)[0] if self.has_steps else 1.0

    def excess(self, first: int, count: int) -> tuple[float, float]:
        """Sums over the `count` steps from `first` on: of `factor - 1`, and of that times the
        step's place from `first`, 0 and up."""
        start = first % PERIOD_STEPS
        here = min(count, PERIOD_STEPS - start)
        self._draw(start + here)
        total = self._sums[start + here] - self._sums[start]
        moment = self._moments[start + here] - self._moments[start] - start * total
        if here < count:
            later, later_moment = self.excess(first + here, count - here)
            total, moment = total + later, moment + later_moment + here * later
        return total, moment

    def counter_j(self, state: DeviceState, energy_j: float, period_j: float) -> float:
        """What the counter shows of `energy_j` from its update at `state.counter_t_s` on.

        `period_j` is the energy between two updates. A counter never runs backwards.
        """
        if not self._profile.counter_noise:
            return energy_j
        draw = standard_normal(state.seed, _COUNTER, state.counter_t_s)
        noisy_j = energy_j + self._profile.counter_noise * period_j * draw
        return max(noisy_j, state.counter_energy_j)

    def _draw(self, steps: int) -> None:
        """Have the sums of so many steps."""
        if steps < len(self._sums):
            return
        outlier = self._profile.outlier_factor
        for step in range(len(self._sums) - 1, min(steps + _CHUNK_STEPS, PERIOD_STEPS)):
            factor = math.exp(self._mu + self._sigma * standard_normal(self.seed, _STEP, step))
            if self._outlier_below > -math.inf:
                is_outlier = standard_normal(self.seed, _OUTLIER, step) < self._outlier_below
                factor *= outlier if is_outlier else 1.0
            self._sums.append(self._sums[step] + factor - 1.0)
            self._moments.append(self._moments[step] + step * (factor - 1.0))
