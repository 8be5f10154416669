"""The loop's hand on the clocks: claims the right to set them, follows a plan, lets go."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from agft_ray.clock import Clock
from agft_ray.clock_standing import AS_FOUND, AT_DEFAULT, Hold, Standing, is_lower
from agft_ray.clock_standing import Obstacle as Obstacle
from agft_ray.clock_timer import TOLERANCE, ClockTimer
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
from agft_ray.switch import Pace
from agft_ray.types import (
    THROTTLED,
    Actuator,
    Arm,
    EventReason,
    GpuSample,
    Phase,
    Plan,
    Rises,
    Window,
)

log = logging.getLogger(__name__)

MISMATCHES_TO_DROP = 2
"""Windows in a row that ended off their lock after which an arm counts as not kept by the GPU."""
FAILURES_TO_WITHDRAW = 4
"""Arms in a row, or the same one again, that the GPU did not keep, or refused, after which it is
taken to keep none."""

_REFUSED = (GpuPermissionError, GpuNotSupportedError, GpuUnavailableError)


class ClockControl:
    """What one tuner has locked, and whether it may.

    It follows a plan: what is locked is the plan's arm for what the engine does. Whatever resets
    clocks ends the plan. Every method belongs to the loop's thread.
    """

    def __init__(self, gpu: Gpu, clock: Clock) -> None:
        self._gpu, self._clock = gpu, clock
        self._standing, self._hold = Standing(), AS_FOUND  # changed by `_become` alone
        self.plan = Plan.of(None)
        """The plan in force."""
        self.phase = Phase.PREFILL
        """What the engine does, as last told."""
        self.phase_s = self.settled_s = 0.0
        """When that was told; when the last change of plan is over: no window may begin before."""
        self.changes = self.phase_changes = self.phase_changes_put_off = 0
        """Of what is locked; those within a plan among them; phases that had to wait for theirs."""
        self.rises = Rises()
        """Of the clock to that of prefill, within plans."""
        self._pace, self._steady_s = Pace(), 0.0
        self.timer = ClockTimer()
        self._reading: GpuSample | None = None
        self._seen: GpuSample | None = None
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
        """What was seen to be locked instead, by somebody else; there is nothing to switch then."""
        self._become(hold=self._hold.seen_at(arm))
        self.plan = Plan.of(arm)

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
            self.set(Plan.of(None), settle_s)
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
        self.plan = Plan.of(None)

    def set(self, plan: Plan, settle_s: float) -> None:
        """Follow this plan from now on. What is new in it, or set anew, is to settle first.

        Raises `GpuTransientError` or `GpuLostError`; what is permanent is dealt with here.
        """
        was_due, arm, self._seen = self.reset_due, plan.at(self.phase), None
        self.timer.stop()
        if not self._lock(arm, settle_s):
            return
        if plan != self.plan or was_due:
            self.settled_s = self._clock.now_s() + self.timer.settling_s(settle_s)
        self.plan = plan

    def enter(self, phase: Phase, settle_s: float) -> None:
        """The engine does this from now on. Raises as `set`."""
        if is_new := phase is not self.phase:
            if phase is Phase.PREFILL and not self.plan.is_uniform:
                self.rises = self.rises.after(self.phase)
            self.phase, self.phase_s = phase, self._clock.now_s()
        if not self.catch_up(settle_s) and is_new:
            self.phase_changes_put_off += 1

    def catch_up(self, settle_s: float) -> bool:
        """Set the plan's arm for the present phase, if it is not; False if too much has changed
        lately. What the GPU does not keep is passed over for default clocks. Raises as `set`."""
        arm = self.plan.at(self.phase)
        if arm in self.dropped:
            arm = None
        if self.plan.is_uniform or arm == self.locked:
            return True
        now_s, before = self._clock.now_s(), self.changes
        if not self._pace.allows(now_s, lowers=is_lower(arm, self.locked)):
            return False
        self._lock(arm, settle_s)
        if self.changes > before:
            self._pace.count(now_s)
            self.phase_changes += 1
        return True

    def _lock(self, arm: Arm, settle_s: float) -> bool:
        """Lock or reset, only when it changes something; False if that did not succeed."""
        if arm == self.locked and not self.reset_due:
            return True
        if arm in self.dropped and arm != self.locked:
            self._count_refusal(arm, "it was dropped, and there is no other")
            return False
        called_s = self._clock.now_s()
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
            return False
        except LeaseLostError as error:
            self._forget(error)
            return False
        except _REFUSED as error:
            self._withdraw(Obstacle.REFUSED, str(error))
            return False
        if arm is not None:
            self._refusals = 0
        self.changes += arm != self.locked
        self._become(hold=Hold.after(arm))
        self._steady_s = self._clock.now_s() + self.timer.settling_s(settle_s)
        if self._gpu.actuator is Actuator.SM_CLOCK:
            self.timer.begin(arm, called_s, self._reading)
        return True

    def others(self, readings: Sequence[GpuSample], plan: Plan, is_ours: bool) -> str:
        """How the locks of a window's readings show that somebody else has set clocks, or ""."""
        found, last = {reading.locked for reading in readings}, readings[-1].locked
        if len(found) > 1 and not found <= set(plan.arms):
            return "the lock changed within the window"
        if not is_ours or last == self.locked:
            return ""
        expected, self.locked = self.locked, last
        return f"locked at {last}, not at {expected}: somebody else sets clocks"

    def judge(self, window: Window) -> str:
        """Whether the window shows that what we are told of phases or clocks is wrong.

        First tokens without a word of a prompt mean that the switch hangs or is gone: prompts then
        have their clock until it tells again, and this is said. Of a busy window the last reading
        whose lock had been in force for long is checked; see `check`.
        """
        is_silent = self.phase is not Phase.PREFILL and self.phase_s < window.start_s
        if is_silent and window.ttft_count and not self.plan.is_uniform:
            self.phase = Phase.PREFILL
            return "first tokens came, and the switch has told of no prompt"
        if self._seen is not None and not window.is_idle:
            self.check(self._seen)
        return ""

    def see(self, reading: GpuSample) -> None:
        """Keep it for `judge` if its lock has been in force long enough to be followed."""
        self._reading = reading
        if reading.t_s >= self._steady_s:
            self._seen = reading

    def check(self, reading: GpuSample) -> None:
        """Compare the clock of a reading in a busy window with its lock: NVML reports success for
        clocks it clamps, and for locks that somebody else replaces a moment later.

        One mismatch has the lock set again (a reloaded driver forgets it). A second one below the
        lock drops the arm, and a GPU that keeps one arm after another no better is reset and let
        alone. Clocks above the lock mean that it is not in force, so that somebody else sets them:
        then we yield, without a reset that would undo what they did.
        """
        lock = reading.locked
        if lock is None or not self._is_evidence(reading):
            return
        off_mhz = reading.sm_clock_mhz - lock
        if abs(off_mhz) <= TOLERANCE * lock:
            self._mismatches = 0
            return
        self._mismatches += 1
        found = f"locked at {lock} MHz, running at {reading.sm_clock_mhz} MHz"
        log.warning("%s (%d in a row)", found, self._mismatches)
        if off_mhz > 0 and self._mismatches >= MISMATCHES_TO_DROP:
            self._yield(found)
        elif self._mismatches >= FAILURES_TO_WITHDRAW:
            self._withdraw(
                Obstacle.REFUSED,
                f"{found}: the GPU keeps no clock; see its limits, then send new settings",
            )
        elif self._mismatches % MISMATCHES_TO_DROP == 0:
            self.dropped.add(lock)
        else:
            self._become(hold=self._hold.doubted())

    def _is_evidence(self, reading: GpuSample) -> bool:
        limits = THROTTLED | EventReason.SW_POWER_CAP | EventReason.GPU_IDLE
        return (
            self._gpu.actuator is Actuator.SM_CLOCK
            and reading.locked in self.plan.arms
            and not reading.event_reasons & limits
        )

    def let_go(self, *, for_good: bool = False) -> bool:
        """Reset the clocks if they are or may be ours, and give the right back; False if the reset
        fails. Then the right is kept, for another try, unless this is the last one."""
        is_reset = self.reset_own()
        if is_reset or for_good:
            self._gpu.release()
            self._become(hold=self._hold.doubted())
        return is_reset

    def reset_own(self) -> bool:
        """End the plan, and reset the clocks if they are or may be ours; False if that fails."""
        self.plan = Plan.of(None)
        return not self._hold.ours or self.reset()

    def reset(self) -> bool:
        """Reset the clocks whatever state things are in; False, and still due, if that fails."""
        self._become(hold=self._hold.doubted())
        self.plan = Plan.of(None)
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
        self.plan = Plan.of(None)

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
