"""What NVML says of a GPU once and for all: identity, what can be set, and what forbids it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agft_ray.errors import GpuError, GpuNotSupportedError, GpuTransientError
from agft_ray.gpu.nvml.reader import NvmlCalls, has_energy_counter

POWER_STEPS = 20
VIRTUALIZATION = ("none", "passthrough", "vgpu", "host_vgpu", "host_vsga")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU of this node. None is what could not be read, `problem` why, where that is a fault."""

    index: int
    """NVML's number: GPUs in the order of their PCI addresses, whatever CUDA's environment."""
    uuid: str | None = None
    model: str | None = None
    pci_address: str | None = None
    """As `lspci -D` writes it, "0000:01:00.0"."""
    mig_enabled: bool | None = None
    """None also where the GPU knows no MIG."""
    mig_uuids: tuple[str, ...] = ()
    """Of its MIG instances."""
    virtualization: str | None = None
    """One of `VIRTUALIZATION`."""
    persistence_mode: bool | None = None
    """Without it, and without clients, the driver forgets locked clocks."""
    sm_clocks_mhz: tuple[int, ...] | None = None
    """What can be locked, ascending."""
    has_energy_counter: bool | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    power_limit_range_w: tuple[float, float] | None = None
    """The lowest and the highest limit that may be set."""
    compute_processes: int | None = None
    """How many processes compute on it now."""
    problem: str = ""


def describe(nvml: NvmlCalls, index: int) -> DeviceInfo:
    """All that can be read of the GPU of this NVML number, and the first problem met."""
    values, problem = {}, ""
    for name, read in _READINGS.items():
        try:
            values[name] = read(nvml)
        except GpuNotSupportedError:
            pass
        except GpuError as error:
            problem = problem or str(error)
    return DeviceInfo(index, **values, problem=problem)


def supported_sm_clocks_mhz(nvml: NvmlCalls) -> tuple[int, ...]:
    """SM clocks that can be locked at the highest memory clock, in MHz, ascending.

    Raises `GpuNotSupportedError` if the GPU lists none.
    """
    memory_clocks_mhz = nvml("nvmlDeviceGetSupportedMemoryClocks")
    clocks_mhz: list[int] = (
        nvml("nvmlDeviceGetSupportedGraphicsClocks", max(memory_clocks_mhz))
        if memory_clocks_mhz
        else []
    )
    if not clocks_mhz:
        raise GpuNotSupportedError(
            f"{nvml.gpu} lists no supported clocks, so none can be locked: use "
            "`actuator: power_limit`, or `mode: observe`"
        )
    return tuple(sorted(set(clocks_mhz)))


def supported_power_limits_w(nvml: NvmlCalls) -> tuple[int, ...]:
    """Power limits in W, ascending: about `POWER_STEPS` equal steps, and the limit in force.

    Raises `GpuNotSupportedError` if the GPU has no power limit.
    """
    low_w, high_w = _power_limit_range_w(nvml)
    lowest_w, highest_w = math.ceil(low_w), math.floor(high_w)
    step_w = max((highest_w - lowest_w) // POWER_STEPS, 1)
    current_w = min(max(math.floor(power_limit_w(nvml)), lowest_w), highest_w)
    return tuple(sorted({*range(lowest_w, highest_w, step_w), highest_w, current_w}))


def power_limit_w(nvml: NvmlCalls) -> float:
    """The power limit in force, in W."""
    return float(nvml("nvmlDeviceGetPowerManagementLimit")) / 1000


def refusal(nvml: NvmlCalls) -> str:
    """Why this GPU's clocks must not be set, and the way out; "" if they may."""
    if _optional(nvml, _mig_enabled):
        return (
            "MIG is on, and all its instances share one SM clock: turn it off (`nvidia-smi -mig "
            "0`); `mode: observe` works"
        )
    virtualization = _optional(nvml, _virtualization)
    if virtualization in ("vgpu", "host_vgpu", "host_vsga"):
        return (
            f"its virtualization mode is {virtualization}, so other machines share its clocks: "
            "give this one a whole GPU (pass-through); `mode: observe` works where power can be "
            "read"
        )
    return ""


def _optional(nvml: NvmlCalls, read: Callable[[NvmlCalls], Any]) -> Any:
    try:
        return read(nvml)
    except GpuNotSupportedError:
        return None


def _mig_enabled(nvml: NvmlCalls) -> bool:
    return bool(nvml("nvmlDeviceGetMigMode")[0])


def _mig_uuids(nvml: NvmlCalls) -> tuple[str, ...]:
    """Of the instances there are; there may be fewer than slots for them."""
    if not _mig_enabled(nvml):
        return ()
    uuids = []
    for slot in range(nvml("nvmlDeviceGetMaxMigDeviceCount")):
        with contextlib.suppress(GpuTransientError):  # as NOT_FOUND comes
            instance = nvml("nvmlDeviceGetMigDeviceHandleByIndex", slot)
            uuids.append(nvml.of(instance)("nvmlDeviceGetUUID"))
    return tuple(uuids)


def _virtualization(nvml: NvmlCalls) -> str:
    mode = nvml("nvmlDeviceGetVirtualizationMode")
    return VIRTUALIZATION[mode] if mode < len(VIRTUALIZATION) else str(mode)


def _pci_address(nvml: NvmlCalls) -> str:
    pci = nvml("nvmlDeviceGetPciInfo")
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _power_limit_range_w(nvml: NvmlCalls) -> tuple[float, float]:
    low_mw, high_mw = nvml("nvmlDeviceGetPowerManagementLimitConstraints")
    return low_mw / 1000, high_mw / 1000


_READINGS: dict[str, Callable[[NvmlCalls], Any]] = {
    "uuid": lambda nvml: nvml("nvmlDeviceGetUUID"),
    "model": lambda nvml: nvml("nvmlDeviceGetName"),
    "pci_address": _pci_address,
    "mig_enabled": _mig_enabled,
    "mig_uuids": _mig_uuids,
    "virtualization": _virtualization,
    "persistence_mode": lambda nvml: bool(nvml("nvmlDeviceGetPersistenceMode")),
    "sm_clocks_mhz": supported_sm_clocks_mhz,
    "has_energy_counter": has_energy_counter,
    "power_limit_w": power_limit_w,
    "default_power_limit_w": lambda nvml: nvml("nvmlDeviceGetPowerManagementDefaultLimit") / 1000,
    "power_limit_range_w": _power_limit_range_w,
    "compute_processes": lambda nvml: len(nvml("nvmlDeviceGetComputeRunningProcesses")),
}
