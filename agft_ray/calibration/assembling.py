"""A profile put together from a base and the numbers fitted to measurements."""

from __future__ import annotations

from collections.abc import Mapping

from agft_ray.calibration.fitting import FittedNumber
from agft_ray.simulation.profiles import (
    GpuProfile,
    ModelProfile,
    PowerProfile,
    parse_gpu_profile,
)


def assembled(
    base: GpuProfile,
    power: PowerProfile,
    model: tuple[str, ModelProfile],
    name: str,
    fitted: Mapping[str, FittedNumber],
) -> GpuProfile:
    """The base with what was fitted, its one LLM, and the ranges that still hold.

    `fitted` is by dotted path in the profile.
    """
    model_name, model_profile = model
    other_models = tuple(f"models.{other}." for other in base.models if other != model_name)
    ranges = {
        path: interval
        for path, interval in base.ranges.items()
        if path not in fitted and not path.startswith(other_models)
    }
    values = base.model_dump() | {
        "name": name,
        "power": power.model_dump(),
        "models": {model_name: model_profile.model_dump()},
        "ranges": ranges | _two_standard_errors(fitted),
    }
    return parse_gpu_profile(values, f"profile {name}")


def _two_standard_errors(
    fitted: Mapping[str, FittedNumber],
) -> dict[str, tuple[float, float]]:
    ranges = {}
    for path, number in fitted.items():
        margin = 2.0 * number.standard_error
        low, high = max(number.value - margin, 0.0), number.value + margin
        if path.endswith(("issue_share", "decode.single")):
            high = min(high, 1.0)
        digits = ".0f" if path.endswith("_mhz") else ".4g"
        ends = float(f"{low:{digits}}"), float(f"{high:{digits}}")
        ranges[path] = min(ends[0], number.value), max(ends[1], number.value)
    return ranges
