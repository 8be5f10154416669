"""The loop's hand on the clocks: claims the right to set them, sets them, lets go."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from enum import StrEnum

from agft_ray.clock import Clock
from agft_ray.errors import (
    GpuArgumentError,
    GpuError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuUnavailableError,
    LeaseHeldError,
    LeaseLostError,
)
from agft_ray.gpu.base import Gpu
from agft_ray.types import THROTTLED, Actuator, Arm, EventReason, GpuSample

log = logging.getLogger(__name__)

CLOCK_TOLERANCE = 0.02
"""How far the SM clock of a busy GPU may lie from the lock, as a share of it."""
MISMATCHES_TO_DROP = 2
"""Windows in a row that ended off their lock after which an arm counts as not kept by the GPU."""
FAILURES_TO_WITHDRAW = 4
"""Arms in a row, or the same one again, that the GPU did not keep, or refused, after which it is
taken to keep none."""

_REFUSED = (GpuPermissionError, GpuNotSupportedError, GpuUnavailableError)


class Obstacle(StrEnum):
    """What keeps us from setting clocks, in one word."""

    NONE = ""
    HELD = "held"
    """Another process has the right to, at the moment."""
    REFUSED = "refused"
    """The GPU does not let us, until new settings come."""
    YIELDED = "yielded"
    """Somebody else sets them, until new settings come."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether clocks are ours to set, and if not, why."""

    obstacle: Obstacle = Obstacle.NONE
    reason: str = ""

    @property
    def is_withdrawn(self) -> bool:
        """Not to be tried again before new settings come."""
        return self.obstacle in (Obstacle.REFUSED, Obstacle.YIELDED)


@dataclass(frozen=True, slots=True)
class Hold:
    """What we know of the clocks.

                    locked  ours  due
    AS_FOUND                no    yes   whatever others left
    AT_DEFAULT              no    no    after our reset
    after(arm)      arm     yes   no    after our lock
    .attempted()    same    yes   same  a lock that is being set, or failed on the way
    .doubted()      same    same  yes   a lock not in force, a reset that failed
    .given_up()             same  yes   withdrawn; still ours if the reset failed
    .seen_at(arm)   arm     same  same  a lock that is not the one we set
    """

    locked: Arm = None
    ours: bool = False
    """Clocks are locked by us, or may be: we are to reset them."""
    due: bool = False
    """The next arm is to be set even if it is the one locked, and the first one is none."""

    @staticmethod
    def after(arm: Arm) -> Hold:
        """What is held once a clock was set, or reset."""
        return AT_DEFAULT if arm is None else Hold(arm, ours=True)

    def attempted(self) -> Hold:
        """A call that may lock is under way: whatever becomes of it, a reset is owed."""
        return replace(self, ours=True)

    def doubted(self) -> Hold:
        """The lock may not be in force: it is to be set again."""
        return replace(self, due=True)

    def given_up(self) -> Hold:
        """Withdrawn: still ours where its reset has failed."""
        return replace(self, locked=None, due=True)

    def seen_at(self, arm: Arm) -> Hold:
        """The same, with another clock in force."""
        return replace(self, locked=arm)


AS_FOUND = Hold(due=True)
AT_DEFAULT = Hold()


