"""How long a change of the clock takes on this card: timed while the loop waits for it to settle.

Pure: whoever sets the clock says so, whoever reads the GPU hands the reading over.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from agft_ray.types import THROTTLED, Arm, EventReason, GpuSample

POLL_S = 0.005
"""Time between readings while a change is timed."""
KEPT = 9
"""Changes of which the median is told."""
TOLERANCE = 0.02
"""How far from its lock a clock counts as there, as a share; nearer changes are not seen."""


class ClockTimer:
    """Times changes of a busy GPU's clock, from before the call until it runs at its lock.

    Over when it was first seen to be, so rather too long than too short: prompts pay for what is
    missed. A change that is not over when waiting is counts with the time waited, the least it can
    be, unless something else holds the clock down; while none was ever seen to end, nothing is
    known.
    """

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=KEPT)
        self._has_ended = False
        self._lock: Arm = None  # that of the change under way
        self._called_s = 0.0
        self._held_down = False

    @property
    def median_s(self) -> float | None:
        """Of the last changes; None: not known."""
        return median(self._times_s) if self._has_ended else None

    def settling_s(self, settle_s: float) -> float:
        """How long a change is waited for: so long, or twice the median of a slow card's."""
        return max(settle_s, 2.0 * (self.median_s or 0.0))

    @property
    def is_running(self) -> bool:
        """A change is under way, and worth reading the GPU for."""
        return self._lock is not None

    def begin(self, lock: Arm, called_s: float, before: GpuSample | None) -> None:
        """A call has set a lock; `before` is the last reading. Default clocks have no clock of
        their own that one could wait for."""
        differs = before is not None and lock is not None and not _is_at(before, lock)
        self._lock = lock if differs else None
        self._called_s = called_s
        self._held_down = False

    def see(self, reading: GpuSample) -> None:
        """Take a reading of the change under way. An idle GPU tells nothing."""
        lock = self._lock
        if lock is None or reading.locked != lock or reading.event_reasons & EventReason.GPU_IDLE:
            self.stop()
        elif _is_at(reading, lock):
            self._end(reading.t_s)
            self._has_ended = True
        else:
            limits = THROTTLED | EventReason.SW_POWER_CAP
            self._held_down = bool(reading.event_reasons & limits)

    def give_up(self, now_s: float, waited_s: float) -> None:
        """Waiting is over, which was to take `waited_s`: a change begun on the way had less."""
        if self.is_running and not self._held_down and now_s - self._called_s > 0.9 * waited_s:
            self._end(now_s)
        self.stop()

    def stop(self) -> None:
        """Whatever is under way is not timed."""
        self._lock = None

    def _end(self, t_s: float) -> None:
        self._times_s.append(t_s - self._called_s)
        self.stop()


def _is_at(reading: GpuSample, lock: int) -> bool:
    return abs(reading.sm_clock_mhz - lock) <= TOLERANCE * lock
