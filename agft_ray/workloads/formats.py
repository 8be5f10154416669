"""The formats of traces: one small parser each, and which of them a file is in.

A parser turns a line into a `Row` and raises `ValueError`, as 'field: rule, got value', for a line
that is broken; it is then as before. Order and origin of time are the reader's (`traces.py`).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, NoReturn, Protocol

from agft_ray.workloads.requests import PREFIX_BLOCK_TOKENS

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LENGTHS_COLUMNS = ("arrival_time_ns", "input_toks", "output_toks")
MAX_TOKENS = 2**31
MAX_TICKS = 2**63
"""Numbers from here on are mistakes, and would not fit those who count on."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TOKENS_RULE = "must be a whole number above 0 and below 2^31"


class Row(NamedTuple):
    """What a line says of one request; `ticks` are of the format's own clock."""

    ticks: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()


class TraceFormat(Protocol):
    """A parser of one file."""

    time_field: str
    ticks_per_s: int
    has_header: bool

    def parse(self, line: str) -> Row:
        """One line; raises `ValueError` naming what is wrong."""
        ...


def detect(first_line: str) -> TraceFormat:
    """The parser of a file that begins so; raises `ValueError` if it is in no known format."""
    if first_line.lstrip().startswith("{"):
        return MooncakeLines()
    header = first_line.strip().split(",")
    # The one of which the header has more; its constructor says what is missing.
    azure, lengths = (len({*header} & {*names}) for names in (AZURE_COLUMNS, LENGTHS_COLUMNS))
    if azure == lengths == 0:
        raise ValueError(
            f"must be a JSON object (Mooncake), or name the columns {','.join(AZURE_COLUMNS)} "
            f"(Azure) or {','.join(LENGTHS_COLUMNS)} (lengths), got {first_line.strip():.80}"
        )
    return AzureCsv(header) if azure >= lengths else LengthsCsv(header)


class _Columns:
    """Finds columns by the name that the header gives them."""

    def __init__(self, names: tuple[str, ...], header: list[str]) -> None:
        missing = [name for name in names if name not in header]
        if missing:
            raise ValueError(
                f"must name the columns {', '.join(names)}; missing: {', '.join(missing)}"
            )
        self._count = len(header)
        self._indices = [header.index(name) for name in names]

    def pick(self, line: str) -> list[str]:
        cells = line.split(",")
        if len(cells) != self._count:
            raise ValueError(f"must have {self._count} columns like the header, has {len(cells)}")
        return [cells[index] for index in self._indices]


class AzureCsv:
    """github.com/Azure/AzurePublicDataset, 2023 and 2024: ISO 8601 times, with a zone or without.

    Columns in any order and among others. Digits beyond the microsecond are cut off.
    """

    time_field, _prompt, _output = AZURE_COLUMNS
    ticks_per_s = 1_000_000
    has_header = True

    def __init__(self, header: list[str]) -> None:
        self._columns = _Columns(AZURE_COLUMNS, header)
        self._zoned: bool | None = None

    def parse(self, line: str) -> Row:
        """See `TraceFormat.parse`."""
        timestamp, prompt, output = self._columns.pick(line)
        prompt_tokens = _tokens(self._prompt, prompt)
        output_tokens = _tokens(self._output, output)
        return Row(self._microseconds(timestamp), prompt_tokens, output_tokens)

    def _microseconds(self, timestamp: str) -> int:
        try:
            time = datetime.fromisoformat(timestamp)
        except ValueError:
            raise ValueError(
                f"{self.time_field}: must be an ISO 8601 time, got {timestamp!r}"
            ) from None
        zoned = time.tzinfo is not None
        if self._zoned not in (None, zoned):
            raise ValueError(
                f"{self.time_field}: must have a time zone on every line or on none, "
                f"got {timestamp!r}"
            )
        self._zoned = zoned
        since = (time if zoned else time.replace(tzinfo=UTC)) - _EPOCH
        return since // timedelta(microseconds=1)


class LengthsCsv:
    """Arrival in nanoseconds and two lengths, as LLMServingSim's ShareGPT workloads have them."""

    time_field, _prompt, _output = LENGTHS_COLUMNS
    ticks_per_s = 1_000_000_000
    has_header = True

    def __init__(self, header: list[str]) -> None:
        self._columns = _Columns(LENGTHS_COLUMNS, header)

    def parse(self, line: str) -> Row:
        """See `TraceFormat.parse`."""
        time, prompt, output = self._columns.pick(line)
        ticks = _whole(time)
        if ticks is None or ticks >= MAX_TICKS:
            raise ValueError(
                f"{self.time_field}: must be a whole number of ns, 0 or more, got {time!r:.80}"
            )
        return Row(ticks, _tokens(self._prompt, prompt), _tokens(self._output, output))


class MooncakeLines:
    """github.com/kvcache-ai/Mooncake: a JSON object a line.

    `timestamp` in ms, `input_length` and `output_length` in tokens, and, where known, `hash_ids`:
    one id for each block of 512 prompt tokens, the last block possibly begun only.
    """

    time_field = "timestamp"
    ticks_per_s = 1000
    has_header = False

    def parse(self, line: str) -> Row:
        """See `TraceFormat.parse`."""
        try:
            fields = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"must be a JSON object: {error.msg}, at column {error.colno}"
            ) from None
        except RecursionError:
            raise ValueError("must be a JSON object, not one nested so deep") from None
        if not isinstance(fields, dict):
            raise ValueError(f"must be a JSON object, got {line:.80}")
        prompt_tokens = _json_tokens(fields, "input_length")
        return Row(
            _milliseconds(fields),
            prompt_tokens,
            _json_tokens(fields, "output_length"),
            _prefix_blocks(fields.get("hash_ids", []), prompt_tokens),
        )


def _milliseconds(fields: dict[str, object]) -> float:
    time = fields.get("timestamp")
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < MAX_TICKS:
        got = _got(fields, "timestamp")
        raise ValueError(f"timestamp: must be a number of ms, 0 or more, {got}")
    return time


def _json_tokens(fields: dict[str, object], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_TOKENS:
        raise ValueError(f"{name}: {_TOKENS_RULE}, {_got(fields, name)}")
    return value


def _prefix_blocks(ids: object, prompt_tokens: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or any(type(each) is not int for each in ids):
        raise ValueError(f"hash_ids: must be a list of whole numbers, got {ids!r:.80}")
    blocks = -(-prompt_tokens // PREFIX_BLOCK_TOKENS)
    if ids and len(ids) != blocks:
        raise ValueError(
            f"hash_ids: must have an id for each {PREFIX_BLOCK_TOKENS} tokens of input_length, "
            f"here {blocks}, got {len(ids)}"
        )
    return tuple(ids)


def _got(fields: dict[str, object], name: str) -> str:
    return f"got {fields[name]!r:.80}" if name in fields else "and is missing"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}: is no number of JSON")


def _tokens(name: str, text: str) -> int:
    tokens = _whole(text)
    if tokens is None or not 0 < tokens < MAX_TOKENS:
        raise ValueError(f"{name}: {_TOKENS_RULE}, got {text!r:.80}")
    return tokens


def _whole(text: str) -> int | None:
    """A whole number of at most 20 digits, or None."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= 20 else None
