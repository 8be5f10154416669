"""Real GPUs through NVML, NVIDIA's management library: reading them, and setting their clocks.

The only module that imports pynvml. Setting takes root or CAP_SYS_ADMIN, reading takes nothing;
so the setting is substituted (`ClockWriter`) where a privileged daemon does it.

NVML calls run on one thread of the process, within a deadline (but for what dead owners left: see
`restore`, and `deadline`). After a call that failed in a way
that may pass, NVML is initialised anew before the next call; nothing is tried again by itself.
"""

from __future__ import annotations

import functools
from typing import Protocol

import pynvml

from agft_ray.clock import Clock
from agft_ray.errors import GpuArgumentError, GpuError, GpuNotSupportedError
from agft_ray.gpu.nvml import devices as nvml_devices
from agft_ray.gpu.nvml.devices import DeviceInfo
from agft_ray.gpu.nvml.reader import NvmlCalls, NvmlReader
from agft_ray.gpu.nvml.session import HandleCalls, NvmlDevice, NvmlSession
from agft_ray.types import Actuator, Arm, GpuSample

__all__ = [
    "ClockWriter",
    "DeviceInfo",
    "NvmlGpu",
    "NvmlWriter",
    "driver_versions",
    "list_devices",
]

DEADLINE_S = 2.0


class ClockWriter(Protocol):
    """Who sets one GPU's clocks: NVML, or a daemon with the privilege. Raises `GpuError`s."""

    def target(self) -> dict[str, object]:
        """The restore target's fields that say how to reach the GPU (`safety.target`)."""
        ...

    def lock_sm_clocks(self, min_mhz: int, max_mhz: int) -> None:
        """Lock SM clocks to a range, in MHz."""
        ...

    def reset_sm_clocks(self) -> None:
        """Unlock SM clocks."""
        ...

    def set_power_limit(self, limit_w: float) -> None:
        """Set the power limit, in W."""
        ...


_SESSION = NvmlSession(pynvml)


class NvmlWriter:
    """The `ClockWriter` of a process that may set clocks itself."""

    def __init__(self, device: NvmlDevice) -> None:
        self._device = device

    def target(self) -> dict[str, object]:
        """How another process brings this GPU back."""
        return {"backend": "nvml", "path": "", "index": None, "token_path": ""}

    def lock_sm_clocks(self, min_mhz: int, max_mhz: int) -> None:
        """Lock SM clocks to a range, in MHz."""
        self._set("SetGpuLockedClocks", min_mhz, max_mhz)

    def reset_sm_clocks(self) -> None:
        """Unlock SM clocks."""
        self._set("ResetGpuLockedClocks")

    def set_power_limit(self, limit_w: float) -> None:
        """Set the power limit, in W."""
        self._set("SetPowerManagementLimit", round(limit_w * 1000))

    def _set(self, function: str, *args: int) -> None:
        self._device.run(function, lambda nvml: nvml(f"nvmlDevice{function}", *args))


