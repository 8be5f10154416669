"""The GPU as the loop sees it."""

from __future__ import annotations

from typing import Protocol

from agft_ray.types import Actuator, GpuSample


class Gpu(Protocol):
    """One GPU, or a tensor-parallel group that is locked and reset as one.

    Every method may raise a `GpuError`: `GpuPermissionError` and `GpuNotSupportedError` are
    permanent, `GpuArgumentError` is about the clock asked for, `GpuUnavailableError` means that
    this process sees no such device, `GpuLostError` that it has seen it and it is gone,
    `GpuTransientError` may be retried, `LeaseLostError` asks for a new `claim`.
    """

    @property
    def uuid(self) -> str:
        """The GPU's NVML UUID; a group's are joined by commas."""
        ...

    @property
    def model(self) -> str:
        """The product's name."""
        ...

    @property
    def actuator(self) -> Actuator:
        """What `lock` sets."""
        ...

    @property
    def arms(self) -> tuple[int, ...]:
        """What can be locked, ascending: SM clocks in MHz, or power limits in W."""
        ...

    def claim(self) -> None:
        """Get the right to lock, or keep it; what a dead owner left locked is reset first.

        Raises `LeaseHeldError` while another living process has it, `GpuNotSupportedError` for a
        GPU that must not be locked (shared, MIG, vGPU), with the way out.
        """
        ...

    def release(self) -> None:
        """Give the right back, after a `reset`; safe to call without it.

        Without one what was locked stays; after one that failed, whoever watches over the right
        tries on.
        """
        ...

    def read(self) -> GpuSample:
        """Power, energy counter, clocks and event reasons, now."""
        ...

    def lock(self, setting: int) -> None:
        """Lock the SM clock (or set the limit), to be called between `claim` and `release` only.

        As with NVML, success does not prove the clock: read it back.

        A value between two supported clocks is taken as the nearest one below, one outside the
        supported range is refused with `GpuArgumentError`.
        """
        ...

    def reset(self) -> None:
        """Return to default clocks; safe to call at any time, any number of times. Without the
        right to lock it may touch nothing."""
        ...
