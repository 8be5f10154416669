"""A user's measurements of a GPU under an LLM, read from CSV; every bad line is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from agft_ray.calibration.csv_table import (
    CellError,
    Cells,
    CsvTable,
    number,
    read_table,
    shortened,
    twice,
)
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

_WHOLE = ("batch", "context_tokens", "prefill_tokens")


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


def read_measurements(path: Path) -> Measurements:
    """`parse_measurements` of a file."""
    return parse_measurements(read_table(path))


def parse_measurements(table: CsvTable) -> Measurements:
    """The lines of a table with columns as in `COLUMNS`, in any order, others ignored.

    Needed are `sm_clock_mhz` and one of `power_w`, `step_ms` and `tpot_ms`. Raises `ConfigError`
    with every problem found, by line.
    """
    header = table.header
    if problems := list(_header_problems(header)):
        raise ConfigError(table.source, problems)
    rows, problems = [], []
    for line, cells in table.rows:
        try:
            rows.append(_measurement(line, cells))
        except CellError as error:
            problems.append(f"line {line}: {error}")
    if not rows and not problems:
        problems = ["holds no measurements, only a header"]
    if problems:
        raise ConfigError(table.source, shortened(problems))
    return Measurements(tuple(rows), tuple(name for name in header if name not in COLUMNS))


def _header_problems(header: tuple[str, ...]) -> Iterable[str]:
    if "sm_clock_mhz" not in header:
        found = ", ".join(header) or "nothing"
        yield f"line 1: column sm_clock_mhz is missing; found {found}"
    if not {"power_w", "step_ms", "tpot_ms"} & set(header):
        yield (
            "line 1: needs one of the columns power_w, step_ms and tpot_ms; "
            "a load test has rate_per_s"
        )
    yield from twice(header, COLUMNS)


def _measurement(line: int, cells: Cells) -> Measurement:
    if None in cells:
        raise CellError("has more cells than the header")
    values = {
        name: number(name, (cells.get(name) or "").strip(), whole=name in _WHOLE)
        for name in NUMBERS
    }
    clock, step_ms = values["sm_clock_mhz"], values["step_ms"]
    if not clock:
        raise CellError("sm_clock_mhz: required, must be above 0")
    if step_ms is not None and values["tpot_ms"] is not None:
        raise CellError("step_ms and tpot_ms: give one of them, they are the same here")
    for name in ("power_w", "step_ms", "tpot_ms"):
        if values[name] == 0.0:
            raise CellError(f"{name}: must be above 0; leave it empty if it was not measured")
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


def _phase(text: str, values: Mapping[str, float | None]) -> Phase:
    if text:
        if text not in get_args(Phase):
            choices = ", ".join(get_args(Phase))
            raise CellError(f"phase: {text!r} is unknown, choose from {choices}, or leave it empty")
        return cast(Phase, text)
    if values["prefill_tokens"]:
        return "prefill"
    return "idle" if values["batch"] == 0.0 else "decode"


def _check_crossed(row: Measurement) -> None:
    if row.power_w is None and row.step_ms is None:
        raise CellError("has neither power_w nor step_ms nor tpot_ms")
    if row.phase == "decode" and row.batch < 1:
        raise CellError("batch: required while decoding, must be at least 1")
    if row.phase == "decode" and row.prefill_tokens:
        raise CellError("prefill_tokens: a decode step has none; leave phase empty or `prefill`")
    if row.phase == "idle" and (row.batch or row.prefill_tokens or row.step_ms is not None):
        raise CellError("phase: idle, yet the line has work or a step time")
    if row.phase == "prefill" and row.step_ms is not None and not row.prefill_tokens:
        raise CellError("prefill_tokens: required where a step with prefill was timed")
