"""Decode steps in closed form: in a series, step time and step energy are arithmetic sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from agft_ray.simulation.noise import Noise
from agft_ray.simulation.physics import StepWork, busy_power_w, clock_under_cap, step_time_s
from agft_ray.simulation.profiles import GpuProfile, ModelProfile

_FAR_TOKENS = 2**20
"""A context far enough from none for the slope between the two to be exact to rounding."""


@dataclass(frozen=True, slots=True)
class Progression:
    """`first + step * index` for index 0, 1, 2..."""

    first: float
    step: float

    def at(self, index: int) -> float:
        """The element at this place, from 0."""
        return self.first + self.step * index

    def total(self, count: int) -> float:
        """The sum of the first `count` terms."""
        return count * self.first + self.step * (count * (count - 1) / 2)

    def count_within(self, limit: float, most: int) -> int:
        """How many terms, at most `most`, have a sum of at most `limit`; all must be positive."""
        if limit < self.first or most <= 0:
            return 0
        if self.total(most) <= limit:
            return most
        # The positive root of step/2 n^2 + half n = limit, in the form that is stable at step 0.
        half = self.first - self.step / 2
        count = int(2 * limit / (half + math.sqrt(half * half + 2 * self.step * limit)))
        count = min(max(count, 1), most - 1)
        while self.total(count) > limit:
            count -= 1
        while self.total(count + 1) <= limit:
            count += 1
        return count


@dataclass(frozen=True, slots=True)
class NoisyProgression(Progression):
    """The same, each element times the factor of its step; `number` is that of the first."""

    noise: Noise
    number: int

    def at(self, index: int) -> float:
        """The element at this place, from 0."""
        return (self.first + self.step * index) * self.noise.factor(self.number + index)

    def total(self, count: int) -> float:
        """The sum of the first `count` terms."""
        excess, moment = self.noise.excess(self.number, count)
        without = count * self.first + self.step * (count * (count - 1) / 2)
        return without + self.first * excess + self.step * moment

    def count_within(self, limit: float, most: int) -> int:
        """How many terms, at most `most`, have a sum of at most `limit`; all must be positive."""
        if most <= 0:
            return 0
        # The answer lies close to that without noise.
        guess, width = Progression(self.first, self.step).count_within(limit, most), 1
        low, high = guess, guess + 1
        while low > 0 and self.total(low) > limit:
            low, high, width = max(low - width, 0), low, 2 * width
        width = 1
        while high <= most and self.total(high) <= limit:
            low, high, width = high, high + width, 2 * width
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= limit else (low, middle)
        return low


class DecodeCurve(NamedTuple):
    """Duration and one GPU's energy of decode steps of one batch size at one clock, by context.

    Both are affine in the context: attention reads it, and power is either constant or affine in
    the bytes read per second, so energy is affine in time and bytes.
    """

    sequences: int
    base_s: float
    per_token_s: float
    base_j: float
    per_token_j: float

    def durations_s(self, context_tokens: int) -> Progression:
        """Of successive steps, the first of which reads so much context."""
        return Progression(
            self.base_s + self.per_token_s * context_tokens, self.per_token_s * self.sequences
        )

    def energies_j(self, context_tokens: int) -> Progression:
        """Of the same steps."""
        return Progression(
            self.base_j + self.per_token_j * context_tokens, self.per_token_j * self.sequences
        )

    def power_w(self, context_tokens: int) -> float:
        """Of one GPU, before the power cap."""
        energy_j = self.base_j + self.per_token_j * context_tokens
        return energy_j / (self.base_s + self.per_token_s * context_tokens)


def decode_curve(
    gpu: GpuProfile, model: ModelProfile, sequences: int, sm_clock_mhz: int
) -> DecodeCurve:
    """The line through no context and a very long one."""
    times_s, energies_j = [], []
    for context_tokens in (0, _FAR_TOKENS):
        work = StepWork(0, sequences, context_tokens)
        times_s.append(step_time_s(model, work, sm_clock_mhz))
        energies_j.append(times_s[-1] * busy_power_w(gpu, model, work, sm_clock_mhz))
    return DecodeCurve(
        sequences,
        base_s=times_s[0],
        per_token_s=(times_s[1] - times_s[0]) / _FAR_TOKENS,
        base_j=energies_j[0],
        per_token_j=(energies_j[1] - energies_j[0]) / _FAR_TOKENS,
    )


class Series(NamedTuple):
    """Successive decode steps at one effective clock."""

    sm_clock_mhz: int
    steps: int
    """How many are known to run at this clock."""
    durations_s: Progression
    energies_j: Progression
    """Of all GPUs of the group."""

    def noisy(self, noise: Noise, step: int) -> Series:
        """The same, if `step` is the number of its first step: longer or shorter at its power."""
        if not noise.has_steps:
            return self
        times = NoisyProgression(self.durations_s.first, self.durations_s.step, noise, step)
        energies = NoisyProgression(self.energies_j.first, self.energies_j.step, noise, step)
        return self._replace(durations_s=times, energies_j=energies)

    def energy_j(self, elapsed_s: float, steps: int) -> float:
        """Energy of so many steps, as it was `elapsed_s` after their start."""
        whole = self.durations_s.count_within(elapsed_s, steps)
        if whole == steps:
            return self.energies_j.total(steps)
        part = (elapsed_s - self.durations_s.total(whole)) / self.durations_s.at(whole)
        return self.energies_j.total(whole) + part * self.energies_j.at(whole)


class DecodeCurves:
    """The decode steps of one model on one GPU. Curves are kept: clocks and batch sizes are few."""

    def __init__(self, gpu: GpuProfile, model: ModelProfile) -> None:
        self._gpu, self._model = gpu, model
        self._curves: dict[tuple[int, int], DecodeCurve] = {}

    def series(self, work: StepWork, target_sm_clock_mhz: int, steps: int) -> Series:
        """At most so many steps of which `work` is the first, up to a clock."""
        clock, steps = self._clock(work, target_sm_clock_mhz, steps)
        curve = self._curve(work.decode_sequences, clock)
        gpu_j = curve.energies_j(work.context_tokens)
        gpus = self._model.tensor_parallel
        return Series(
            clock,
            steps,
            curve.durations_s(work.context_tokens),
            Progression(gpus * gpu_j.first, gpus * gpu_j.step),
        )

    def _clock(self, work: StepWork, target: int, steps: int) -> tuple[int, int]:
        """The effective clock under the power cap, and how many steps are known to have it.

        Power at a clock is monotone in the context, so what holds for the first and the last step
        holds for all between.
        """
        first = work.context_tokens
        clock = self._under_cap(work.decode_sequences, first, target)
        while steps > 1:
            last = first + (steps - 1) * work.decode_sequences
            if self._under_cap(work.decode_sequences, last, target) == clock:
                break
            steps //= 2
        return clock, steps

    def _under_cap(self, sequences: int, context_tokens: int, target: int) -> int:
        def power_w(sm_clock_mhz: int) -> float:
            return self._curve(sequences, sm_clock_mhz).power_w(context_tokens)

        return clock_under_cap(self._gpu, power_w, target)

    def _curve(self, sequences: int, sm_clock_mhz: int) -> DecodeCurve:
        key = (sequences, sm_clock_mhz)
        if key not in self._curves:
            self._curves[key] = decode_curve(self._gpu, self._model, sequences, sm_clock_mhz)
        return self._curves[key]
