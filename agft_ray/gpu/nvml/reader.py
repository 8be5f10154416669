"""From NVML's many ways to tell a GPU's power, energy and clocks to one `GpuSample`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from agft_ray.clock import Clock
from agft_ray.errors import GpuNotSupportedError, GpuTransientError
from agft_ray.types import Arm, EventReason, GpuSample

T = TypeVar("T")

SM_CLOCK = 1
ENERGY_FIELD = 83
AVERAGE_POWER_FIELD, INSTANT_POWER_FIELD = 185, 186
KNOWN_REASONS = sum(EventReason)

LONGEST_COUNTER_AGE_S = 1.0
"""NVML updates the energy counter every 10-100 ms, so a timestamp much older is not one of it."""

HIGHEST_POWER_SHARE = 1.5
"""Power beyond this share of the highest power limit is a fault of the sensor."""


class NvmlCalls(Protocol):
    """NVML functions on one GPU. Raises `GpuError`s."""

    @property
    def gpu(self) -> str:
        """The GPU, as errors name it."""
        ...

    def __call__(self, function: str, *args: object) -> Any:
        """What pynvml's function of that name returns."""
        ...

    def of(self, handle: object) -> NvmlCalls:
        """The functions on another handle, such as a MIG instance's."""
        ...

    def field(self, field_id: int) -> tuple[float, int]:
        """A field's value, and its time in microseconds since the epoch."""
        ...


class FirstSupported(Generic[T]):
    """The first of several ways to get a value that GPU and driver support, found once."""

    def __init__(self, *ways: Callable[[NvmlCalls], T]) -> None:
        self._ways: Sequence[Callable[[NvmlCalls], T]] = ways

    def __call__(self, nvml: NvmlCalls) -> T:
        """The value; raises the last way's error where none is supported."""
        *earlier, last = self._ways
        for way in earlier:
            with contextlib.suppress(GpuNotSupportedError):
                return self._keep(way, nvml)
        return self._keep(last, nvml)

    def _keep(self, way: Callable[[NvmlCalls], T], nvml: NvmlCalls) -> T:
        value = way(nvml)
        self._ways = (way,)
        return value


class NvmlReader:
    """Reads one GPU; keeps what works there, and what is needed between readings.

    Sources, the first that GPU and driver support:
    power: field 186 (instant); field 185, then nvmlDeviceGetPowerUsage ("average": a mean over
    1 s on Ampere, except GA100, and later). Energy: field 83; nvmlDeviceGetTotalEnergyConsumption;
    else ("integrated") power integrated by the trapezoidal rule over the readings.

    Args:
        clock: what the samples' times are on.
        epoch_s: wall time in seconds since the epoch, which NVML's timestamps are on.
    """

    def __init__(self, clock: Clock, epoch_s: Callable[[], float] = time.time) -> None:
        self._counter = FirstSupported(_counter_field, _counter_function, _no_counter)
        self._power = FirstSupported(_instant_power, _average_power, _power_usage)
        self._reasons = FirstSupported(_event_reasons, _throttle_reasons)
        self._temperature_c = FirstSupported(_temperature, _old_temperature, _no_temperature)
        self._power_limit_w = FirstSupported(_highest_power_limit, _no_power_limit)
        self._clock = clock
        self._energy = _Energy(clock, epoch_s)
        self._highest_power_w: float | None = None
        self.rejected = 0
        """How many readings were refused because of an implausible power."""

    def read(self, nvml: NvmlCalls, locked: Arm) -> GpuSample:
        """One reading, of a GPU that we have `locked`.

        Raises `GpuTransientError` for a power that cannot be, and what NVML does.
        """
        counter = self._counter(nvml)
        t_s = self._clock.now_s()
        if counter is not None:
            energy_j, energy_t_s = self._energy.counted(t_s, *counter)
        power_w, power_source = self._power(nvml)
        self._check(nvml, power_w)
        if counter is None:
            energy_j, energy_t_s = self._energy.integrated(t_s, power_w)
        return GpuSample(
            t_s=t_s,
            power_w=power_w,
            energy_j=energy_j,
            energy_t_s=energy_t_s,
            sm_clock_mhz=nvml("nvmlDeviceGetClockInfo", SM_CLOCK),
            locked=locked,
            event_reasons=EventReason(self._reasons(nvml) & KNOWN_REASONS),
            temperature_c=self._temperature_c(nvml),
            power_source=power_source,
            energy_source="integrated" if counter is None else "counter",
        )

    def _check(self, nvml: NvmlCalls, power_w: float) -> None:
        if self._highest_power_w is None:
            self._highest_power_w = HIGHEST_POWER_SHARE * self._power_limit_w(nvml)
        if not 0 <= power_w <= self._highest_power_w or math.isinf(power_w):
            self.rejected += 1
            raise GpuTransientError(
                f"power of {nvml.gpu} is implausible and the reading dropped: got {power_w:g} W, "
                f"must be 0..{self._highest_power_w:g} W"
            )


