"""A user's load test of a running server, read from CSV; every bad cell is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agft_ray.calibration.csv_table import (
    CellError,
    Cells,
    CsvTable,
    number,
    read_table,
    shortened,
    twice,
)
from agft_ray.calibration.load_run import Load
from agft_ray.errors import ConfigError

LATENCIES = (
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p50_s",
    "tpot_p99_s",
)
QUANTITIES = ("power_w", *LATENCIES)
"""What may be measured of a load: power of the whole group, and latencies of its requests."""
COLUMNS = (
    "sm_clock_mhz",
    "rate_per_s",
    "prompt_tokens",
    "output_tokens",
    "tensor_parallel",
    *QUANTITIES,
)
ALIASES = {
    "tp": "tensor_parallel",
    "sm_mhz": "sm_clock_mhz",
    "rps": "rate_per_s",
    "input_len": "prompt_tokens",
    "output_len": "output_tokens",
}
"""Other people's names of columns -> ours."""

_WHOLE = ("sm_clock_mhz", "prompt_tokens", "output_tokens", "tensor_parallel")


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One line: a steady load, and what was measured of it."""

    line: int
    load: Load
    """A rate of 0 is the loaded engine without requests."""
    tensor_parallel: int | None
    measured: Mapping[str, float]
    """By the names in `QUANTITIES`."""


@dataclass(frozen=True, slots=True)
class LoadTable:
    """A file's lines, and its columns that mean nothing here."""

    rows: tuple[LoadRow, ...]
    unused_columns: tuple[str, ...]


def is_load_table(table: CsvTable) -> bool:
    """Whether the columns are those of a load test, rather than of single steps."""
    return "rate_per_s" in table.renamed(ALIASES).header


def read_load_table(path: Path) -> LoadTable:
    """`parse_load_table` of a file."""
    return parse_load_table(read_table(path))


def parse_load_table(table: CsvTable) -> LoadTable:
    """The lines of a table with columns as in `COLUMNS` or `ALIASES`, others ignored.

    Raises `ConfigError` with every problem found, by line and field.
    """
    table = table.renamed(ALIASES)
    if problems := list(_header_problems(table.header)):
        raise ConfigError(table.source, problems)
    rows: list[LoadRow] = []
    for line, cells in table.rows:
        found = list(_row(line, cells, rows))
        problems.extend(f"line {line}: {problem}" for problem in found)
    if not rows and not problems:
        problems = ["holds no measurements, only a header"]
    if problems:
        raise ConfigError(table.source, shortened(problems))
    return LoadTable(tuple(rows), tuple(name for name in table.header if name not in COLUMNS))


def _header_problems(header: tuple[str, ...]) -> Iterator[str]:
    others = {ours: theirs for theirs, ours in ALIASES.items()}
    for name in ("sm_clock_mhz", "rate_per_s", "prompt_tokens", "output_tokens"):
        if name not in header:
            yield (
                f"line 1: column {name} (or {others[name]}) is missing; "
                f"found {', '.join(header) or 'nothing'}"
            )
    if not set(QUANTITIES) & set(header):
        yield f"line 1: needs one of the columns {', '.join(QUANTITIES)}"
    yield from twice(header, COLUMNS)


def _row(line: int, cells: Cells, rows: list[LoadRow]) -> Iterator[str]:
    """Append the line's row, or yield its problems."""
    if None in cells:
        yield "has more cells than the header"
        return
    values: dict[str, float] = {}
    problems: list[str] = []
    for name in COLUMNS:
        try:
            value = number(name, (cells.get(name) or "").strip(), whole=name in _WHOLE)
        except CellError as error:
            problems.append(str(error))
            continue
        if value is not None:
            values[name] = value
    problems = problems or list(_crossed(values))
    yield from problems
    if not problems:
        clock = values.get("sm_clock_mhz")
        parallel = values.get("tensor_parallel")
        rows.append(
            LoadRow(
                line=line,
                load=Load(
                    sm_clock_mhz=None if clock is None else int(clock),
                    rate_per_s=values["rate_per_s"],
                    prompt_tokens=int(values.get("prompt_tokens", 0)),
                    output_tokens=int(values.get("output_tokens", 0)),
                ),
                tensor_parallel=None if parallel is None else int(parallel),
                measured={name: values[name] for name in QUANTITIES if name in values},
            )
        )


def _crossed(values: Mapping[str, float]) -> Iterator[str]:
    for name in ("sm_clock_mhz", "tensor_parallel", *QUANTITIES):
        if values.get(name) == 0.0:
            way_out = "default clocks" if name == "sm_clock_mhz" else "it was not measured"
            yield f"{name}: must be above 0, got 0; leave it empty if {way_out}"
    if not set(QUANTITIES) & set(values):
        yield f"has none of {', '.join(QUANTITIES)}"
    if "rate_per_s" not in values:
        yield "rate_per_s: required, and empty; 0 is the loaded engine without requests"
    elif values["rate_per_s"] == 0.0:
        for name in (name for name in LATENCIES if name in values):
            yield f"{name}: must be empty at a rate of 0, got {values[name]:g}"
    else:
        for name in ("prompt_tokens", "output_tokens"):
            if not values.get(name):
                yield f"{name}: required and at least 1, got {values.get(name, 'nothing')}"
        yield from _crossed_latencies(values)


def _crossed_latencies(values: Mapping[str, float]) -> Iterator[str]:
    if values.get("output_tokens") == 1.0:
        for name in (name for name in LATENCIES[3:] if name in values):
            yield f"{name}: must be empty with output_tokens of 1, got {values[name]:g}"
    for kind in ("ttft", "tpot"):
        p50, p99 = values.get(f"{kind}_p50_s"), values.get(f"{kind}_p99_s")
        if p50 is not None and p99 is not None and p50 > p99:
            yield f"{kind}_p50_s: {p50:g} must not exceed {kind}_p99_s, which is {p99:g}"
