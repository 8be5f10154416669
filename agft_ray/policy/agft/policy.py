"""The policy `agft`: AGFT's online clock tuner (arXiv 2508.01744), written anew.

Baseline at default clocks, a sweep of a coarse grid from the highest clock down, LinUCB on it,
LinUCB on a refined grid around the best clock, greedy choice once converged, and all of it again
when the rewards drift away from their predictions. Every comparison of clocks is load-matched: by
predictions in one context, never by rewards of different loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agft_ray.policy.agft.config import AgftConfig, AgftState
from agft_ray.policy.agft.learner import AgftLearner
from agft_ray.policy.agft.linucb import Prediction
from agft_ray.policy.arms import grid, refined
from agft_ray.policy.experience import Experience, Prior
from agft_ray.policy.reward import work_of
from agft_ray.policy.statistics import Source, features_of, is_evidence
from agft_ray.types import DEFAULT_CLOCKS_KEY, Arm, Context, Decision, Outcome

__all__ = ["AgftConfig", "AgftPolicy"]

SNAPSHOT_SCHEMA = 2


class AgftPolicy:
    """Learns which SM clock gives the best reward at the present load. See `AgftConfig`."""

    name = "agft"

    def __init__(self, config: AgftConfig | None = None) -> None:
        self._config = config or AgftConfig()
        self._learner = AgftLearner(self._config)

    # -- choice --------------------------------------------------------------------------------

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`. Raises `ValueError` on a context that is not finite."""
        x = features_of(context)
        if not arms:
            return Decision(None, "no arms")
        if self._needs_baseline():
            return Decision(None, "baseline")
        unswept = self._unswept(arms)
        if unswept is not None:
            return Decision(unswept, "sweep")
        keys, learner = self._active(arms), self._learner
        if learner.state.converged:
            # An arm without evidence borrows from one that is in play as well: it cannot be best.
            keys = [key for key in keys if learner.bandit.count(key)] or keys
            means = learner.bandit.predict(x, keys).means
            return Decision(_arm(keys[int(np.argmax(means))]), "exploit")
        prediction = learner.bandit.predict(x, keys)
        greedy = np.where(self._eliminated(keys, prediction), -np.inf, prediction.means)
        best = int(np.argmax(greedy))
        chosen = int(np.argmax(greedy + learner.alpha() * prediction.widths))
        return Decision(_arm(keys[chosen]), "learn" if chosen == best else "explore")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(min(arms, default=None), "idle")

    def _needs_baseline(self) -> bool:
        known = self._learner.bandit.count(DEFAULT_CLOCKS_KEY, Source.PRIOR)
        return self._learner.state.baseline_left > known

    def _unswept(self, arms: Sequence[int]) -> int | None:
        """The highest clock of the coarse grid that is still to be measured."""
        learner, state = self._learner, self._learner.state
        if state.anchor_mhz is not None:
            return None
        for arm in reversed(learner.allowed(grid(arms, self._config.grid_step_mhz))):
            new = state.visits.get(arm, 0) < (2 if arm in state.suspects else 1)
            if new and not learner.knows(arm):
                return arm
        return None

    def _active(self, arms: Sequence[int]) -> list[int]:
        """Keys of the arms to choose among, descending, default clocks last: at least two."""
        state, config = self._learner.state, self._config
        clocks: list[int] = []
        if state.anchor_mhz is not None:
            clocks = refined(arms, state.anchor_mhz, config.refine_span_mhz)
        clocks = clocks or grid(arms, config.grid_step_mhz)
        substitutes = set(state.dropped.values()).intersection(arms)
        allowed = self._learner.allowed(substitutes.union(clocks))
        return [*sorted(allowed or clocks[-1:], reverse=True), DEFAULT_CLOCKS_KEY]

    def _eliminated(self, keys: Sequence[int], prediction: Prediction) -> np.ndarray:
        """Which arms are worse than the best, at this load, by several standard errors (K,).

        A clock below the best that is takes all clocks below it along: further down, delay grows
        faster than power falls. Nothing is remembered, so arms return with the load. The best
        clock and default clocks always stay.
        """
        means, widths = prediction.means, prediction.widths
        best = int(np.argmax(means))
        errors = self._learner.noise() * np.hypot(widths, widths[best])
        counts = self._learner.bandit.counts(keys)
        worse = means[best] - means > self._config.sigmas * errors
        eliminated: np.ndarray = worse & (counts >= self._config.elimination_windows)
        eliminated[best:] = np.maximum.accumulate(eliminated[best:])
        eliminated[int(np.argmax(means[:-1]))] = False
        eliminated[-1] = False
        return eliminated

    # -- learning, sharing, keeping ------------------------------------------------------------

    def update(self, outcome: Outcome) -> None:
        """Learn from a window; see `Policy.update`. Prompts are work as well as tokens are."""
        if is_evidence(outcome) or work_of(outcome.window):
            self._learner.learn(outcome)

    def experience(self) -> Experience | None:
        """See `Policy.experience`."""
        return self._learner.bandit.experience()

    def merge(self, prior: Prior) -> None:
        """See `Policy.merge`. Raises `PriorError`, changing nothing, if it is malformed."""
        self._learner.merge(prior.experience)

    def snapshot(self) -> dict[str, Any]:
        """The whole state; see `Policy.snapshot`."""
        return {
            "schema": SNAPSHOT_SCHEMA,
            "settings": self._config.model_dump(mode="json"),
            "state": self._learner.state.model_dump(mode="json"),
            "bandit": self._learner.bandit.snapshot(),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; see `Policy.restore`."""
        expected = {
            "schema": SNAPSHOT_SCHEMA,
            "settings": self._config.model_dump(mode="json"),
        }
        for name, value in expected.items():
            if snapshot.get(name) != value:
                raise ValueError(
                    f"snapshot: {name} is {snapshot.get(name)}, this policy has {value}; start anew"
                )
        state = AgftState.model_validate(snapshot.get("state"))
        self._learner.bandit.restore(snapshot.get("bandit") or {})
        self._learner.state = state

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        state = self._learner.state
        return {
            "phase": self._phase(),
            "best_arm_mhz": _arm(self._learner.best_key()),
            "windows": state.windows,
            "anchor_mhz": state.anchor_mhz,
            "floor_mhz": max(state.floor_mhz, state.prior_floor_mhz) or None,
            "relearnings": state.relearnings,
            "reward_noise": round(self._learner.noise(), 4),
        }

    def _phase(self) -> str:
        if self._needs_baseline():
            return "baseline"
        if self._learner.state.anchor_mhz is None:
            return "sweep"
        return "exploit" if self._learner.state.converged else "learn"


def _arm(key: int) -> Arm:
    return None if key == DEFAULT_CLOCKS_KEY else key
