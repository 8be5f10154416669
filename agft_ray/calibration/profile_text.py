"""A calibrated profile as YAML, with the source and error of every number beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agft_ray.calibration.calibrate import Calibration
from agft_ray.calibration.fitting import Fit


def profile_yaml(calibration: Calibration, source: str) -> str:
    """The profile's file. `source` names the measurements."""
    fits = [fit for fit in (calibration.step_time, calibration.power) if fit is not None]
    comments = {path: text for fit in fits for path, text in _comments(fit, source)}
    head = [
        f"# Calibrated by `agft-ray calibrate` from {source}, base profile {calibration.base}.",
        "# Numbers without a comment are the base profile's; see there for their source and grade.",
    ]
    values = calibration.profile.model_dump()
    return "\n".join([*head, *_lines(values, comments)]) + "\n"


def _comments(fit: Fit, source: str) -> Iterator[tuple[str, str]]:
    quality = f"n {fit.rows}, R2 {fit.r2:.3f}, MAPE {fit.mape:.1%}"
    for path, number in fit.fitted.items():
        yield path, f"fitted to {source}: +-{number.standard_error:.2g} ({quality})"
    for path, reason in fit.kept.items():
        yield path, f"the base's: {source} does not identify it ({reason})"


def _lines(
    values: Mapping[str, Any], comments: Mapping[str, str], path: str = "", indent: str = ""
) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
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
