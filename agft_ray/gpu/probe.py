"""Measurements on one GPU: its energy counter, and how fast its clocks follow."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agft_ray.clock import Clock
from agft_ray.errors import GpuArgumentError, GpuError, GpuNotSupportedError, GpuPermissionError
from agft_ray.gpu.base import Gpu
from agft_ray.types import EventReason, GpuSample

COUNTER_WATCH_S = 1.0
SETTLE_LIMIT_S = 2.0
POLL_S = 0.002

REFUSALS = (GpuPermissionError, GpuNotSupportedError, GpuArgumentError)
"""After one of these nothing was set."""

Sleep = Callable[[float], None]


class GuardedGpu(Gpu, Protocol):
    """A GPU under a lease, whose guard resets it unless it is told now and then not to."""

    def beat(self) -> None:
        """See `LeasedGpu.beat`."""
        ...


@dataclass(frozen=True, slots=True)
class EnergyCounter:
    """What an energy counter did while it was watched."""

    source: str
    """As `GpuSample.energy_source`: "counter", or "integrated" where the GPU has none."""
    watched_s: float
    changes: int
    poll_s: float
    """Mean time between two looks at it, which bounds how exact the period is."""
    update_period_s: float | None
    """Median time between changes; None if it changed less than twice."""
    resolution_j: float | None
    """What all its changes are multiples of; None if it did not change."""


@dataclass(frozen=True, slots=True)
class ClockChange:
    """One lock or reset: how long the call took, and until the clock was seen to follow."""

    call_s: float
    settle_s: float | None
    """From the begin of the call; None if it was not seen within `SETTLE_LIMIT_S`, and for the
    reset after a lock that was not seen."""
    sm_clock_mhz: int
    """The SM clock read last."""
    idle: bool
    """The GPU said that it idled: it may then run at another clock than it has under load."""


@dataclass(frozen=True, slots=True)
class ClockProbe:
    """A lock at a middle clock and the reset after it."""

    arm_mhz: int
    lock: ClockChange
    reset: ClockChange


def watch_energy_counter(
    gpu: Gpu, clock: Clock, *, sleep: Sleep = time.sleep, watch_s: float = COUNTER_WATCH_S
) -> EnergyCounter:
    """Poll the energy counter for `watch_s`. Raises the `GpuError` of a reading that fails."""
    sample = gpu.read()
    begin_s = now_s = clock.now_s()
    looks, last_j = 0, sample.energy_j
    changes: list[tuple[float, float]] = []
    while now_s - begin_s < watch_s and sample.energy_source == "counter":
        sleep(POLL_S)
        sample, now_s, looks = gpu.read(), clock.now_s(), looks + 1
        if sample.energy_j != last_j:
            changes.append((now_s, sample.energy_j - last_j))
            last_j = sample.energy_j
    times_s = [t_s for t_s, _ in changes]
    periods_s = [late - early for early, late in itertools.pairwise(times_s)]
    return EnergyCounter(
        source=sample.energy_source,
        watched_s=now_s - begin_s,
        changes=len(changes),
        poll_s=(now_s - begin_s) / max(looks, 1),
        update_period_s=statistics.median(periods_s) if periods_s else None,
        resolution_j=_common_step_j([change_j for _, change_j in changes]),
    )


def _common_step_j(changes_j: Sequence[float]) -> float | None:
    """NVML counts in mJ."""
    return math.gcd(*(round(change_j * 1e3) for change_j in changes_j)) / 1e3 or None


def probe_clocks(gpu: GuardedGpu, clock: Clock, *, sleep: Sleep = time.sleep) -> ClockProbe:
    """Claim, lock at a middle clock, reset, release, and say how long the changes took.

    Resets however it ends, unless the lock was refused. Where that reset fails, or is itself
    interrupted, the lease is kept, so that its guard goes on trying when this process ends or no
    longer beats.

    Raises the `GpuError` of the first call that fails.
    """
    gpu.claim()
    is_refused = False

    def lock() -> None:
        nonlocal is_refused
        try:
            gpu.lock(arm)
        except REFUSALS:
            is_refused = True
            raise

    try:
        arm = _other_arm(gpu)
        change = functools.partial(_change, gpu, clock, sleep)
        locked = change(lock, lambda sample: _nearest_arm(gpu, sample) == arm)
        reset = change(gpu.reset, lambda sample: _nearest_arm(gpu, sample) != arm)
    except BaseException as error:
        try:
            _give_back(gpu, is_refused)
        except GpuError as second:  # the first one says what happened, an interrupt above all
            error.add_note(f"and then: {second}")
        raise
    _give_back(gpu, is_refused)
    if locked.settle_s is None:
        reset = dataclasses.replace(reset, settle_s=None)
    return ClockProbe(arm, locked, reset)


def _give_back(gpu: GuardedGpu, is_refused: bool) -> None:
    if not is_refused:
        gpu.reset()
    gpu.release()


def _other_arm(gpu: Gpu) -> int:
    """One in the middle, but not the clock that the GPU has now."""
    middle, lower = gpu.arms[len(gpu.arms) // 2], gpu.arms[len(gpu.arms) // 4]
    return lower if _nearest_arm(gpu, gpu.read()) == middle else middle


def _nearest_arm(gpu: Gpu, sample: GpuSample) -> int:
    return min(gpu.arms, key=lambda arm: abs(arm - sample.sm_clock_mhz))


def _change(
    gpu: GuardedGpu,
    clock: Clock,
    sleep: Sleep,
    act: Callable[[], None],
    is_there: Callable[[GpuSample], bool],
) -> ClockChange:
    begin_s = clock.now_s()
    act()
    call_s = clock.now_s() - begin_s
    while not is_there(sample := gpu.read()) and clock.now_s() - begin_s < SETTLE_LIMIT_S:
        gpu.beat()
        sleep(POLL_S)
    settle_s = clock.now_s() - begin_s if is_there(sample) else None
    idle = bool(sample.event_reasons & EventReason.GPU_IDLE)
    return ClockChange(call_s, settle_s, sample.sm_clock_mhz, idle)
