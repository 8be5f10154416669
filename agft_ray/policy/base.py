"""What every policy is: a pure choice, a way to learn, and statistics that can be shared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agft_ray.policy.experience import Experience, Prior
from agft_ray.types import Context, Decision, Outcome


class Policy(Protocol):
    """Chooses an SM clock for the next window.

    A policy sees windows only, as frozen values; it is deterministic from its settings and its
    seed. `arms` is always the ascending list of clocks the GPU supports within the configured
    bounds; which of them a policy considers is its own affair. Default clocks (None) are always
    allowed.

    A policy of your own derives from this class and gives `select` and `update`; all else has a
    default. docs/policies.md has an example, `agft_ray.testing.check_policy` its test.
    """

    @property
    def name(self) -> str:
        """Under which it is told of: by default the name of its class."""
        return type(self).__name__

    @abstractmethod
    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """The choice for this context. Pure: calling it twice changes nothing."""
        ...

    @abstractmethod
    def update(self, outcome: Outcome) -> None:
        """Learn from one window. A non-finite context or reward raises `ValueError` and leaves
        the policy as it was; an empty window (nothing was done in it) is ignored.
        """
        ...

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """The choice while the engine is empty: by default the lowest clock. Pure."""
        return Decision(min(arms, default=None), "idle")

    def experience(self) -> Experience | None:
        """All that was learned from this replica's own windows; None, the default, if the policy
        learns nothing that others could use. Cumulative, so that handing it over twice is harmless.
        """
        return None

    def merge(self, prior: Prior) -> None:
        """Take the experience of others as the prior, in place of the one before. By default it is
        passed over."""

    def snapshot(self) -> dict[str, Any]:
        """The whole state as JSON-able values; `restore` on a policy with the same settings
        continues identically. By default there is none: a restarted tuner begins anew.
        """
        return {}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; raises `ValueError` if it does not fit."""
        if snapshot:
            raise ValueError(f"snapshot: {self.name} keeps no state, got {sorted(snapshot)}")

    def status(self) -> dict[str, Any]:
        """For people: phase, current best arm and the like, as JSON-able values."""
        return {}
