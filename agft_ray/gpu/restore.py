"""Bringing a GPU back to default clocks, by a process that knows nothing but a target.

A target is a JSON object that its GPU's owner left in the lease record; `check_target` says what
it holds. Also the command `python -m agft_ray.gpu.restore`. Standard library only: the clock guard
is a small process.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from agft_ray.errors import (
    AgftError,
    GpuArgumentError,
    GpuNotSupportedError,
    LeaseHeldError,
)
from agft_ray.gpu.nvml.errors import gpu_error

Target = dict[str, Any]

FORCED = (
    "Tuners are kept off for a minute and then come back, unless their mode is changed to observe "
    "or off."
)

BACKENDS = ("nvml", "zeusd", "simulated")

_UUID = re.compile(r"[A-Za-z0-9-]{1,96}")


def is_uuid(value: object) -> bool:
    """Whether it is a GPU's UUID, by its characters and length; such a one is a safe file name."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1_000_000


def _is_limit(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value < 1e6  # type: ignore[arg-type, operator]


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple) or not all(map(_is_count, value)):
        return False
    return len(value) == 2 and 0 < value[0] <= value[1]


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "uuid": (is_uuid, "letters, digits and '-'"),
    "backend": (lambda value: value in BACKENDS, f"one of {BACKENDS}"),
    "actuator": (lambda value: value in ("sm_clock", "power_limit"), "sm_clock or power_limit"),
    "path": (_is_text, "printable text"),
    "index": (lambda value: value is None or _is_count(value), "a GPU number or null"),
    "token_path": (_is_text, "printable text"),
    "restore_power_limit_w": (lambda value: value is None or _is_limit(value), "watts or null"),
    "restore_sm_clocks_mhz": (
        lambda value: value is None or _is_range(value),
        "[min, max] or null",
    ),
}


def check_target(target: object) -> Target:
    """The target, if it is one.

    Fields: uuid; backend "nvml", "zeusd" or "simulated"; actuator "sm_clock" or "power_limit";
    path (the simulated GPU's state file, zeusd's Unix socket); index (zeusd's number of the GPU);
    token_path (a file with zeusd's token, or ""); restore_power_limit_w (the limit found before
    the first change, required for power_limit); restore_sm_clocks_mhz ([min, max] to lock after
    the reset, or null).

    Raises `GpuArgumentError` naming the field, its value and the rule.
    """
    if not isinstance(target, dict):
        raise GpuArgumentError(f"restore target: must be an object, got {target!r:.80}")
    for name, (rule, words) in _RULES.items():
        if not rule(target.get(name)):
            value = target.get(name)
            raise GpuArgumentError(f"restore target: {name} must be {words}, got {value!r:.80}")
    for name, needed in (
        ("path", target["backend"] != "nvml"),
        ("index", target["backend"] == "zeusd"),
        ("restore_power_limit_w", target["actuator"] == "power_limit"),
    ):
        if needed and target[name] in ("", None):
            raise GpuArgumentError(f"restore target: {name} is missing for {target['backend']}")
    return target


def nvml_target(uuid: str) -> Target:
    """What to try for a GPU of which nothing but its UUID is known: an NVML clock reset."""
    return {
        "uuid": uuid,
        "backend": "nvml",
        "actuator": "sm_clock",
        "path": "",
        "index": None,
        "token_path": "",
        "restore_power_limit_w": None,
        "restore_sm_clocks_mhz": None,
    }


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
    """Call an NVML function; its return code becomes the exception that gpu/nvml.py raises.

    All codes but those of a GPU that is gone leave a reset due.
    """
    library = _library()
    code = getattr(library, name, lambda *_: 13)(*arguments)
    if code:
        text = library.nvmlErrorString(code) or b"no text"
        raise gpu_error(code, function=name, gpu=uuid, text=text.decode(errors="replace"))


Outcome = tuple[str, str | Exception]
"""A GPU's UUID, and what was done in words, or why it could not be."""


def reset_gpus(directory: str, uuids: Sequence[str] | None, force: bool) -> list[Outcome]:
    """Reset what dead owners left locked; with `force`, living ones' as well.

    Args:
        directory: of the leases.
        uuids: the GPUs, or None for all that have a lease record.
        force: take the GPU from a living owner and bar it for a minute (`lease.force`); a GPU
            without a record is then reset by NVML.

    Raises `GpuError` if the directory may not be trusted; one GPU's trouble is its outcome.
    """
    from agft_ray.gpu.safety import lease

    if force:
        known = [info.uuid for info in lease.leases(directory)]
        return [_forced(directory, uuid) for uuid in (known if uuids is None else uuids)]
    done = lease.sweep(directory, uuids=uuids)
    for info in lease.leases(directory):
        if info.held and (uuids is None or info.uuid in uuids):
            words = f"in use by PID {info.pid} ({info.owner}), left alone; --force takes it"
            done.append((info.uuid, words if uuids is None else LeaseHeldError(words)))
    seen = {uuid for uuid, _ in done}
    done += [(uuid, "no lease, nothing to reset") for uuid in uuids or () if uuid not in seen]
    return done


def _forced(directory: str, uuid: str) -> Outcome:
    from agft_ray.gpu.safety import lease

    try:
        lease.force(directory, uuid)
    except AgftError as error:
        return uuid, error
    return uuid, "reset, and barred for a minute"


def add_arguments(parser: Any) -> None:
    """Of this command, and of `agft-ray reset`, which is the same."""
    parser.add_argument("uuids", nargs="*", metavar="UUID", help="GPUs")
    parser.add_argument("--all", action="store_true", help="all GPUs that have a lease")
    parser.add_argument(
        "--force", action="store_true", help=f"from living owners as well. {FORCED}"
    )
    parser.add_argument("--lease-dir", metavar="DIR", help="the directory of the leases")


def usage_problem(options: Any) -> str:
    """What is wrong with the arguments given, or ""."""
    if options.all == bool(options.uuids):
        return "either --all or UUIDs: give one of them"
    wrong = [f"{uuid!r:.80} is no GPU's UUID" for uuid in options.uuids if not is_uuid(uuid)]
    return "; ".join(wrong)


def run(options: Any) -> int:
    """Reset, and print one line a GPU; 0 when all went well, else 1."""
    from agft_ray.gpu.safety.directory import default_directory

    directory = options.lease_dir or default_directory()
    try:
        outcomes = reset_gpus(directory, options.uuids or None, options.force)
    except AgftError as error:
        outcomes = [("leases", error)]
    for uuid, outcome in outcomes:
        print(f"{uuid}: {'NOT reset: ' if isinstance(outcome, Exception) else ''}{outcome}")
    if not outcomes:
        print(f"no leases in {directory}: nothing to reset")
    elif options.force:
        print(FORCED)
    return int(any(isinstance(outcome, Exception) for _, outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for bad usage."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m agft_ray.gpu.restore",
        description="Reset the clocks that dead owners left locked.",
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if problem := usage_problem(options):
        parser.error(problem)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
