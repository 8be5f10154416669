"""The policy `rules`: thresholds on the queue and the KV cache, as operators write them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agft_ray.config import Count, NonNegative, Share, StrictModel
from agft_ray.policy.arms import at_or_below, midpoint
from agft_ray.policy.solo import SoloPolicy, SoloState
from agft_ray.types import Context, Decision, Outcome, Window


class RulesConfig(StrictModel):
    """Settings of the policy `rules`. Between the calm and the high thresholds it holds still."""

    name: Literal["rules"] = "rules"
    """The policy."""
    high_waiting: NonNegative = 1.0
    """Mean number of waiting requests above which the clock goes to the highest."""
    calm_waiting: NonNegative = 0.25
    """Up to so many, a window counts as calm."""
    high_kv_cache_usage: Share = 0.8
    """Share of KV blocks in use above which the clock goes to the highest."""
    calm_kv_cache_usage: Share = 0.6
    """Up to this share, a window counts as calm."""
    dwell_windows: Count = 3
    """Calm windows in a row before each step down."""
    step_mhz: Annotated[int, Field(ge=15)] = 90
    """Size of a step down."""
    lowest_mhz: Count | None = None
    """Lowest clock under load; None: halfway between the GPU's lowest and highest, since no queue
    tells how slow each token has become."""

    @model_validator(mode="after")
    def _calm_below_high(self) -> RulesConfig:
        for name in ("waiting", "kv_cache_usage"):
            calm, high = getattr(self, f"calm_{name}"), getattr(self, f"high_{name}")
            if calm > high:
                raise ValueError(
                    f"calm_{name} ({calm:g}) must not exceed high_{name} ({high:g}); swap them"
                )
        return self


class RulesState(SoloState):
    """What the policy remembers."""

    target_mhz: int | None = None
    """The clock stepped down to; None: the highest."""
    calm_windows: int = 0
    """Calm windows in a row since the last step."""


class RulesPolicy(SoloPolicy[RulesState]):
    """To the highest clock at once under pressure, down one step after every few calm windows."""

    name = "rules"

    def __init__(self, config: RulesConfig) -> None:
        super().__init__(config, RulesState())
        self._config = config

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        if not arms:
            return Decision(None, "no arms")
        target = self.state.target_mhz
        if target is None:
            return Decision(max(arms), "highest")
        lowest = self._config.lowest_mhz or midpoint(arms)
        return Decision(at_or_below(arms, max(target, lowest)), "calm")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(min(arms, default=None), "idle")

    def _learn(self, outcome: Outcome) -> None:
        state, window = self.state, outcome.window
        state.calm_windows = state.calm_windows + 1 if self._is_calm(window) else 0
        if self._is_pressed(window):
            state.target_mhz = None
        elif state.calm_windows >= self._config.dwell_windows and outcome.requested is not None:
            # From what was set, not from the target: it cannot run away below the lowest clock.
            state.target_mhz = outcome.requested - self._config.step_mhz
            state.calm_windows = 0

    def _is_pressed(self, window: Window) -> bool:
        config = self._config
        return (
            window.waiting > config.high_waiting
            or window.kv_cache_usage > config.high_kv_cache_usage
        )

    def _is_calm(self, window: Window) -> bool:
        config = self._config
        return (
            window.waiting <= config.calm_waiting
            and window.kv_cache_usage <= config.calm_kv_cache_usage
        )

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        phase = "highest" if self.state.target_mhz is None else "calm"
        return {"phase": phase, "target_mhz": self.state.target_mhz}
