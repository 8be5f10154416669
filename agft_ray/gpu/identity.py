"""Which physical GPUs CUDA's and Ray's names mean, as NVML UUIDs."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Mapping, Sequence
from typing import Protocol

from agft_ray.errors import GpuNotSupportedError, GpuUnavailableError


class Device(Protocol):
    """What identity needs to know of a GPU of this node; None is what could not be read."""

    @property
    def index(self) -> int:
        """NVML's number for it: GPUs in the order of their PCI addresses."""
        ...

    @property
    def uuid(self) -> str | None:
        """The NVML UUID, None where the driver does not tell."""
        ...

    @property
    def model(self) -> str | None:
        """The product's name, None where the driver does not tell."""
        ...

    @property
    def mig_uuids(self) -> tuple[str, ...]:
        """Of its MIG instances."""
        ...


def visible_uuids(environ: Mapping[str, str], devices: Sequence[Device]) -> tuple[str, ...]:
    """UUIDs of the GPUs that CUDA shows to a process with these environment variables.

    Asks CUDA itself where it can and its answer is consistent, else follows `resolve`. Call it in a
    process that is soon to end and has `environ` as its environment (see `cuda_uuids`).

    Args:
        environ: CUDA_VISIBLE_DEVICES (all GPUs if it is not set) and CUDA_DEVICE_ORDER count.
        devices: every GPU of the node, as NVML lists them.

    Raises what `resolve` raises.
    """
    known = [device.uuid for device in devices if device.uuid is not None]
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return tuple(known)
    ids = [name.strip() for name in names.split(",")] if names not in ("", "NoDevFiles") else []
    if ids and not any(map(_is_mig, ids)):
        exact = cuda_uuids()
        if exact is not None and len(exact) == len(ids) and set(exact) <= set(known):
            return exact
    order = environ.get("CUDA_DEVICE_ORDER")
    return resolve(ids, devices, pci_bus_order=order == "PCI_BUS_ID")


def resolve(
    ids: Sequence[str], devices: Sequence[Device], *, pci_bus_order: bool
) -> tuple[str, ...]:
    """NVML UUIDs of GPUs that CUDA_VISIBLE_DEVICES, or Ray, names by `ids`; none for no ids.

    MIG instances are taken as the physical GPU that they are part of: what can be read of them is
    the whole GPU's, and its clocks are refused by the backend.

    Args:
        ids: numbers, or UUIDs that may be abbreviated from the right ("GPU-8932f9").
        devices: every GPU of the node, as NVML lists them.
        pci_bus_order: whether CUDA_DEVICE_ORDER is PCI_BUS_ID. CUDA otherwise numbers the fastest
            GPU first, which is NVML's order only if all GPUs are alike.

    Raises `GpuUnavailableError` for an id that names no GPU, `GpuNotSupportedError` for one that
    does not name exactly one GPU, and for two that name the same.
    """
    uuids = tuple(_uuid_of(name, devices, pci_bus_order) for name in ids)
    if all(map(_is_mig, ids)):
        return tuple(dict.fromkeys(uuids))
    for position, found in enumerate(uuids):
        first = uuids.index(found)
        if first != position:
            raise GpuNotSupportedError(
                f"{ids[first]!r} and {ids[position]!r} name the same GPU, {found}; name each GPU "
                "once in CUDA_VISIBLE_DEVICES"
            )
    return uuids


def _uuid_of(name: str, devices: Sequence[Device], pci_bus_order: bool) -> str:
    if _is_mig(name):
        return _mig_parent(name, devices)
    if name.startswith("GPU-"):
        return _by_uuid(name, devices)
    if name.isascii() and name.isdigit():
        return _by_number(name, devices, pci_bus_order)
    raise GpuNotSupportedError(
        f"{name!r} names no GPU; CUDA_VISIBLE_DEVICES takes numbers, or UUIDs that begin with GPU-"
    )


def _is_mig(name: str) -> bool:
    return name.startswith("MIG-")


def _mig_parent(name: str, devices: Sequence[Device]) -> str:
    """Of "MIG-<uuid>", or of "MIG-GPU-<uuid>/<gpu instance>/<compute instance>"."""
    for device in devices:
        if device.uuid and (name in device.mig_uuids or name.startswith(f"MIG-{device.uuid}/")):
            return device.uuid
    raise GpuUnavailableError(f"{name!r} is no MIG instance of this node's GPUs")


def _by_uuid(name: str, devices: Sequence[Device]) -> str:
    known = [device.uuid for device in devices if device.uuid is not None]
    matches = [name] if name in known else [full for full in known if full.startswith(name)]
    if not matches:
        raise GpuUnavailableError(f"{name!r} is no GPU of this node, which has {_listed(known)}")
    if len(matches) > 1:
        raise GpuNotSupportedError(
            f"{name!r} may be any of {_listed(matches)}; write more of the UUID"
        )
    return matches[0]


def _by_number(name: str, devices: Sequence[Device], pci_bus_order: bool) -> str:
    found = next((device for device in devices if device.index == int(name)), None)
    if found is None:
        raise GpuUnavailableError(f"{name!r} is no GPU of this node, which has {len(devices)}")
    models = sorted({str(device.model) for device in devices})
    if found.uuid is None or any(device.uuid is None for device in devices):
        why = "some do not answer, and CUDA leaves those out"
    elif len(models) > 1 and not pci_bus_order:
        why = f"they differ ({_listed(models)}) and CUDA_DEVICE_ORDER is not PCI_BUS_ID"
    else:
        return found.uuid
    raise GpuNotSupportedError(
        f"{name!r} may mean another of this node's GPUs to CUDA than to NVML, as {why}; start Ray "
        "there with the GPUs' UUIDs in CUDA_VISIBLE_DEVICES"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def cuda_uuids(library: str = "libcuda.so.1") -> tuple[str, ...] | None:
    """UUIDs of the GPUs that CUDA shows to this process, whatever their order; None without CUDA.

    For a process made for the purpose only: CUDA reads CUDA_VISIBLE_DEVICES once in a process's
    life. It creates no context. On a MIG instance the UUID is the instance's and none of NVML's
    GPUs. Tried on a stand-in for libcuda only, not on a real GPU.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    v2 = hasattr(cuda, "cuDeviceGetUuid_v2")
    get_uuid = cuda.cuDeviceGetUuid_v2 if v2 else cuda.cuDeviceGetUuid
    count, device, octets = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    uuids = []
    for ordinal in range(count.value):
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or get_uuid(octets, device):
            return None
        uuids.append(f"GPU-{uuid.UUID(bytes=bytes(octets))}")
    return tuple(uuids)
