"""The GPU as the loop sees it."""

from __future__ import annotations

from typing import Protocol

from agft_ray.types import GpuSample


class Gpu(Protocol):
    """One GPU, or a tensor-parallel group that is locked and reset as one.

    Every method may raise a `GpuError`: `GpuPermissionError` and `GpuNotSupportedError` are
    permanent, `GpuArgumentError` is about the clock asked for, `GpuLostError` means the device is
    gone, `GpuTransientError` may be retried.
    """

    @property
    def uuid(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """The clocks that can be locked, ascending."""
        ...

    def read(self) -> GpuSample:
        """Power, energy counter, clocks and event reasons, now."""
        ...

    def lock(self, sm_clock_mhz: int) -> None:
        """Lock the SM clock. As with NVML, success does not prove the clock: read it back.

        A value between two supported clocks is taken as the nearest one below, one outside the
        supported range is refused with `GpuArgumentError`.
        """
        ...

    def reset(self) -> None:
        """Return to default clocks; safe to call at any time, any number of times."""
        ...