class NvmlGpu:
    """A `Gpu` by NVML; reading needs no privilege. See `Gpu` for what the methods do and raise.

    Leases are `LeasedGpu`'s.

    Args:
        uuid: the GPU's, as `nvidia-smi -L` lists it; NVML is not called before it is needed.
        clock: what the samples' times are on.
        writer: who sets the clocks; None: NVML, by this process.
        actuator: what `lock` sets.
        restore_sm_clocks_mhz: the range (min, max) to lock after a reset, which an administrator
            had locked before us (NVML cannot be asked); None: none.
        deadline_s: the wall time that a method waits for NVML.
    """

    def __init__(
        self,
        uuid: str,
        *,
        clock: Clock,
        writer: ClockWriter | None = None,
        actuator: Actuator = Actuator.SM_CLOCK,
        restore_sm_clocks_mhz: tuple[int, int] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._device = NvmlDevice(_SESSION, uuid, deadline_s)
        self._writer: ClockWriter = NvmlWriter(self._device) if writer is None else writer
        self._reader = NvmlReader(clock)
        self._actuator = actuator
        self._restore_sm_clocks_mhz = restore_sm_clocks_mhz
        self._restore_power_limit_w: float | None = None
        self._locked: Arm = None

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return self._device.uuid

    @property
    def actuator(self) -> Actuator:
        """What is set: SM clocks, or the power limit."""
        return self._actuator

    @functools.cached_property
    def model(self) -> str:
        """The product's name."""
        return str(self._device.run("model", lambda nvml: nvml("nvmlDeviceGetName")))

    @functools.cached_property
    def arms(self) -> tuple[int, ...]:
        """See `Gpu`; a GPU that has none can be read, and `claim` says why it has none."""
        try:
            return self._find_arms()
        except GpuNotSupportedError:
            return ()

    def _find_arms(self) -> tuple[int, ...]:
        if self._actuator is Actuator.SM_CLOCK:
            return self._device.run("arms", nvml_devices.supported_sm_clocks_mhz)
        return self._device.run("arms", nvml_devices.supported_power_limits_w)

    @property
    def restore_power_limit_w(self) -> float | None:
        """The power limit found before we first set one; None if we have not looked."""
        return self._restore_power_limit_w

    @property
    def rejected_readings(self) -> int:
        """How many readings were refused because of an implausible power."""
        return self._reader.rejected

    def target(self) -> dict[str, object]:
        """How another process brings this GPU back to default clocks: see `safety.target`.

        Asks NVML for nothing, but for a power limit that was not looked at yet.
        """
        self._find_power_limit()
        clocks_mhz = self._restore_sm_clocks_mhz
        return {
            "uuid": self.uuid,
            **self._writer.target(),
            "actuator": self._actuator.value,
            "restore_power_limit_w": self._restore_power_limit_w,
            "restore_sm_clocks_mhz": None if clocks_mhz is None else list(clocks_mhz),
        }

    def claim(self) -> None:
        """Refuse a GPU whose clocks are not this process's alone: MIG, vGPU."""
        if reason := self._device.run("claim", nvml_devices.refusal):
            raise GpuNotSupportedError(f"clocks of {self.uuid} must not be set: {reason}")
        if not self.arms:
            self._find_arms()
        self._find_power_limit()

    def release(self) -> None:
        """Nothing to do."""

    def read(self) -> GpuSample:
        """One reading; see `Gpu.read`."""
        return self._device.run("read", self._read)

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        self._device.check_not_lost()
        setting = self._supported(setting)
        if self._actuator is Actuator.SM_CLOCK:
            self._writer.lock_sm_clocks(setting, setting)
        else:
            self._find_power_limit()
            self._writer.set_power_limit(setting)
        self._locked = setting

    def reset(self) -> None:
        """Back to default clocks; see `Gpu.reset`."""
        self._device.check_not_lost()
        if self._actuator is Actuator.SM_CLOCK:
            self._writer.reset_sm_clocks()
        elif self._restore_power_limit_w is not None:
            self._writer.set_power_limit(self._restore_power_limit_w)
        self._locked = None
        if self._actuator is Actuator.SM_CLOCK and self._restore_sm_clocks_mhz is not None:
            self._writer.lock_sm_clocks(*self._restore_sm_clocks_mhz)

    def _read(self, nvml: NvmlCalls) -> GpuSample:
        return self._reader.read(nvml, self._locked)

    def _supported(self, setting: int) -> int:
        if not self.arms:
            self._find_arms()
        if not self.arms[0] <= setting <= self.arms[-1]:
            unit = "MHz" if self._actuator is Actuator.SM_CLOCK else "W"
            raise GpuArgumentError(
                f"{self.uuid} cannot be locked at {setting} {unit}: choose from {self.arms[0]}.."
                f"{self.arms[-1]} {unit}"
            )
        return max(arm for arm in self.arms if arm <= setting)

    def _find_power_limit(self) -> None:
        if self._actuator is Actuator.POWER_LIMIT and self._restore_power_limit_w is None:
            self._restore_power_limit_w = self._device.run(
                "power limit", nvml_devices.power_limit_w
            )


def list_devices(deadline_s: float = DEADLINE_S) -> list[DeviceInfo]:
    """All GPUs of this node that the process may see, those that fail included, in NVML's order.

    Raises a `GpuError` if NVML itself does not work; `deadline_s` is for each GPU.
    """
    count = _SESSION.thread.call(_count, deadline_s=deadline_s, name="listing of GPUs")
    return [_describe(index, deadline_s) for index in range(count)]


def driver_versions(deadline_s: float = DEADLINE_S) -> tuple[str, str, str]:
    """Versions of the driver, of NVML, and of CUDA as far as the driver supports it ("12.4").

    Raises a `GpuError` if NVML does not work.
    """
    return _SESSION.thread.call(_versions, deadline_s=deadline_s, name="driver versions")


def _describe(index: int, deadline_s: float) -> DeviceInfo:
    name = f"description of GPU {index}"
    try:
        return _SESSION.thread.call(_device_info, index, deadline_s=deadline_s, name=name)
    except GpuError as error:
        return DeviceInfo(index, problem=str(error))


def _device_info(index: int) -> DeviceInfo:
    gpu = f"GPU {index}"
    _SESSION.open(gpu)
    handle = _SESSION.call("nvmlDeviceGetHandleByIndex", gpu, index)
    return nvml_devices.describe(HandleCalls(_SESSION, gpu, handle), index)


def _count() -> int:
    _SESSION.open("this node")
    return int(_SESSION.call("nvmlDeviceGetCount", "this node"))


def _versions() -> tuple[str, str, str]:
    _SESSION.open("this node")
    driver, nvml, cuda = (
        _SESSION.call(f"nvmlSystemGet{name}Version", "this node")
        for name in ("Driver", "NVML", "CudaDriver")
    )
    return driver, nvml, f"{cuda // 1000}.{cuda % 1000 // 10}"
