"""Requests to serve: recorded traces, and a generator that resembles one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from agft_ray.errors import TraceError
from agft_ray.types import Request

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

CONVERSATION_CV = 1.09
"""Coefficient of variation of the times between arrivals: that of the Azure 2023 conversation
trace (github.com/Azure/AzurePublicDataset, CC-BY 4.0), of which the quantiles below are, too."""
_QUANTILES = (
    0,
    0.01,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.95,
    0.99,
    0.999,
    1,
)
# fmt: off
# The trace's longest prompt is 14,050 tokens; here it is what an 8,192-token context leaves.
_PROMPT_TOKENS = (
    2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 1876, 2734, 4083, 4142, 6179, 7192,
)
_OUTPUT_TOKENS = (
    7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 411, 424, 451, 601, 954, 1000,
)
# fmt: on


def generate_conversation(rate_per_s: float, duration_s: float, seed: int) -> Iterator[Request]:
    """Chat requests like those of the Azure 2023 conversation trace, at any rate.

    Arrivals are a renewal process with gamma-distributed gaps of mean `1 / rate_per_s` and the
    trace's coefficient of variation. Prompt and output lengths are drawn independently (the
    trace's rank correlation is 0.07) from piecewise linear quantile functions through the trace's
    quantiles; prompt and output together never exceed 8,192 tokens. The n-th request's lengths
    depend on the seed alone.

    Raises `ValueError` unless rate and duration are positive.
    """
    for name, value in (("rate_per_s", rate_per_s), ("duration_s", duration_s)):
        if not value > 0:
            raise ValueError(f"{name}: must be above 0, got {value}")
    return until(_conversation(rate_per_s, seed), duration_s)


def _conversation(rate_per_s: float, seed: int) -> Iterator[Request]:
    gaps, lengths = np.random.default_rng(seed).spawn(2)
    shape = CONVERSATION_CV**-2
    scale_s = 1.0 / (rate_per_s * shape)
    t_s = 0.0
    for number in itertools.count(1):
        t_s += gaps.gamma(shape, scale_s)
        prompt, output = lengths.random(2)
        yield Request(
            request_id=str(number),
            arrival_s=t_s,
            prompt_tokens=round(np.interp(prompt, _QUANTILES, _PROMPT_TOKENS)),
            output_tokens=round(np.interp(output, _QUANTILES, _OUTPUT_TOKENS)),
        )


def thin(requests: Iterable[Request], keep: float, seed: int) -> Iterator[Request]:
    """A random share `keep` (above 0, at most 1) of the requests, each decided by itself.

    Keeps a trace's burstiness better than stretching its time. What is kept of the first n
    requests does not depend on how many follow. Raises `ValueError` for any other `keep`.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: must be above 0 and at most 1, got {keep}")
    draws = np.random.default_rng(seed)
    return (request for request in requests if draws.random() < keep)


def until(requests: Iterable[Request], duration_s: float) -> Iterator[Request]:
    """The requests that arrive before `duration_s`; they must come in order of arrival."""
    return itertools.takewhile(lambda request: request.arrival_s < duration_s, requests)


def read_azure_trace(
    path: str | Path, *, strict: bool = True, on_skip: Callable[[str], None] | None = None
) -> Iterator[Request]:
    """The requests of a trace in the format of github.com/Azure/AzurePublicDataset, streamed.

    A CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, in any order and
    among others. Arrivals are seconds since the first request, ids the numbers of the rows from 1.

    Raises `TraceError`, while iterating, for a file that cannot be read, lacks a column or holds
    no request, and for a broken line (columns, numbers, tokens below 1, time that goes backwards);
    unless `strict`, broken lines are passed over and `on_skip` is told of each.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", errors="replace") as file:
            yield from _read(file, path, strict, on_skip)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None


def _read(
    file: Iterable[str], path: str | Path, strict: bool, on_skip: Callable[[str], None] | None
) -> Iterator[Request]:
    rows = (line.rstrip("\n").split(",") for line in file)
    header = next(rows, [])
    parser = _RowParser(len(header), _column_indices(header, path))
    for number, row in enumerate(rows, 1):
        try:
            yield parser.parse(str(number), row)
        except ValueError as error:
            problem = f"{path}: line {number + 1}: {error}"
            if strict:
                raise TraceError(f"{problem}; correct the line or skip broken ones") from None
            if on_skip is not None:
                on_skip(problem)
    if parser.first is None:
        raise TraceError(f"{path}: holds no request")


def _column_indices(header: list[str], path: str | Path) -> list[int]:
    missing = [name for name in TRACE_COLUMNS if name not in header]
    if missing:
        raise TraceError(
            f"{path}: line 1: must name the columns {', '.join(TRACE_COLUMNS)}; "
            f"missing: {', '.join(missing)}"
        )
    return [header.index(name) for name in TRACE_COLUMNS]


@dataclass(slots=True)
class _RowParser:
    columns: int
    indices: list[int]
    first: datetime | None = None
    """Time of the first request."""
    latest_s: float = 0.0

    def parse(self, request_id: str, row: list[str]) -> Request:
        """Raises `ValueError`, and is as before, if the row is broken."""
        if len(row) != self.columns:
            raise ValueError(f"must have {self.columns} columns like the header, has {len(row)}")
        timestamp, prompt, output = (row[index] for index in self.indices)
        prompt_tokens = _tokens(TRACE_COLUMNS[1], prompt)
        output_tokens = _tokens(TRACE_COLUMNS[2], output)
        arrival_s = self._arrival_s(timestamp)
        return Request(request_id, arrival_s, prompt_tokens, output_tokens)

    def _arrival_s(self, timestamp: str) -> float:
        name = TRACE_COLUMNS[0]
        try:
            time = datetime.fromisoformat(timestamp)
            arrival_s = (time - (self.first or time)).total_seconds()
        except (ValueError, TypeError):  # the latter if only one of the two has a time zone
            raise ValueError(f"{name}: must be an ISO 8601 time, got {timestamp!r}") from None
        if arrival_s < self.latest_s:
            raise ValueError(f"{name}: must not go back, got {timestamp} after a later time")
        self.first, self.latest_s = self.first or time, arrival_s
        return arrival_s


def _tokens(name: str, text: str) -> int:
    tokens = int(text) if text.strip().isdecimal() else 0
    if tokens < 1:
        raise ValueError(f"{name}: must be a whole number above 0, got {text!r}")
    return tokens
