"""The switch: what an engine does, told from arrivals and steps; and how fast clocks may follow.

Pure: no clock, no GPU. It lives where arrivals and steps are seen; whoever sets clocks is told of
changes only.
"""

from __future__ import annotations

from collections import deque

from agft_ray.types import Phase

MAX_CHANGES_PER_S = 40
"""Changes of the clock within a plan, a second. A call takes NVML some 5 ms, a change 10-100 ms:
more would cost the tuner's thread a fifth of its time and never be in force."""


class Switch:
    """Follows what one engine does. Each event gives the phase if it has changed, else None.

    A prompt is pending from its arrival until its first token. One that arrives while a step runs
    is not in that step, and so pending after it: to forget it costs a third of TTFT.
    """

    def __init__(self) -> None:
        self.phase = Phase.PREFILL
        """Until something is known; the fastest clock."""

    def on_arrival(self) -> Phase | None:
        """A prompt has come, before any step computes it."""
        return self._to(Phase.PREFILL)

    def on_step(self, pending_prompts: int) -> Phase | None:
        """A step has ended; `pending_prompts` are those that have arrived by now, also during the
        step, and have no token yet. Where prompts are all known, a step with prefill that leaves
        none pending was the last one with prefill."""
        return self._to(Phase.PREFILL if pending_prompts > 0 else Phase.DECODE)

    def on_empty(self) -> Phase | None:
        """Nothing runs and nothing waits."""
        return self._to(Phase.IDLE)

    def _to(self, phase: Phase) -> Phase | None:
        if phase is self.phase:
            return None
        self.phase = phase
        return phase


class Pace:
    """Holds changes of the clock to `MAX_CHANGES_PER_S`.

    Only the way down is refused: every way up follows one down, so no more than one change a
    second comes on top, and no prompt waits for its clock.
    """

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=MAX_CHANGES_PER_S)

    def allows(self, t_s: float, *, lowers: bool) -> bool:
        """Whether a change may be made now."""
        full = len(self._times_s) == MAX_CHANGES_PER_S and t_s - self._times_s[0] < 1.0
        return not (full and lowers)

    def count(self, t_s: float) -> None:
        """A change was made."""
        self._times_s.append(t_s)
