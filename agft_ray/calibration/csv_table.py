"""CSV files with a header, read into cells; what the two kinds of measurements share."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agft_ray.errors import ConfigError

Cells = Mapping[str | None, str | None]

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class CsvTable:
    """A file's header and its lines with their numbers; cells are as written."""

    source: str
    header: tuple[str, ...]
    rows: tuple[tuple[int, Cells], ...]

    def renamed(self, aliases: Mapping[str, str]) -> CsvTable:
        """The table with columns that have other names as well under ours."""

        def ours(cells: Cells) -> Cells:
            return {aliases.get(name or "", name): cell for name, cell in cells.items()}

        header = tuple(aliases.get(name, name) for name in self.header)
        return CsvTable(self.source, header, tuple((line, ours(row)) for line, row in self.rows))


class CellError(ValueError):
    """A cell or line that breaks a rule: field, rule and value."""


def read_table(path: Path) -> CsvTable:
    """Read a CSV file; raises `ConfigError` for one that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    reader = csv.DictReader(text.splitlines())
    header = tuple(name.strip() for name in reader.fieldnames or ())
    reader.fieldnames = list(header)
    return CsvTable(str(path), header, tuple((reader.line_num, cells) for cells in reader))


def twice(header: tuple[str, ...], names: tuple[str, ...]) -> Iterator[str]:
    """A problem for each of these columns that is there twice."""
    for name in sorted({name for name in names if header.count(name) > 1}):
        yield f"line 1: column {name} is there twice"


def shortened(problems: list[str]) -> list[str]:
    """As many problems as a person reads."""
    more = len(problems) - _SHOWN_PROBLEMS
    return [*problems[:_SHOWN_PROBLEMS], f"and {more} more"] if more > 0 else problems


def number(name: str, text: str, *, whole: bool = False) -> float | None:
    """The number of a cell, finite and not negative; None if it is empty."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise CellError(f"{name}: must be a number, got {text!r}") from None
    if not math.isfinite(value) or value < 0:
        raise CellError(f"{name}: must be finite and not negative, got {text!r}")
    if whole and not value.is_integer():
        raise CellError(f"{name}: must be a whole number, got {text!r}")
    return value
