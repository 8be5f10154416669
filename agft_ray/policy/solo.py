"""What policies that learn for themselves alone have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from agft_ray.config import StrictModel
from agft_ray.policy.base import Policy
from agft_ray.policy.statistics import is_evidence
from agft_ray.types import Outcome

SNAPSHOT_SCHEMA = 1


class SoloState(BaseModel):
    """Base of what such a policy remembers: JSON-able, without NaN or infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


StateT = TypeVar("StateT", bound=SoloState)


class SoloPolicy(Policy, Generic[StateT]):
    """Learns from its own windows, keeps its state in snapshots, and shares nothing.

    Subclasses choose from `self.state`, and change it in `_learn` only.
    """

    def __init__(self, settings: StrictModel, state: StateT) -> None:
        self._settings = settings.model_dump(mode="json")
        self.state = state

    def update(self, outcome: Outcome) -> None:
        """See `Policy.update`."""
        if is_evidence(outcome):
            self._learn(outcome)

    @abstractmethod
    def _learn(self, outcome: Outcome) -> None:
        """Learn from one window that emitted tokens."""

    def snapshot(self) -> dict[str, Any]:
        """The whole state; see `Policy.snapshot`."""
        return {
            "schema": SNAPSHOT_SCHEMA,
            "settings": self._settings,
            "state": self.state.model_dump(mode="json"),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; see `Policy.restore`."""
        for name, value in (("schema", SNAPSHOT_SCHEMA), ("settings", self._settings)):
            if snapshot.get(name) != value:
                raise ValueError(
                    f"snapshot: {name} is {snapshot.get(name)}, this policy has {value}; start anew"
                )
        self.state = type(self.state).model_validate(snapshot.get("state"))
