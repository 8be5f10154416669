"""A calibrated profile as YAML, with the source and error of every number beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agft_ray.calibration.calibrate import Calibration
from agft_ray.calibration.load_fit import LoadCalibration
from agft_ray.simulation.profiles import GpuProfile

_OF_THE_MODEL = ("layers", "weights_bytes", "kv_bytes_per_token", "tensor_parallel")
"""Facts that are the same on every card."""


def profile_yaml(
    calibration: Calibration | LoadCalibration, source: str, notes: Mapping[str, str] | None = None
) -> str:
    """The profile's file.

    Args:
        calibration: of which the profile is.
        source: names the measurements.
        notes: dotted path -> where a number that was not fitted comes from, if not from the base.
    """
    base, profile = calibration.base, calibration.profile
    kept, fitted = dict[str, str](), dict[str, str]()
    for paths, reasons in _comments(calibration, source):
        fitted |= paths
        kept |= {
            path: f"from {base}, not measured: {source} does not identify it ({reason})"
            for path, reason in reasons.items()
        }
    comments = {**_unmeasured(profile, base), **kept, **(notes or {}), **fitted}
    head = [
        f"# Calibrated by `agft-ray calibrate` from {source}, base profile {base}.",
        f"# See {base} for source and grade of the numbers that are from there.",
    ]
    return "\n".join([*head, *_lines(profile.model_dump(), comments)]) + "\n"


def _comments(
    calibration: Calibration | LoadCalibration, source: str
) -> Iterator[tuple[dict[str, str], Mapping[str, str]]]:
    """Comments of what was fitted, and reasons why others were not."""
    if isinstance(calibration, LoadCalibration):
        fitted = calibration.fitted
        yield (
            {
                path: f"fitted to the load test {source}: +-{number.standard_error:.2g}"
                for path, number in fitted.items()
            },
            calibration.kept,
        )
        return
    for fit in (calibration.step_time, calibration.power):
        if fit is not None:
            quality = f"n {fit.rows}, R2 {fit.r2:.3f}, MAPE {fit.mape:.1%}"
            yield (
                {
                    path: f"fitted to {source}: +-{number.standard_error:.2g} ({quality})"
                    for path, number in fit.fitted.items()
                },
                fit.kept,
            )


def _unmeasured(profile: GpuProfile, base: str) -> dict[str, str]:
    """A mark for every number of a card."""
    values = profile.model_dump(exclude={"ranges", "name"})
    return {
        path: f"from {base}, not measured"
        for path, value in _leaves(values)
        if path.rpartition(".")[2] not in _OF_THE_MODEL and not path.endswith(".form")
    }


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _lines(
    values: Mapping[str, Any], comments: Mapping[str, str], path: str = "", indent: str = ""
) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:" if value else f"{indent}{key}: {{}}"
            # The keys of `ranges` are paths themselves.
            inner = f"{path}{key}." if key != "ranges" else "ranges:"
            yield from _lines(value, comments, inner, indent + "  ")
            continue
        comment = comments.get(f"{path}{key}")
        yield f"{indent}{key}: {_scalar(value)}" + (f"  # {comment}" if comment else "")


def _scalar(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 takes 1e-05 for text; it needs the point.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return str(value) if isinstance(value, int) else _quoted(str(value))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
