"""A step governor at work: handed each step of a virtual engine, obeyed by its GPU."""

from __future__ import annotations

from agft_ray.policy.step import StepGovernor, StepSample
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.physics import StepWork
from agft_ray.types import Arm


class GovernedSteps:
    """Asks a `StepGovernor` before each step and while the engine is empty, and locks what it says.

    Clocks are locked or reset on the device, after its delay, and only when the choice changes.
    """

    def __init__(
        self,
        governor: StepGovernor,
        arms: tuple[int, ...],
        device: Device,
        engine: BatchingEngine,
    ) -> None:
        self.governor = governor
        self.clock_changes = 0
        self._arms, self._device, self._engine = arms, device, engine
        self._locked: Arm = None
        self._step: StepSample | None = None
        self._last_step_s: float | None = None
        self._last_sm_clock_mhz: int | None = None

    def before_step(self, t_s: float, work: StepWork) -> None:
        """Ask about the step and set the clock."""
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
        self._set(t_s, self.governor.choose(self._step, self._arms))

    def after_step(self, start_s: float, end_s: float) -> None:
        """Tell how the step went."""
        clock_mhz = self._device.step_sm_clock_mhz
        if self._step is None or clock_mhz is None:
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
