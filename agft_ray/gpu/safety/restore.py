"""Bringing a GPU back to default clocks, by a process that knows nothing but a target.

Standard library only: the clock guard is a small process.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from agft_ray.errors import GpuNotSupportedError
from agft_ray.gpu.nvml.errors import gpu_error
from agft_ray.gpu.safety.target import Target, check_target


def prepare(backend: str) -> None:
    """Load now what `restore` will need for such a target: later, files may have been replaced.

    Raises `GpuNotSupportedError` where there is no NVML library.
    """
    if backend == "nvml":
        _library()
    elif backend == "zeusd":
        import agft_ray.gpu.zeusd.backend
    else:
        import agft_ray.simulation.device_file  # noqa: F401


def restore(target: Target) -> None:
    """Bring the target's GPU back: to default clocks, or to what is to be restored after them.

    Safe to repeat. Raises `GpuLostError` for a GPU that is gone (and needs no reset),
    `GpuUnavailableError` for one that this process does not see (and another may), another
    `GpuError` if it could not be done, `GpuArgumentError` for what is no target.
    """
    target = check_target(target)
    {"nvml": _by_nvml, "zeusd": _by_zeusd, "simulated": _by_request}[target["backend"]](target)


def _by_request(target: Target) -> None:
    from agft_ray.simulation.device_file import request_reset

    request_reset(target["path"])


def _by_zeusd(target: Target) -> None:
    from agft_ray.gpu.zeusd.backend import ZeusdClient

    client = ZeusdClient(target["path"], target["token_path"])
    if target["actuator"] == "power_limit":
        client.set_power_limit(target["index"], target["restore_power_limit_w"])
        return
    client.reset_sm_clocks(target["index"])
    if target["restore_sm_clocks_mhz"]:
        client.lock_sm_clocks(target["index"], *target["restore_sm_clocks_mhz"])


def _by_nvml(target: Target) -> None:
    call = functools.partial(_nvml, target["uuid"])
    handle = ctypes.c_void_p()
    call("nvmlInit_v2")
    try:
        call("nvmlDeviceGetHandleByUUID", target["uuid"].encode(), ctypes.byref(handle))
        if target["actuator"] == "power_limit":
            limit_mw = ctypes.c_uint(round(target["restore_power_limit_w"] * 1000))
            call("nvmlDeviceSetPowerManagementLimit", handle, limit_mw)
            return
        call("nvmlDeviceResetGpuLockedClocks", handle)
        if target["restore_sm_clocks_mhz"]:
            range_mhz = map(ctypes.c_uint, target["restore_sm_clocks_mhz"])
            call("nvmlDeviceSetGpuLockedClocks", handle, *range_mhz)
    finally:
        _library().nvmlShutdown()


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        library.nvmlErrorString.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise GpuNotSupportedError(
            f"NVML cannot be loaded ({error}); install the NVIDIA driver, or give the container "
            "the 'utility' driver capability"
        ) from None
    return library


def _nvml(uuid: str, name: str, *arguments: Any) -> None:
    """Call an NVML function; its return code becomes the exception that gpu/nvml/backend.py raises.

    All codes but those of a GPU that is gone leave a reset due.
    """
    library = _library()
    code = getattr(library, name, lambda *_: 13)(*arguments)
    if code:
        text = library.nvmlErrorString(code) or b"no text"
        raise gpu_error(code, function=name, gpu=uuid, text=text.decode(errors="replace"))
