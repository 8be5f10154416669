"""The source of time: passed to everything that waits, so one loop runs under any clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Monotonic time in seconds, and how fast it runs against the wall."""

    @property
    def speed(self) -> float:
        """Seconds of this clock per wall second."""
        ...

    def now_s(self) -> float:
        """Seconds since the clock's origin; never decreases."""
        ...


@dataclass(frozen=True, slots=True)
class WallClock:
    """The host's monotonic clock, `speed` times faster, from `origin_s` on.

    The monotonic clock is one for all processes of a host, so processes that share the origin
    and the speed (simulated GPU, engine, tuner) read the same simulated time.
    """

    speed: float = 1.0
    origin_s: float = 0.0

    def now_s(self) -> float:
        """Seconds of the monotonic clock."""
        return (time.monotonic() - self.origin_s) * self.speed


@dataclass(slots=True)
class ManualClock:
    """A clock that moves only when told to: virtual time, and tests."""

    t_s: float = 0.0
    speed: float = 1.0

    def now_s(self) -> float:
        """The time last set."""
        return self.t_s

    def advance_to(self, t_s: float) -> None:
        """Move forward to `t_s`; a time in the past is ignored."""
        self.t_s = max(self.t_s, t_s)