class ClockControl:
    """What one tuner has locked, and whether it may.

    Every method belongs to the loop's thread.
    """

    def __init__(self, gpu: Gpu, clock: Clock) -> None:
        self._gpu, self._clock = gpu, clock
        self._standing, self._hold = Standing(), AS_FOUND  # changed by `_become` alone
        self.settled_s = 0.0
        """When the last change is over; no window may begin before."""
        self.changes = 0
        self.dropped: set[int] = set()
        """Arms that the GPU does not keep or offer, whatever it says."""
        self._mismatches = self._refusals = 0  # in a row

    @property
    def state(self) -> Obstacle:
        """Why clocks are not ours to set, or none."""
        return self._standing.obstacle

    @property
    def reason(self) -> str:
        """Of the obstacle, for people."""
        return self._standing.reason

    @property
    def is_withdrawn(self) -> bool:
        """Nothing is set any more until new settings come."""
        return self._standing.is_withdrawn

    @property
    def locked(self) -> Arm:
        """What is locked, None at default clocks."""
        return self._hold.locked

    @locked.setter
    def locked(self, arm: Arm) -> None:
        """What was seen to be locked instead, by somebody else."""
        self._become(hold=self._hold.seen_at(arm))

    @property
    def reset_due(self) -> bool:
        """Clocks are to be reset first, or a reset has failed and is to be tried again."""
        return self._hold.due

    def _become(self, standing: Standing | None = None, hold: Hold | None = None) -> None:
        if standing is not None:
            self._standing = standing
        if hold is not None:
            self._hold = hold

    def restart(self) -> None:
        """Forget refusals: new settings may have changed what they were about."""
        self._become(Standing())
        self._mismatches = self._refusals = 0
        self.dropped.clear()

    def take(self, settle_s: float) -> bool:
        """Have the right to set clocks, with clocks reset unless we have locked them."""
        if self.is_withdrawn:
            return False
        try:
            self._claim()
        except (LeaseHeldError, LeaseLostError) as error:
            self._stand_by(str(error))
            return False
        except _REFUSED as error:
            self._withdraw(Obstacle.REFUSED, str(error))
            return False
        self._become(Standing())
        if self.reset_due:
            self.set(None, settle_s)
        return not self.is_withdrawn

    def _claim(self) -> None:
        try:
            self._gpu.claim()
        except LeaseLostError as error:
            self._forget(error)
            self._gpu.claim()

    def _forget(self, error: Exception) -> None:
        """Clocks were taken back, and have been reset by whoever did it."""
        log.warning("%s", error)
        self._become(hold=AS_FOUND)

    def set(self, arm: Arm, settle_s: float) -> None:
        """Lock or reset, only when it changes something; then let the clock settle.

        Raises `GpuTransientError` or `GpuLostError`; what is permanent is dealt with here.
        """
        if arm == self.locked and not self.reset_due:
            return
        if arm in self.dropped and arm != self.locked:
            self._count_refusal(arm, "it was dropped, and there is no other")
            return
        try:
            if arm is None:
                self._gpu.reset()
            else:
                self._become(hold=self._hold.attempted())
                self._gpu.lock(arm)
        except GpuArgumentError as error:
            if arm is None:
                raise
            self.dropped.add(arm)
            self._count_refusal(arm, str(error))
            return
        except LeaseLostError as error:
            self._forget(error)
            return
        except _REFUSED as error:
            self._withdraw(Obstacle.REFUSED, str(error))
            return
        if arm is not None:
            self._refusals = 0
        self.changes += arm != self.locked
        self._become(hold=Hold.after(arm))
        self.settled_s = self._clock.now_s() + settle_s

    def check(self, reading: GpuSample) -> None:
        """Compare the clock at the end of a busy window with the lock: NVML reports success for
        clocks it clamps, and for locks that somebody else replaces a moment later.

        One mismatch has the lock set again (a reloaded driver forgets it). A second one below the
        lock drops the arm, and a GPU that keeps one arm after another no better is reset and let
        alone. Clocks above the lock mean that it is not in force, so that somebody else sets them:
        then we yield, without a reset that would undo what they did.
        """
        if self.locked is None or not self._is_evidence(reading):
            return
        off_mhz = reading.sm_clock_mhz - self.locked
        if abs(off_mhz) <= CLOCK_TOLERANCE * self.locked:
            self._mismatches = 0
            return
        self._mismatches += 1
        found = f"locked at {self.locked} MHz, running at {reading.sm_clock_mhz} MHz"
        log.warning("%s (%d in a row)", found, self._mismatches)
        if off_mhz > 0 and self._mismatches >= MISMATCHES_TO_DROP:
            self._yield(found)
        elif self._mismatches >= FAILURES_TO_WITHDRAW:
            self._withdraw(
                Obstacle.REFUSED,
                f"{found}: the GPU keeps no clock; see its limits, then send new settings",
            )
        elif self._mismatches % MISMATCHES_TO_DROP == 0:
            self.dropped.add(self.locked)
        else:
            self._become(hold=self._hold.doubted())

    def _is_evidence(self, reading: GpuSample) -> bool:
        limits = THROTTLED | EventReason.SW_POWER_CAP | EventReason.GPU_IDLE
        return (
            self._gpu.actuator is Actuator.SM_CLOCK
            and reading.locked == self.locked
            and not reading.event_reasons & limits
        )

    def let_go(self, *, for_good: bool = False) -> bool:
        """Reset the clocks if they are or may be ours, and give the right back; False if the reset
        fails. Then the right is kept, for another try, unless this is the last one."""
        is_reset = not self._hold.ours or self.reset()
        if is_reset or for_good:
            self._gpu.release()
            self._become(hold=self._hold.doubted())
        return is_reset

    def reset_own(self) -> None:
        """Reset the clocks if they are or may be ours."""
        if self._hold.ours:
            self.reset()

    def reset(self) -> bool:
        """Reset the clocks whatever state things are in; False, and still due, if that fails."""
        self._become(hold=self._hold.doubted())
        try:
            self._gpu.reset()
        except GpuError:
            log.exception("clocks of %s could not be reset", self._gpu.uuid)
            return False
        self._become(hold=AT_DEFAULT)
        return True

    def _count_refusal(self, arm: Arm, why: str) -> None:
        self._refusals += 1
        log.warning("arm %s is not set: %s", arm, why)
        if self._refusals >= FAILURES_TO_WITHDRAW:
            self._withdraw(
                Obstacle.REFUSED,
                f"the GPU takes none of its clocks, the last was {arm}: {why}",
            )

    def _stand_by(self, reason: str) -> None:
        if self.state is not Obstacle.HELD:
            log.warning("observing only: %s", reason)
        self._become(Standing(Obstacle.HELD, reason), AS_FOUND)

    def _withdraw(self, obstacle: Obstacle, reason: str) -> None:
        log.error("clocks are not set any more: %s", reason)
        self._become(Standing(obstacle, reason))
        self.reset_own()
        self._gpu.release()
        self._become(hold=self._hold.given_up())

    def _yield(self, found: str) -> None:
        self._become(hold=AS_FOUND)  # not ours, so that withdrawing does not reset
        self._withdraw(
            Obstacle.YIELDED,
            f"{found}: somebody else sets clocks; end that, then send new settings",
        )
