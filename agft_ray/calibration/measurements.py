"""A user's measurements of a GPU under an LLM, read from CSV; every bad line is named."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from agft_ray.errors import ConfigError

Phase = Literal["idle", "prefill", "decode"]

NUMBERS = (
    "sm_clock_mhz",
    "power_w",
    "step_ms",
    "tpot_ms",
    "batch",
    "context_tokens",
    "prefill_tokens",
)
COLUMNS = (*NUMBERS, "phase")

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line: a steady state at one SM clock. `power_w` is one GPU's."""

    line: int
    phase: Phase
    sm_clock_mhz: float
    power_w: float | None
    step_ms: float | None
    """Duration of a step; while decoding that is the time per output token."""
    batch: int
    """Decoding sequences."""
    context_tokens: int
    """Tokens in their KV caches, summed."""
    prefill_tokens: int
    """Prompt tokens computed in the step."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """A file's lines, and its columns that mean nothing here."""

    rows: tuple[Measurement, ...]
    unused_columns: tuple[str, ...]


class _LineError(ValueError):
    pass


def read_measurements(path: Path) -> Measurements:
    """Read a CSV file with a header; columns as in `COLUMNS`, in any order, others ignored.

    Needed are `sm_clock_mhz` and one of `power_w`, `step_ms` and `tpot_ms`. Raises `ConfigError`
    with every problem found, by line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    reader = csv.DictReader(text.splitlines())
    header = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    if problems := list(_header_problems(header)):
        raise ConfigError(str(path), problems)
    rows, problems = [], []
    for cells in reader:
        try:
            rows.append(_measurement(reader.line_num, cells))
        except _LineError as error:
            problems.append(f"line {reader.line_num}: {error}")
    if not rows and not problems:
        problems = ["holds no measurements, only a header"]
    if problems:
        raise ConfigError(str(path), _shortened(problems))
    return Measurements(tuple(rows), tuple(name for name in header if name not in COLUMNS))


def _header_problems(header: Sequence[str]) -> Iterable[str]:
    if "sm_clock_mhz" not in header:
        found = ", ".join(header) or "nothing"
        yield f"line 1: column sm_clock_mhz is missing; found {found}"
    if not {"power_w", "step_ms", "tpot_ms"} & set(header):
        yield "line 1: needs one of the columns power_w, step_ms and tpot_ms"
    for name in sorted({name for name in COLUMNS if header.count(name) > 1}):
        yield f"line 1: column {name} is there twice"


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - _SHOWN_PROBLEMS
    return [*problems[:_SHOWN_PROBLEMS], f"and {more} more"] if more > 0 else problems


def _measurement(line: int, cells: Mapping[str | None, str | None]) -> Measurement:
    if None in cells:
        raise _LineError("has more cells than the header")
    values = {name: _number(name, (cells.get(name) or "").strip()) for name in NUMBERS}
    clock, step_ms = values["sm_clock_mhz"], values["step_ms"]
    if not clock:
        raise _LineError("sm_clock_mhz: required, must be above 0")
    if step_ms is not None and values["tpot_ms"] is not None:
        raise _LineError("step_ms and tpot_ms: give one of them, they are the same here")
    for name in ("power_w", "step_ms", "tpot_ms"):
        if values[name] == 0.0:
            raise _LineError(f"{name}: must be above 0; leave it empty if it was not measured")
    row = Measurement(
        line=line,
        phase=_phase((cells.get("phase") or "").strip(), values),
        sm_clock_mhz=clock,
        power_w=values["power_w"],
        step_ms=values["tpot_ms"] if step_ms is None else step_ms,
        batch=int(values["batch"] or 0),
        context_tokens=int(values["context_tokens"] or 0),
        prefill_tokens=int(values["prefill_tokens"] or 0),
    )
    _check_crossed(row)
    return row


def _number(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise _LineError(f"{name}: must be a number, got {text!r}") from None
    if not math.isfinite(value) or value < 0:
        raise _LineError(f"{name}: must be finite and not negative, got {text!r}")
    if name in {"batch", "context_tokens", "prefill_tokens"} and not value.is_integer():
        raise _LineError(f"{name}: must be a whole number, got {text!r}")
    return value


def _phase(text: str, values: Mapping[str, float | None]) -> Phase:
    if text:
        if text not in get_args(Phase):
            choices = ", ".join(get_args(Phase))
            raise _LineError(
                f"phase: {text!r} is unknown, choose from {choices}, or leave it empty"
            )
        return cast(Phase, text)
    if values["prefill_tokens"]:
        return "prefill"
    return "idle" if values["batch"] == 0.0 else "decode"


def _check_crossed(row: Measurement) -> None:
    if row.power_w is None and row.step_ms is None:
        raise _LineError("has neither power_w nor step_ms nor tpot_ms")
    if row.phase == "decode" and row.batch < 1:
        raise _LineError("batch: required while decoding, must be at least 1")
    if row.phase == "decode" and row.prefill_tokens:
        raise _LineError("prefill_tokens: a decode step has none; leave phase empty or `prefill`")
    if row.phase == "idle" and (row.batch or row.prefill_tokens or row.step_ms is not None):
        raise _LineError("phase: idle, yet the line has work or a step time")
    if row.phase == "prefill" and row.step_ms is not None and not row.prefill_tokens:
        raise _LineError("prefill_tokens: required where a step with prefill was timed")
