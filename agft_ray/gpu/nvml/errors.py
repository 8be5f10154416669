"""NVML's return codes as our errors (codes: nvml.h, `nvmlReturn_t`). Standard library only."""

from __future__ import annotations

from agft_ray.errors import (
    GpuArgumentError,
    GpuError,
    GpuLostError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    GpuUnavailableError,
)

INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NOT_FOUND = 6
FUNCTION_NOT_FOUND = 13

_NO_DRIVER = (
    "install the driver, or give the container its GPUs with the driver's 'utility' capability; "
    "`nvidia-smi` must work there"
)

_NOT_VISIBLE = (
    GpuUnavailableError,
    "no such GPU is visible here; `nvidia-smi -L` lists those that are",
)

_ERRORS: dict[int, tuple[type[GpuError], str]] = {
    INVALID_ARGUMENT: (GpuArgumentError, "use values that this GPU lists as supported"),
    NOT_SUPPORTED: (GpuNotSupportedError, "`mode: observe` sets nothing"),
    4: (
        GpuPermissionError,
        "run as root or with CAP_SYS_ADMIN in the container, or set clocks through zeusd's socket "
        "(`gpu: {kind: zeusd}`), or set none (`mode: observe`)",
    ),
    NOT_FOUND: _NOT_VISIBLE,
    9: (GpuNotSupportedError, _NO_DRIVER),
    12: (GpuNotSupportedError, _NO_DRIVER),
    FUNCTION_NOT_FOUND: (GpuNotSupportedError, "the driver lacks this function; upgrade it"),
    15: (GpuLostError, "the GPU fell off the bus; reset it, or reboot the node"),
    16: (GpuLostError, "drain the node, then reset the GPU (`nvidia-smi --gpu-reset`)"),
    17: (
        GpuNotSupportedError,
        "the operating system or the container's device rules keep this process from the GPU; "
        "allow it the /dev/nvidia* devices",
    ),
    18: (
        GpuNotSupportedError,
        "the driver was replaced under us; restart this node's processes, or reboot it",
    ),
    24: (GpuArgumentError, "use clocks that this GPU lists as supported"),
    # A call of another version than the driver knows: older ways may exist.
    25: (GpuNotSupportedError, "the driver does not know this version of the call; upgrade it"),
    26: (GpuNotSupportedError, "the driver has dropped this function; upgrade agft_ray"),
    28: _NOT_VISIBLE,
}
_TRANSIENT = (GpuTransientError, "it may pass; if it stays, see the kernel log for NVRM and Xid")


def gpu_error(code: int, *, function: str, gpu: str, text: str) -> GpuError:
    """The error that an NVML function's return code means; every unknown code is transient.

    Args:
        code: what it returned, not 0.
        function: its name.
        gpu: the GPU it was called for, as a person knows it.
        text: NVML's own words for the code.
    """
    error, way_out = _ERRORS.get(code, _TRANSIENT)
    if code == NOT_FOUND and not function.startswith("nvmlDeviceGetHandle"):
        error, way_out = _TRANSIENT  # something of the GPU was not found, not the GPU
    return error(f"{function} failed for {gpu}: {text} (NVML code {code}): {way_out}")
