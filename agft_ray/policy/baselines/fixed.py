"""One clock always: static settings to compare with, and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from agft_ray.config import Count, StrictModel
from agft_ray.policy.arms import at_or_below
from agft_ray.policy.static import StaticPolicy
from agft_ray.types import Actuator, Context, Decision


class FixedConfig(StrictModel):
    """Settings of the policy `fixed`."""

    name: Literal["fixed"] = "fixed"
    """The policy."""
    sm_clock_mhz: Count | None = None
    """The SM clock; between two supported clocks, the one below is set."""
    power_limit_w: Count | None = None
    """The power limit, where that is the actuator."""

    @model_validator(mode="after")
    def _one_of_them(self) -> FixedConfig:
        if (self.sm_clock_mhz is None) == (self.power_limit_w is None):
            raise ValueError(
                "policy fixed needs sm_clock_mhz, or power_limit_w where that is the actuator: "
                "give one of them"
            )
        return self

    @property
    def actuator(self) -> Actuator:
        """What it sets."""
        return Actuator.POWER_LIMIT if self.sm_clock_mhz is None else Actuator.SM_CLOCK

    @property
    def arm(self) -> int:
        """The clock or the limit."""
        return self.sm_clock_mhz or self.power_limit_w or 0


class FixedPolicy(StaticPolicy):
    """Sets one clock (or power limit), busy or idle, and learns nothing."""

    name = "fixed"

    def __init__(self, config: FixedConfig) -> None:
        super().__init__(config)
        self._arm = config.arm

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        return Decision(at_or_below(arms, self._arm) if arms else None, "fixed")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(at_or_below(arms, self._arm) if arms else None, "fixed")

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        return {"phase": "static", "best_arm_mhz": self._arm}
