"""Default clocks always: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agft_ray.config import StrictModel
from agft_ray.policy.statistics import is_evidence
from agft_ray.types import Context, Decision, Experience, Outcome, Prior

SNAPSHOT_SCHEMA = 1


class DefaultConfig(StrictModel):
    """Settings of the policy `default`."""

    name: Literal["default"] = "default"
    """The policy."""


class DefaultPolicy:
    """Leaves the clock to the driver's governor and learns nothing."""

    name = "default"

    def __init__(self, config: DefaultConfig) -> None:
        self._settings = config.model_dump()

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        return Decision(None, "default")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        return Decision(None, "default")

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
        return {"phase": "static"}
