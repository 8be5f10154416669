"""The step governor `pair`: one constant clock for steps with prefill, one for the others, one
while the engine is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agft_ray.config import Count, StrictModel
from agft_ray.policy.arms import at_or_below
from agft_ray.policy.step import StepSample, check_observation
from agft_ray.types import Arm


class PairConfig(StrictModel):
    """Settings of the step governor `pair`."""

    name: Literal["pair"] = "pair"
    """The governor."""
    prefill_sm_clock_mhz: Count
    """The clock of steps that compute prompt tokens; between two supported ones, the lower."""
    decode_sm_clock_mhz: Count
    """The clock of steps that only decode."""
    idle_sm_clock_mhz: Count | Literal["lowest", "default"] = "lowest"
    """The clock while the engine is empty, `default` leaves that to the driver's governor."""


class PairGovernor:
    """Two constant clocks by phase, a third while the engine is empty; learns nothing."""

    name = "pair"
    is_steady = True
    """Its choice depends on nothing but the phase: series of decode steps may be jumped over."""

    def __init__(self, config: PairConfig) -> None:
        self._config = config
        self._arms: tuple[int, ...] = ()
        self._pair: tuple[Arm, Arm] = (None, None)

    def choose(self, step: StepSample, arms: Sequence[int]) -> Arm:
        """See `StepGovernor.choose`."""
        if tuple(arms) != self._arms:
            self._arms, self._pair = tuple(arms), self._snapped(arms)
        return self._pair[0] if step.has_prefill else self._pair[1]

    def _snapped(self, arms: Sequence[int]) -> tuple[Arm, Arm]:
        if not arms:
            return None, None
        config = self._config
        return (
            at_or_below(arms, config.prefill_sm_clock_mhz),
            at_or_below(arms, config.decode_sm_clock_mhz),
        )

    def choose_idle(self, arms: Sequence[int]) -> Arm:
        """See `StepGovernor.choose_idle`."""
        idle = self._config.idle_sm_clock_mhz
        if idle == "default" or not arms:
            return None
        return min(arms) if idle == "lowest" else at_or_below(arms, idle)

    def observe(self, step: StepSample, *, duration_s: float, sm_clock_mhz: int) -> None:
        """Learn how long the step took; see `StepGovernor.observe`."""
        check_observation(duration_s, sm_clock_mhz)

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        return {
            "phase": "static",
            "prefill_sm_clock_mhz": self._config.prefill_sm_clock_mhz,
            "decode_sm_clock_mhz": self._config.decode_sm_clock_mhz,
            "idle_sm_clock_mhz": self._config.idle_sm_clock_mhz,
        }
