"""What policies that learn nothing have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agft_ray.config import StrictModel
from agft_ray.policy.base import Policy
from agft_ray.policy.statistics import is_evidence
from agft_ray.types import Outcome

SNAPSHOT_SCHEMA = 1


class StaticPolicy(Policy):
    """Takes outcomes and priors, and stays as it is."""

    def __init__(self, settings: StrictModel) -> None:
        self._settings = settings.model_dump()

    def update(self, outcome: Outcome) -> None:
        """Learn from a window; see `Policy.update`."""
        is_evidence(outcome)

    def snapshot(self) -> dict[str, Any]:
        """The whole state; see `Policy.snapshot`."""
        return {"schema": SNAPSHOT_SCHEMA, "settings": self._settings}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; see `Policy.restore`."""
        if dict(snapshot) != self.snapshot():
            raise ValueError(f"snapshot {dict(snapshot)} is not one of {self.snapshot()}")
