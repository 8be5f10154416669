"""What energy counts for over time, its price or its carbon: rows from a file or a URL."""

from __future__ import annotations

import bisect
import csv
import io
import json
import logging
import math
import os
import stat
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, field_validator

from agft_ray.config import Positive, StrictModel

log = logging.getLogger(__name__)

MAX_BYTES, MAX_ROWS = 1_000_000, 20_000
TIMEOUT_S = 10.0
"""Of reading all of it from a server."""
PART_BYTES = 65_536


class EnergyWeightConfig(StrictModel):
    """Where the weights of energy are, and how they are read."""

    source: str = Field(min_length=1)
    """A file's path or an http(s) URL: rows of time (ISO 8601, UTC unless it says otherwise, or
    seconds since 1970) and weight (1 is usual), as CSV or as JSON."""
    max_age_s: Positive = 7200.0
    """How long a row holds if no later one follows; then the weight is 1."""
    refetch_s: Annotated[float, Field(ge=10)] = 300.0
    """Wall time between readings."""

    @field_validator("source")
    @classmethod
    def _readable(cls, source: str) -> str:
        scheme, separator, rest = source.partition("://")
        if separator and (scheme not in ("http", "https") or not rest):
            raise ValueError(f"{source!r} is neither a path nor an http:// or https:// URL")
        if urllib.parse.urlsplit(source).username is not None and separator:
            raise ValueError("a URL must not name a user: none is sent")
        return source


@dataclass(frozen=True, slots=True)
class EnergyWeight:
    """The weight of this moment."""

    value: float = 1.0
    problem: str = ""
    """Why it is 1 although a source is set, or why that could not be read of late."""


USUAL = EnergyWeight()
Weigh = Callable[[EnergyWeightConfig | None], EnergyWeight]
"""The weight of this moment under these settings; returns at once."""


class WeightSeries:
    """Weights by time: each holds until the next, the last one for `max_age_s`."""

    def __init__(self, rows: Iterable[tuple[float, float]], max_age_s: float) -> None:
        ordered = sorted(rows)
        self._times_s = [t_s for t_s, _ in ordered]
        self._weights = [weight for _, weight in ordered]
        self._max_age_s = max_age_s

    @property
    def start_s(self) -> float:
        """The time of the first row."""
        return self._times_s[0]

    def at(self, t_s: float) -> EnergyWeight:
        """The weight at a time; 1 where no row holds."""
        place = bisect.bisect_right(self._times_s, t_s) - 1
        if place < 0:
            return EnergyWeight(problem="the first row of the energy weights lies in the future")
        age_s = t_s - self._times_s[place]
        if age_s > self._max_age_s:
            return EnergyWeight(problem=f"the newest energy weight is {age_s:.0f} s old")
        return EnergyWeight(self._weights[place])


def read_series(config: EnergyWeightConfig) -> WeightSeries:
    """All rows of a source. Waits for it, at most about `TIMEOUT_S`.

    Raises `ValueError` for what is too large or not understood, `OSError` for what cannot be read.
    """
    is_url = "://" in config.source
    data = _fetched(config.source) if is_url else _read(config.source)
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES:,} bytes")
    return WeightSeries(parse_rows(data.decode("utf-8-sig")), config.max_age_s)


def parse_rows(text: str) -> list[tuple[float, float]]:
    """Rows of (seconds since 1970, weight). A weight below 0 (negative prices) is 0.

    JSON is a list of `{"time": ..., "weight": ...}` or `[time, weight]`; anything else is read as
    CSV, with or without the header `time,weight`. Raises `ValueError` naming the row that is wrong.
    """
    found = _json_rows(text) if text.lstrip().startswith("[") else _csv_rows(text)
    if not 0 < len(found) <= MAX_ROWS:
        raise ValueError(f"has {len(found)} rows, from 1 to {MAX_ROWS:,} are read")
    return [_row(number, values) for number, values in enumerate(found, 1)]


def _json_rows(text: str) -> list[Any]:
    return [
        (row.get("time"), row.get("weight")) if isinstance(row, dict) else row
        for row in json.loads(text)
    ]


def _csv_rows(text: str) -> list[Any]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if rows and [cell.strip().lower() for cell in rows[0]] == ["time", "weight"]:
        del rows[0]
    return rows


def _row(number: int, values: Any) -> tuple[float, float]:
    try:
        t, weight = values
        t_s, value = _seconds(t), float(weight)
        if math.isfinite(t_s) and math.isfinite(value):
            return t_s, max(0.0, value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"row {number}: must be a time and a weight, got {str(values)[:80]}")


def _seconds(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        moment = datetime.fromisoformat(value.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is not a regular file")
        return file.read(MAX_BYTES + 1)


def _opener() -> urllib.request.OpenerDirector:
    """One that knows http and https only, also where it is sent on to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _fetched(url: str) -> bytes:
    end_s, parts, size = time.monotonic() + TIMEOUT_S, [], 0
    with _opener().open(url, timeout=TIMEOUT_S) as response:
        while size <= MAX_BYTES and (part := response.read1(PART_BYTES)):
            parts.append(part)
            size += len(part)
            if time.monotonic() > end_s:
                raise TimeoutError(f"took more than {TIMEOUT_S:g} s")
    return b"".join(parts)


class WeightReader:
    """Reads a source again and again in a thread of its own, and never keeps anybody waiting.

    Rows that were read once hold as long as their times say, also while the source is away.
    """

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._config: EnergyWeightConfig | None = None
        self._ended = threading.Event()
        self._found: list[tuple[WeightSeries | None, str]] = []

    def weigh(self, config: EnergyWeightConfig | None) -> EnergyWeight:
        """The weight of this moment; other settings than before start another thread."""
        if config != self._config:
            self.close()
            self._config = config
            if config is not None:
                self._start(config)
        if config is None:
            return USUAL
        series, problem = self._found[0]
        if series is None:
            return EnergyWeight(problem=problem)
        weight = series.at(self._now_s())
        return EnergyWeight(weight.value, problem or weight.problem)

    def close(self) -> None:
        """End the thread, without waiting for it."""
        self._ended.set()

    def _start(self, config: EnergyWeightConfig) -> None:
        self._ended, self._found = threading.Event(), [(None, "no energy weights yet")]
        threading.Thread(
            target=_keep_reading,
            args=(config, self._ended, self._found),
            name="energy-weight",
            daemon=True,
        ).start()


def _keep_reading(
    config: EnergyWeightConfig,
    ended: threading.Event,
    found: list[tuple[WeightSeries | None, str]],
) -> None:
    while not ended.is_set():
        try:
            found[0] = read_series(config), ""
        except Exception as error:  # whatever a server may answer
            problem = f"energy weights of {_shown(config.source)}: {error}"
            if problem != found[0][1]:
                log.warning("%s; rows that were read before still hold", problem)
            found[0] = found[0][0], problem
        ended.wait(config.refetch_s)


def _shown(source: str) -> str:
    """The source without what may be secret in a URL."""
    if "://" not in source:
        return source
    parts = urllib.parse.urlsplit(source)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"
