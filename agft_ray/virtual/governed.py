"""A step governor at work: handed each step of a virtual engine, obeyed by its GPU."""

from __future__ import annotations

from agft_ray.policy.step import StepGovernor, StepSample
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.physics import StepWork
from agft_ray.types import Arm


class GovernedSteps:
    """Asks a `StepGovernor` before each step and while the engine is empty, and locks what it says.

    Clocks are locked or reset on the device, after its delay, and only when the choice changes. A
    governor with a true attribute `is_steady` promises that its choice depends on nothing but
    whether a step computes prompt tokens, and that it learns nothing: it is asked once of each,
    and series of decode steps may be jumped over.
    """

    def __init__(
        self,
        governor: StepGovernor,
        arms: tuple[int, ...],
        device: Device,
        engine: BatchingEngine,
    ) -> None:
        self.governor = governor
        self.is_steady = bool(getattr(governor, "is_steady", False))
        """See `StepHook`."""
        self.clock_changes = 0
        self._arms, self._device, self._engine = arms, device, engine
        self._locked: Arm = None
        self._steady: dict[bool, Arm] = {}
        """A steady governor's choices, by whether there is prefill."""
        self._step: StepSample | None = None
        self._last_step_s: float | None = None
        self._last_sm_clock_mhz: int | None = None

    def before_step(self, t_s: float, work: StepWork) -> None:
        """Ask about the step and set the clock."""
        has_prefill = work.prefill_tokens > 0
        if has_prefill in self._steady:
            self._set(t_s, self._steady[has_prefill])
            return
        self._step = StepSample(
            t_s=t_s,
            prefill_tokens=work.prefill_tokens,
            decode_sequences=work.decode_sequences,
            context_tokens=work.context_tokens,
            waiting=self._engine.waiting,
            kv_cache_usage=self._engine.kv_cache_usage,
            last_step_s=self._last_step_s,
            last_sm_clock_mhz=self._last_sm_clock_mhz,
        )
        arm = self.governor.choose(self._step, self._arms)
        if self.is_steady:
            self._steady[has_prefill] = arm
        self._set(t_s, arm)

    def after_step(self, start_s: float, end_s: float) -> None:
        """Tell how the step went."""
        clock_mhz = self._device.step_sm_clock_mhz
        if self._step is None or clock_mhz is None or self.is_steady:
            return
        self._last_step_s, self._last_sm_clock_mhz = end_s - start_s, clock_mhz
        self.governor.observe(self._step, duration_s=end_s - start_s, sm_clock_mhz=clock_mhz)

    def on_empty(self, t_s: float) -> None:
        """Ask for the clock of an empty engine."""
        self._last_step_s = self._last_sm_clock_mhz = None
        self._set(t_s, self.governor.choose_idle(self._arms))

    def _set(self, t_s: float, arm: Arm) -> None:
        if arm == self._locked:
            return
        if arm is None:
            self._device.reset(t_s)
        else:
            self._device.lock(t_s, arm)
        self._locked = arm
        self.clock_changes += 1