class _Energy:
    """The energy so far, and when it became that."""

    def __init__(self, clock: Clock, epoch_s: Callable[[], float]) -> None:
        self._clock, self._epoch_s = clock, epoch_s
        self._energy_j: float | None = None
        self._energy_t_s = -math.inf
        self._power_w = 0.0

    def counted(self, t_s: float, energy_j: float, stamp_us: int) -> tuple[float, float]:
        """The counter, read at `t_s`, which is now; and when it last changed.

        That is NVML's timestamp when the value was first seen, if it has one that is not ahead of
        us, not older than `LONGEST_COUNTER_AGE_S` and later than the one before: the wall clock
        may jump, and drivers differ. Otherwise it is when the value was first seen, which is late
        by no more than the time between two readings.
        """
        if energy_j != self._energy_j:
            age_s = self._epoch_s() - stamp_us / 1e6
            changed_t_s = t_s - age_s * self._clock.speed
            plausible = 0 <= age_s <= LONGEST_COUNTER_AGE_S and changed_t_s > self._energy_t_s
            self._energy_j, self._energy_t_s = energy_j, changed_t_s if plausible else t_s
        return energy_j, self._energy_t_s

    def integrated(self, t_s: float, power_w: float) -> tuple[float, float]:
        """The integral of power up to `t_s`, by the trapezoidal rule; and `t_s`."""
        if self._energy_j is None:
            self._energy_j, self._energy_t_s = 0.0, t_s
        else:
            self._energy_j += (self._power_w + power_w) / 2 * (t_s - self._energy_t_s)
        self._power_w, self._energy_t_s = power_w, t_s
        return self._energy_j, t_s


def _counter_field(nvml: NvmlCalls) -> tuple[float, int] | None:
    energy_mj, stamp_us = nvml.field(ENERGY_FIELD)
    return energy_mj / 1000, stamp_us


def _counter_function(nvml: NvmlCalls) -> tuple[float, int] | None:
    return nvml("nvmlDeviceGetTotalEnergyConsumption") / 1000, 0


def _no_counter(nvml: NvmlCalls) -> tuple[float, int] | None:
    return None


def _instant_power(nvml: NvmlCalls) -> tuple[float, str]:
    return nvml.field(INSTANT_POWER_FIELD)[0] / 1000, "instant"


def _average_power(nvml: NvmlCalls) -> tuple[float, str]:
    return nvml.field(AVERAGE_POWER_FIELD)[0] / 1000, "average"


def _power_usage(nvml: NvmlCalls) -> tuple[float, str]:
    return nvml("nvmlDeviceGetPowerUsage") / 1000, "average"


def _event_reasons(nvml: NvmlCalls) -> int:
    return int(nvml("nvmlDeviceGetCurrentClocksEventReasons"))


def _throttle_reasons(nvml: NvmlCalls) -> int:
    """The event reasons by their name in drivers older than 535."""
    return int(nvml("nvmlDeviceGetCurrentClocksThrottleReasons"))


def _temperature(nvml: NvmlCalls) -> float | None:
    return float(nvml("nvmlDeviceGetTemperatureV", 0))


def _old_temperature(nvml: NvmlCalls) -> float | None:
    return float(nvml("nvmlDeviceGetTemperature", 0))


def _no_temperature(nvml: NvmlCalls) -> float | None:
    return None


def _highest_power_limit(nvml: NvmlCalls) -> float:
    return float(nvml("nvmlDeviceGetPowerManagementLimitConstraints")[1]) / 1000


def _no_power_limit(nvml: NvmlCalls) -> float:
    return math.inf


def has_energy_counter(nvml: NvmlCalls) -> bool:
    """Whether the GPU counts its energy itself."""
    return FirstSupported(_counter_field, _counter_function, _no_counter)(nvml) is not None
