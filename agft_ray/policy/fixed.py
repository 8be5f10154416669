"""One clock always: static settings to compare with, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agft_ray.config import Count, StrictModel
from agft_ray.policy.arms import at_or_below
from agft_ray.policy.statistics import is_evidence
from agft_ray.types import Context, Decision, Experience, Outcome, Prior

SNAPSHOT_SCHEMA = 1


class FixedConfig(StrictModel):
    """Settings of the policy `fixed`."""

    name: Literal["fixed"] = "fixed"
    """The policy."""
    sm_clock_mhz: Count
    """The SM clock; between two supported clocks, the one below is set."""


class FixedPolicy:
    """Sets one clock, busy or idle, and learns nothing."""

    name = "fixed"

    def __init__(self, config: FixedConfig) -> None:
        self._settings = config.model_dump()
        self._sm_clock_mhz = config.sm_clock_mhz

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        return Decision(at_or_below(arms, self._sm_clock_mhz) if arms else None, "fixed")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        return Decision(at_or_below(arms, self._sm_clock_mhz) if arms else None, "fixed")

    def update(self, outcome: Outcome) -> None:
        is_evidence(outcome)

    def experience(self) -> Experience | None:
        return None

    def merge(self, prior: Prior) -> None:
        """Nothing is learned, so there is nothing to take."""

    def snapshot(self) -> dict[str, Any]:
        return {"schema": SNAPSHOT_SCHEMA, "settings": self._settings}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        if dict(snapshot) != self.snapshot():
            raise ValueError(f"snapshot {dict(snapshot)} is not one of {self.snapshot()}")

    def status(self) -> dict[str, Any]:
        return {"phase": "static", "best_arm_mhz": self._sm_clock_mhz}
