"""The reward: minus the logarithm of a window's power times delay, against stated units."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agft_ray.types import Window

REWARD_SCHEMA = 2
REFERENCE_POWER_W = 100.0
REFERENCE_DELAY_S = 0.05
MAX_REWARD = 8.0
PROMPT_TOKENS = 128.0
"""Tokens of steps with prefill that count as one of a step that only decodes: about as many take as
long."""
SLO_PENALTY = 2.0
"""How much more a per cent beyond an SLO costs than a per cent of delay under EDP."""

DELAY_EXPONENTS = {"energy": 0.0, "edp": 1.0, "ed2p": 2.0}


@dataclass(frozen=True, slots=True)
class Reward:
    """`r = -(ln(P / 100 W) + m ln(D / 50 ms)) - penalty`, clipped to [-8, 8].

    P is the window's mean power. D is how long requests took for a token of output, or for 128 of a
    prompt: those present, running or waiting, times the time, by the work done. While all decode,
    D is TPOT, and so for m = 1 this is minus the logarithm of AGFT's window EDP (energy times TPOT;
    arXiv 2508.01744) up to a constant. Prompts need no second token to count, and those that wait
    count, so that a clock at which requests pile up is told from others. By Little's law D goes as
    E2E at a given load. A difference of two rewards is the logarithm of the ratio of their EDPs;
    the references are constants, so rewards of different replicas can be added. Beyond an SLO the
    excess is charged once more, as `2 ln(latency / SLO)`, for TTFT and TPOT each.

    Attributes:
        delay_exponent: m; 0 energy, 1 energy-delay product, 2 energy-delay-squared.
        slo_ttft_s: mean TTFT a window should not exceed, or None.
        slo_tpot_s: mean TPOT a window should not exceed, or None.
    """

    delay_exponent: float = 1.0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None

    def __call__(self, window: Window) -> float | None:
        """The window's reward; None if it has no energy, or nothing was done in it."""
        delay_s = _delay_s(window)
        if not delay_s or window.mean_power_w <= 0:
            return None
        value = -math.log(window.mean_power_w / REFERENCE_POWER_W)
        value -= self.delay_exponent * math.log(delay_s / REFERENCE_DELAY_S)
        value -= SLO_PENALTY * _log_excess(window.tpot_s, self.slo_tpot_s)
        value -= SLO_PENALTY * _log_excess(window.ttft_s, self.slo_ttft_s)
        return max(-MAX_REWARD, min(MAX_REWARD, value))

    def violates_slo(self, window: Window) -> bool:
        """Whether the window's mean TTFT or mean TPOT exceeds its SLO."""
        return (
            _log_excess(window.tpot_s, self.slo_tpot_s) > 0
            or _log_excess(window.ttft_s, self.slo_ttft_s) > 0
        )


def work_of(window: Window) -> float:
    """What was done in a window: tokens of steps that only decode, and those of others as fewer.

    Of an engine that does not tell its steps: tokens after first ones, and those of prompts.
    """
    decode, prefill = window.decode_steps, window.prefill_steps
    if decode.steps or prefill.steps:
        return decode.tokens + prefill.tokens / PROMPT_TOKENS
    return window.itl_count + window.prompt_tokens / PROMPT_TOKENS


def _delay_s(window: Window) -> float | None:
    steps, work = (window.prefill_steps, window.decode_steps, window.unknown_steps), work_of(window)
    # A step may be longer than the window that it ends in.
    time_s = max(window.duration_s, sum(each.time_s for each in steps))
    return (window.running + window.waiting) * time_s / work if work else None


def _log_excess(latency_s: float | None, slo_s: float | None) -> float:
    if not latency_s or slo_s is None:
        return 0.0
    return max(0.0, math.log(latency_s / slo_s))
