"""One clock always: static settings to compare with, and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agft_ray.config import Count, StrictModel
from agft_ray.policy.arms import at_or_below
from agft_ray.policy.static import StaticPolicy
from agft_ray.types import Context, Decision


class FixedConfig(StrictModel):
    """Settings of the policy `fixed`."""

    name: Literal["fixed"] = "fixed"
    """The policy."""
    sm_clock_mhz: Count
    """The SM clock; between two supported clocks, the one below is set."""


class FixedPolicy(StaticPolicy):
    """Sets one clock, busy or idle, and learns nothing."""

    name = "fixed"

    def __init__(self, config: FixedConfig) -> None:
        super().__init__(config)
        self._sm_clock_mhz = config.sm_clock_mhz

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        return Decision(at_or_below(arms, self._sm_clock_mhz) if arms else None, "fixed")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        return Decision(at_or_below(arms, self._sm_clock_mhz) if arms else None, "fixed")

    def status(self) -> dict[str, Any]:
        return {"phase": "static", "best_arm_mhz": self._sm_clock_mhz}
