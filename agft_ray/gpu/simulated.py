"""Simulated GPUs behind the `Gpu` protocol: shared between processes, or in memory."""

from __future__ import annotations

import os

from agft_ray.clock import Clock, WallClock
from agft_ray.simulation.device import Device
from agft_ray.simulation.shared_device import SharedDevice
from agft_ray.types import Actuator, GpuSample


class _SmClocks:
    """What simulated GPUs have in common: SM clocks, which by themselves nobody contends for."""

    actuator = Actuator.SM_CLOCK

    def claim(self) -> None:
        """Nothing to do: leases are `LeasedGpu`'s."""

    def release(self) -> None:
        """Nothing to do."""


class SimulatedGpu(_SmClocks):
    """A simulated GPU whose state is the file at `path`, as made by `DeviceFile.create`.

    Every method raises `GpuLostError` once the file is gone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shared = SharedDevice(path)

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return self._shared.uuid

    @property
    def model(self) -> str:
        """The product's name."""
        return self._shared.profile.product

    @property
    def clock(self) -> WallClock:
        """The GPU's own time, which its engine must share."""
        return self._shared.clock

    @property
    def arms(self) -> tuple[int, ...]:
        """What may be set, ascending."""
        return self._shared.profile.supported_sm_clocks_mhz

    def target(self) -> dict[str, object]:
        """How a process that knows nothing else resets it; see `gpu.safety.restore.restore`."""
        return {
            "uuid": self.uuid,
            "backend": "simulated",
            "actuator": "sm_clock",
            "path": self._shared.path,
            "index": None,
            "token_path": "",
            "restore_power_limit_w": None,
            "restore_sm_clocks_mhz": None,
        }

    def read(self) -> GpuSample:
        """One reading; see `Gpu.read`."""
        with self._shared.transaction() as (device, now_s):
            return device.read(now_s)

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        with self._shared.transaction() as (device, now_s):
            device.lock(now_s, setting)

    def reset(self) -> None:
        """Back to default clocks; see `Gpu.reset`."""
        with self._shared.transaction() as (device, now_s):
            device.reset(now_s)


class InMemoryGpu(_SmClocks):
    """A simulated GPU over a `Device`, on whatever clock its engine runs: virtual time."""

    def __init__(self, device: Device, clock: Clock, uuid: str = "GPU-simulated-0") -> None:
        self._device = device
        self._clock = clock
        self._uuid = uuid

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return self._uuid

    @property
    def model(self) -> str:
        """The product's name."""
        return self._device.profile.product

    @property
    def arms(self) -> tuple[int, ...]:
        """What may be set, ascending."""
        return self._device.profile.supported_sm_clocks_mhz

    def read(self) -> GpuSample:
        """One reading; see `Gpu.read`."""
        return self._device.read(self._clock.now_s())

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        self._device.lock(self._clock.now_s(), setting)

    def reset(self) -> None:
        """Back to default clocks; see `Gpu.reset`."""
        self._device.reset(self._clock.now_s())
