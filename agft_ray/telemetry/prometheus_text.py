"""The series of a Prometheus text, as servers export them (text format 0.0.4)."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Series(NamedTuple):
    """One line of the text: a name, its labels (escapes as they are written) and a value."""

    name: str
    labels: dict[str, str]
    value: float
    """NaN for what is no number."""


def read_series(lines: Iterable[str], names: Container[str]) -> Iterator[Series]:
    """The series that have one of these names; the other lines cost next to nothing.

    A text may be 0.7 MB, of which a few lines matter. A line that was cut off is passed over.
    """
    for line in lines:
        name, brace, rest = line.partition("{")
        if not brace:
            name, _, rest = line.partition(" ")
        if name not in names:
            continue
        labels, end, value = rest.rpartition("}")
        if brace and not end:
            continue
        yield Series(name, dict(_LABEL.findall(labels)), _number(value))


def _number(text: str) -> float:
    try:
        return float(text.split()[0])  # a time may follow
    except (ValueError, IndexError):
        return math.nan
