"""The switch in virtual time: told by the engine, followed by the tuner after a call's delay."""

from __future__ import annotations

import math

from agft_ray.clock import ManualClock
from agft_ray.switch import Switch
from agft_ray.tuner import Tuner
from agft_ray.types import Phase

CALL_DELAY_S = 0.005
"""From a change of phase to the GPU's having been called: a message, a thread, NVML."""


class SwitchedClocks:
    """Stands for the replica's switch, its message, and the thread that waits for it.

    The device adds its own delay. Changes that follow one another faster than the message are one;
    where the plan has one clock there is nothing to wait for.
    """

    def __init__(self, tuner: Tuner, clock: ManualClock) -> None:
        self._tuner, self._clock = tuner, clock
        self._switch = Switch()
        self.due_s = math.inf
        """When the tuner comes to know."""

    def on_arrival(self, t_s: float) -> None:
        """A prompt has come."""
        self._tell(t_s, self._switch.on_arrival())

    def on_step(self, t_s: float, pending_prompts: int) -> None:
        """See `PhaseListener`."""
        self._tell(t_s, self._switch.on_step(pending_prompts))

    def on_empty(self, t_s: float) -> None:
        """See `PhaseListener`."""
        self._tell(t_s, self._switch.on_empty())

    def act(self, t_s: float) -> None:
        """See `PhaseListener`."""
        self.due_s = math.inf
        self._clock.advance_to(t_s)
        self._tuner.enter(self._switch.phase)

    def _tell(self, t_s: float, phase: Phase | None) -> None:
        if phase is None:
            return
        if self._tuner.control.plan.is_uniform and self.due_s == math.inf:
            self._tuner.control.phase = phase
        else:
            self.due_s = min(self.due_s, t_s + CALL_DELAY_S)
