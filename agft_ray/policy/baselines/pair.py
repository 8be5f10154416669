"""Constant clocks by what the engine does: prefill, decode, nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agft_ray.config import Count, StrictModel
from agft_ray.policy.arms import at_or_below
from agft_ray.policy.static import StaticPolicy
from agft_ray.types import Arm, Context, Decision, Plan


class PairConfig(StrictModel):
    """Settings of the policy `pair`."""

    name: Literal["pair"] = "pair"
    """The policy."""
    prefill_sm_clock_mhz: Count
    """The clock while prompts are computed or wait; between two supported ones, the lower."""
    decode_sm_clock_mhz: Count
    """The clock while only further tokens are generated."""
    idle_sm_clock_mhz: Count | Literal["lowest", "default"] = "lowest"
    """The clock while the engine is empty, `default` leaves that to the driver's governor."""


class PairPolicy(StaticPolicy):
    """Always the same plan: two clocks by phase, a third while empty; learns nothing."""

    name = "pair"

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self._config = config

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        return self.select_idle(arms)

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        if not arms:
            return Decision(None, "pair")
        config = self._config
        prefill = at_or_below(arms, config.prefill_sm_clock_mhz)
        decode = at_or_below(arms, config.decode_sm_clock_mhz)
        return Decision.of(Plan(prefill, decode, self._idle(arms)), "pair")

    def _idle(self, arms: Sequence[int]) -> Arm:
        idle = self._config.idle_sm_clock_mhz
        if idle == "default":
            return None
        return min(arms) if idle == "lowest" else at_or_below(arms, idle)

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        return {
            "phase": "static",
            "prefill_sm_clock_mhz": self._config.prefill_sm_clock_mhz,
            "decode_sm_clock_mhz": self._config.decode_sm_clock_mhz,
            "idle_sm_clock_mhz": self._config.idle_sm_clock_mhz,
        }
