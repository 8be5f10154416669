"""How results look on a terminal, whatever command prints them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agft_ray.results.numbers import Verdict

PLAIN_PERIOD_S = 10.0
"""Where there is no terminal, progress is a line in so many wall seconds."""

COLOURS: dict[Verdict, str] = {"better": "green", "worse": "red"}


def coloured(text: str, verdict: Verdict, *, same: str = "") -> str:
    """Text in rich's markup: green is better, red is worse, `same` what else."""
    colour = COLOURS.get(verdict, same)
    return f"[{colour}]{text}[/]" if colour else text


@dataclass(slots=True)
class PlainProgress:
    """Progress in a log: at most a line in ten seconds of `now_s`, and the last one at the end."""

    write: Callable[[str], None]
    now_s: Callable[[], float] = time.monotonic
    _shown_s: float = field(init=False)
    _pending: str = ""

    def __post_init__(self) -> None:
        self._shown_s = self.now_s()

    def at_once(self, line: str) -> None:
        """Write this line, whenever the last one was."""
        self.write(line)
        self._shown_s, self._pending = self.now_s(), ""

    def show(self, line: str) -> None:
        """Write this line if it is time for one."""
        self._pending = line
        if line and self.now_s() - self._shown_s >= PLAIN_PERIOD_S:
            self.at_once(line)

    def end(self) -> None:
        """Write what was not shown yet."""
        if self._pending:
            self.at_once(self._pending)
