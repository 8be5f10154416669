"""Default clocks always: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agft_ray.config import StrictModel
from agft_ray.policy.static import StaticPolicy
from agft_ray.types import Context, Decision


class DefaultConfig(StrictModel):
    """Settings of the policy `default`."""

    name: Literal["default"] = "default"
    """The policy."""


class DefaultPolicy(StaticPolicy):
    """Leaves the clock to the driver's governor and learns nothing."""

    name = "default"

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        return Decision(None, "default")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(None, "default")

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        return {"phase": "static"}
