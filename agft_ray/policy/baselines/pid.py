"""The policy `pid`: feedback control of the clock on the latency SLO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from agft_ray.config import NonNegative, Positive, StrictModel
from agft_ray.policy.arms import nearest
from agft_ray.policy.solo import SoloPolicy, SoloState
from agft_ray.types import Context, Decision, Outcome, Window

SNAP_SHARE = 0.04
"""A clock may differ from its target by so much because it was snapped to a supported one."""


class PidConfig(StrictModel):
    """Settings of the policy `pid`.

    Gains are of logarithms: the clock's, per logarithm of latency over its set point. Where
    latency goes as f^-n, the loop's characteristic equation (without kd) is
    `z^2 - (1 - n (kp + ki)) z - n kp = 0`: with the defaults the error decays for 0 < n < 5.
    n is at most 1 until requests queue.
    """

    name: Literal["pid"] = "pid"
    """The policy."""
    tpot_slo_s: Positive
    """Mean TPOT a window should not exceed."""
    ttft_slo_s: Positive | None = None
    """Mean TTFT a window should not exceed; None: not controlled."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The set point is so much below the SLO, as a share of it."""
    kp: NonNegative = 0.1
    """Proportional gain."""
    ki: Positive = 0.2
    """Integral gain per window."""
    kd: NonNegative = 0.0
    """Derivative gain, in windows; it amplifies the noise of a window's mean."""
    max_change: Positive = 0.2
    """Largest change of the clock in one window, as a logarithm."""


class PidState(SoloState):
    """What the policy remembers."""

    target_mhz: float | None = None
    """The controller's output; None: the highest clock."""
    errors: list[float] = Field(default_factory=list)
    """The last two errors, newest first."""


class PidPolicy(SoloPolicy[PidState]):
    """PID in velocity form: each window moves the clock by what the error and its changes say.

    `d ln f = kp (e0 - e1) + ki e0 + kd (e0 - 2 e1 + e2)` with `e = ln(latency / set point)` of
    TPOT, or of TTFT where that is worse. The output starts from the clock that was really there
    (back-calculation), so neither the end of the range nor a power cap winds it up. Windows at
    default clocks, which are not its choice, start it anew at the highest clock.
    """

    name = "pid"

    def __init__(self, config: PidConfig) -> None:
        super().__init__(config, PidState())
        self._config = config

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        if not arms:
            return Decision(None, "no arms")
        if self.state.target_mhz is None:
            return Decision(max(arms), "start")
        return Decision(nearest(sorted(arms), self.state.target_mhz), "control")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(min(arms, default=None), "idle")

    def _learn(self, outcome: Outcome) -> None:
        actual = outcome.arm
        if outcome.requested is None or actual is None:
            self.state = PidState()
            return
        error = self._error(outcome.window)
        e1, e2 = [*self.state.errors, error, error][:2]
        config = self._config
        change = config.kp * (error - e1) + config.ki * error + config.kd * (error - 2 * e1 + e2)
        change = max(-config.max_change, min(config.max_change, change))
        target = self.state.target_mhz or actual
        base = max(actual * (1 - SNAP_SHARE), min(actual * (1 + SNAP_SHARE), target))
        self.state.target_mhz = base * math.exp(change)
        self.state.errors = [error, e1]

    def _error(self, window: Window) -> float:
        """Logarithm of the worse of the latencies over its set point."""
        config = self._config
        pairs = ((window.tpot_s, config.tpot_slo_s), (window.ttft_s, config.ttft_slo_s))
        excesses = [latency / slo for latency, slo in pairs if latency and slo]
        return math.log(max(excesses, default=1.0) / (1 - config.margin))

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        state = self.state
        return {
            "phase": "start" if state.target_mhz is None else "control",
            "target_mhz": None if state.target_mhz is None else round(state.target_mhz),
            "error": state.errors[0] if state.errors else None,
        }
