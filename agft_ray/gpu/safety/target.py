"""What a process that knows nothing else needs to bring a GPU back to default clocks.

A target is a JSON object that its GPU's owner left in the lease record. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from agft_ray.errors import GpuArgumentError

Target = dict[str, Any]

Outcome = tuple[str, str | Exception]
"""A GPU's UUID, and what was done in words, or why it could not be."""

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
