"""The policy `predictive`: the lowest clock whose predicted TPOT meets the SLO (throttLL'eM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from agft_ray.config import Count, NonNegative, Positive, StrictModel
from agft_ray.policy.ridge import Ridge, RidgeState
from agft_ray.policy.solo import SoloPolicy, SoloState
from agft_ray.types import Context, Decision, Outcome, Window

UNIT_SEQUENCES = 64.0
UNIT_TOKENS_PER_STEP = 512.0
UNIT_MHZ = 1000.0
MEMORY_PENALTY = 1.0
"""Of the clock-independent weights: they stay near 0 until several clocks have been measured."""
COMPUTE_PENALTY = 0.01
"""Of the weights of 1/f: a TPOT seen at one clock only is taken to be inversely proportional."""


class PredictiveConfig(StrictModel):
    """Settings of the policy `predictive`."""

    name: Literal["predictive"] = "predictive"
    """The policy."""
    tpot_slo_s: Positive
    """Mean TPOT a window should not exceed."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Predicted TPOT must stay so much below the SLO, as a share of it."""
    learn_windows: Count = 10
    """Windows at the highest clock before the first step down."""
    max_step: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A clock may lie so much below the lowest one measured, as a share of it: further down the
    prediction is extrapolation."""
    high_waiting: NonNegative = 1.0
    """Mean number of waiting requests above which the clock goes to the highest."""
    max_error: Positive = 0.25
    """Mean relative prediction error beyond which the clock goes to the highest."""
    error_memory: Annotated[float, Field(ge=1)] = 5.0
    """Windows over which that error is averaged."""
    forgetting: Annotated[float, Field(gt=0.9, le=1)] = 0.99
    """Discount of the regression per window: half is forgotten in 69."""
    level_gain: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of a new window in the load's level (Holt's method)."""
    trend_gain: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Weight of a new change in the load's trend per window."""


Pair = tuple[float, float]
"""Sequences in the batch and prompt tokens per step, in their units."""


class PredictiveState(SoloState):
    """What the policy remembers besides the regression, which snapshots hold in `model`."""

    model: RidgeState = RidgeState()
    level: Pair = (0.0, 0.0)
    """Smoothed sequences in the batch and prompt tokens per step, in their units."""
    trend: Pair = (0.0, 0.0)
    """Their change per window."""
    error: float = 0.0
    """Mean relative error of the predictions."""
    lowest_mhz: int | None = None
    """The lowest clock measured since the model was last trusted."""
    windows: int = 0
    """Windows learned since then."""
    pressed: bool = False
    """Requests were queueing in the last window."""


class PredictivePolicy(SoloPolicy[PredictiveState]):
    """Forecasts the load, predicts TPOT at every clock, takes the lowest that meets the SLO.

    throttLL'eM's (arXiv 2408.05235) are the chain of load projection, performance model and
    lowest sufficient clock, and going back to the highest when predictions fail. Substitutes: it
    projects batch and KV cache from predicted output lengths and asks gradient-boosted trees
    trained offline; here Holt's exponential smoothing projects batch and prompt tokens per step
    one window ahead, and a ridge regression of TPOT on `(1, batch, tokens) x (1, 1/f)`, learned
    from the windows themselves, predicts. Its autoscaling of instances is left out.

    Until several clocks have been measured the regression takes TPOT to go as 1/f (pessimistic),
    and it walks down only `max_step` at a time. When it errs it returns to the highest clock for
    `learn_windows` and walks down anew.
    """

    name = "predictive"

    def __init__(self, config: PredictiveConfig) -> None:
        super().__init__(config, PredictiveState())
        self._config = config
        self._ridge = Ridge(
            penalties=[MEMORY_PENALTY] * 3 + [COMPUTE_PENALTY] * 3,
            guess=[0.0] * 6,
            forgetting=config.forgetting,
        )

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        if not arms:
            return Decision(None, "no arms")
        state = self.state
        if state.pressed:
            return Decision(max(arms), "queue")
        if state.windows < self._config.learn_windows or state.lowest_mhz is None:
            return Decision(max(arms), "learn")
        reach_mhz = state.lowest_mhz * (1 - self._config.max_step)
        for arm in sorted(arms):
            if arm >= reach_mhz and self._predict(arm) <= 1 - self._config.margin:
                return Decision(arm, "predicted")
        return Decision(max(arms), "beyond slo")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(min(arms, default=None), "idle")

    def _predict(self, sm_clock_mhz: int) -> float:
        """TPOT over the SLO in the next window, at this clock and the forecast load."""
        (batch, tokens), (more, more_tokens) = self.state.level, self.state.trend
        load = max(0.0, batch + more), max(0.0, tokens + more_tokens)
        return float(_features(load, sm_clock_mhz) @ self._ridge.theta)

    def _learn(self, outcome: Outcome) -> None:
        window, state, config = outcome.window, self.state, self._config
        tpot_s, clock = window.tpot_s, outcome.arm
        state.pressed = window.waiting > config.high_waiting
        load = _load(window)
        if tpot_s and clock is not None:
            relative = tpot_s / config.tpot_slo_s
            if state.windows >= config.learn_windows:
                miss = abs(relative / max(self._predict(clock), 1e-6) - 1)
                state.error += (min(miss, 1.0) - state.error) / config.error_memory
            self._ridge.learn(_features(load, clock), relative)
            state.windows += 1
            state.lowest_mhz = min(clock, state.lowest_mhz or clock)
        self._follow(load)
        if state.error > config.max_error:
            state.windows, state.lowest_mhz, state.error = 0, None, 0.0

    def _follow(self, load: Pair) -> None:
        """Holt's linear method: level and trend of the load."""
        state, config = self.state, self._config
        if state.level == (0.0, 0.0):
            state.level = load
            return
        before, trend = np.array(state.level), np.array(state.trend)
        level = before + trend
        level += config.level_gain * (np.array(load) - level)
        trend += config.trend_gain * (level - before - trend)
        state.level = float(level[0]), float(level[1])
        state.trend = float(trend[0]), float(trend[1])

    def snapshot(self) -> dict[str, Any]:
        """The whole state; see `Policy.snapshot`."""
        self.state.model = self._ridge.state()
        return super().snapshot()

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; see `Policy.restore`."""
        before = self.state
        super().restore(snapshot)
        try:
            self._ridge.restore(self.state.model)
        except ValueError:
            self.state = before
            raise

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        state = self.state
        return {
            "phase": "learn" if state.windows < self._config.learn_windows else "predict",
            "prediction_error": round(state.error, 4),
            "lowest_mhz": state.lowest_mhz,
        }


def _load(window: Window) -> Pair:
    steps = max(1, window.iterations)
    return window.running / UNIT_SEQUENCES, window.prompt_tokens / steps / UNIT_TOKENS_PER_STEP


def _features(load: Pair, sm_clock_mhz: int) -> np.ndarray:
    base = np.array([1.0, *load])
    return np.concatenate([base, base * (UNIT_MHZ / sm_clock_mhz)])
