"""Recorded traces of requests: found by name, read line by line, broken lines named."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from agft_ray.errors import TraceError
from agft_ray.workloads.formats import TraceFormat, detect
from agft_ray.workloads.requests import Request

DATA_VARIABLE = "AGFT_RAY_DATA"
"""Environment variable: the folder whose `traces/` holds traces."""
MAX_LINE_CHARS = 1 << 20
"""A longer line is no line of a trace: the longest of the public ones have some thousands."""


def data_traces() -> Path | None:
    """`$AGFT_RAY_DATA/traces`, or None where the variable is not set."""
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) / "traces" if folder else None


def find_trace(name: str | Path) -> Path:
    """The trace at this path, else the one of this name in `$AGFT_RAY_DATA/traces`.

    Raises `TraceError` if there is neither, naming both places.
    """
    path, folder = Path(name), data_traces()
    if path.exists():
        return path
    if folder is None:
        elsewhere = f"{DATA_VARIABLE} is not set"
    elif (folder / path).exists():
        return folder / path
    else:
        elsewhere = f"none at {folder / path}"
    raise TraceError(
        f"{name}: no such file, and {elsewhere}; give a path, or set {DATA_VARIABLE} to a folder "
        "and fill it with `agft-ray fetch-data`"
    )


def open_trace(
    path: str | Path, *, strict: bool = True, on_skip: Callable[[str], None] | None = None
) -> Iterator[Request]:
    """The requests of a trace, streamed; its first line tells its format.

    Formats: Azure's CSV of 2023 and 2024, Mooncake's JSON lines (with its prefix blocks), CSV of
    arrivals in ns and lengths; see `trace_formats`. Arrivals are seconds since the first
    request, ids the numbers of the rows from 1. Memory does not grow with the file.

    Raises `TraceError`, while iterating, for a file that cannot be read, is in no known format or
    holds no request, and for a broken line (columns, numbers, tokens below 1, time that goes
    backwards); unless `strict`, broken lines are passed over and `on_skip` is told of each.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", errors="replace") as file:
            yield from _read(file, path, strict, on_skip)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None


def _read(
    file: TextIO, path: str | Path, strict: bool, on_skip: Callable[[str], None] | None
) -> Iterator[Request]:
    lines = _lines(file, path)
    head = next(lines, "")
    format_ = _format(head, path)
    rows = lines if format_.has_header else itertools.chain([head], lines)
    reader = _Reader(format_)
    for number, line in enumerate(rows, 1):
        try:
            yield reader.request(str(number), line)
        except ValueError as error:
            problem = f"{path}: line {number + format_.has_header}: {error}"
            if strict:
                raise TraceError(
                    f"{problem}; correct it, or pass over it (--skip-broken)"
                ) from None
            if on_skip is not None:
                on_skip(problem)
    if reader.first is None:
        raise TraceError(f"{path}: holds no request")


def _lines(file: TextIO, path: str | Path) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_CHARS + 1)
        if not line:
            return
        if len(line) > MAX_LINE_CHARS:
            raise TraceError(
                f"{path}: line {number}: is longer than {MAX_LINE_CHARS:,} characters; "
                "a trace has one request a line"
            )
        yield line.rstrip("\n")


def _format(head: str, path: str | Path) -> TraceFormat:
    if not head.strip():
        raise TraceError(f"{path}: holds no request: its first line is empty")
    try:
        return detect(head)
    except ValueError as error:
        raise TraceError(f"{path}: line 1: {error}") from None


class _Reader:
    """Holds what must be remembered of the lines before: where time begins, and where it is."""

    def __init__(self, format_: TraceFormat) -> None:
        self._format = format_
        self.first: float | None = None
        self._latest = 0.0

    def request(self, request_id: str, line: str) -> Request:
        """Raises `ValueError`, and is as before, if the line is broken."""
        row = self._format.parse(line)
        if self.first is None:
            self.first = self._latest = row.ticks
        if row.ticks < self._latest:
            back_s = (self._latest - row.ticks) / self._format.ticks_per_s
            raise ValueError(
                f"{self._format.time_field}: must not go back, is {back_s:g} s before a line above"
            )
        self._latest = row.ticks
        arrival_s = (row.ticks - self.first) / self._format.ticks_per_s
        return Request(
            request_id, arrival_s, row.prompt_tokens, row.output_tokens, row.prefix_blocks
        )
