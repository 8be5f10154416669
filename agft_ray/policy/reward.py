"""The reward: minus the logarithm of a window's energy-delay product, against stated units."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agft_ray.policy.base import Policy
from agft_ray.policy.goals import DELAY_EXPONENTS, Goals, Objective
from agft_ray.types import Window

REWARD_SCHEMA = 1
REFERENCE_POWER_W = 100.0
REFERENCE_DELAY_S = 0.05
MAX_REWARD = 4.0
REFERENCE_PROMPT_TOKENS = 512
"""The prompt whose TTFT is the delay of an engine that only prefills."""
SLO_PENALTY = 2.0
"""How much more a per cent beyond an SLO costs than a per cent of delay under EDP."""

OBJECTIVE: Objective = "edp"
"""What windows are judged by where no objective is asked for."""


@dataclass(frozen=True, slots=True)
class Reward:
    """`r = -(ln(P / 100 W) + m ln(D / 50 ms)) - penalty`, clipped to [-4, 4].

    P is the window's mean power and D its mean TPOT, or for an engine that only prefills its TTFT
    per 512 prompt tokens, so for m = 1 this is minus the logarithm of
    AGFT's window EDP (energy times TPOT; arXiv 2508.01744) up to a constant: a difference of two
    rewards is the logarithm of the ratio of their EDPs. The references are constants, not
    measurements, so rewards of different replicas can be added. Beyond an SLO the excess is
    charged once more, as `2 ln(latency / SLO)`, for TTFT and TPOT each.

    Attributes:
        delay_exponent: m; 0 energy, 1 energy-delay product, 2 energy-delay-squared.
        slo_ttft_s: mean TTFT a window should not exceed, or None.
        slo_tpot_s: mean TPOT a window should not exceed, or None.
        role: 'prefill' for an engine that only prefills, otherwise 'mixed' or 'decode'.

    """

    delay_exponent: float = 1.0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    role: str = "mixed"

    @classmethod
    def of(cls, goals: Goals, role: str = "mixed") -> Reward:
        """What judges windows by these goals."""
        exponent = DELAY_EXPONENTS[goals.objective or OBJECTIVE]
        return cls(exponent, goals.ttft_s, goals.tpot_s, role)

    def learned_by(self, policy: Policy) -> str:
        """What must agree before this policy's experience may be added: what rewards mean, or
        nothing where it keeps goals by itself."""
        if policy.keeps_goals:
            return ""
        return f"m={self.delay_exponent:g} ttft<={self.slo_ttft_s} tpot<={self.slo_tpot_s}"

    def __call__(self, window: Window) -> float | None:
        """The window's reward; None if it has no energy or no token to tell the delay by."""
        delay_s = self._delay_s(window)
        if not delay_s or window.mean_power_w <= 0:
            return None
        value = -math.log(window.mean_power_w / REFERENCE_POWER_W)
        value -= self.delay_exponent * math.log(delay_s / REFERENCE_DELAY_S)
        value -= SLO_PENALTY * _log_excess(window.tpot_s, self.slo_tpot_s)
        value -= SLO_PENALTY * _log_excess(window.ttft_s, self.slo_ttft_s)
        return max(-MAX_REWARD, min(MAX_REWARD, value))

    def _delay_s(self, window: Window) -> float | None:
        if self.role != "prefill":
            return window.tpot_s
        if not window.prompt_tokens:
            return None
        # Per token, so that a window of long prompts does not look like one at a low clock.
        return window.ttft_sum_s / window.prompt_tokens * REFERENCE_PROMPT_TOKENS

    def violates_slo(self, window: Window) -> bool:
        """Whether the window's mean TTFT or mean TPOT exceeds its SLO."""
        return (
            _log_excess(window.tpot_s, self.slo_tpot_s) > 0
            or _log_excess(window.ttft_s, self.slo_ttft_s) > 0
        )


def _log_excess(latency_s: float | None, slo_s: float | None) -> float:
    if not latency_s or slo_s is None:
        return 0.0
    return max(0.0, math.log(latency_s / slo_s))
