"""The step governor `volta`: per step the lowest clock that meets the SLO, as VoltanaLLM."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from agft_ray.config import Count, NonNegative, Positive, StrictModel
from agft_ray.policy.arms import nearest
from agft_ray.policy.ridge import Ridge
from agft_ray.policy.step import StepSample, check_observation
from agft_ray.types import Arm

UNIT_TOKENS = {False: 64.0, True: 2048.0}
"""Tokens of a step without and with prefill that count as one."""
UNIT_CONTEXT_TOKENS = 32768.0
UNIT_MHZ = 1000.0
MEMORY_PENALTY = 1.0
"""Of the clock-independent weights: they stay near 0 until several clocks have been measured."""
COMPUTE_PENALTY = 0.01
"""Of the weights of 1/f: a step seen at one clock only is taken to be inversely proportional."""
ACTUATION_S = 0.025
"""A clock change acts so much later: a step in progress meanwhile ran at two clocks."""
LONG_STEP_S = 5 * ACTUATION_S
"""A step this long is evidence about its clock even if the change came at its beginning."""

Shares = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...],
    Field(min_length=1, max_length=16, strict=False),
]


class VoltaConfig(StrictModel):
    """Settings of the step governor `volta`."""

    name: Literal["volta"] = "volta"
    """The governor."""
    tpot_slo_s: Positive
    """Bound of a step that only decodes."""
    ttft_slo_s: Positive | None = None
    """Bound of the time to first token; None: steps with prefill run at the highest clock."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """A predicted step must stay so much below its bound, as a share of it."""
    clock_shares: Shares = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """The clocks to choose among, as shares of the highest."""
    min_dwell_s: NonNegative = 0.1
    """Time after a change before the clock may go down: four times the delay of a change."""
    learn_steps: Count = 20
    """Steps of a phase to be measured at a clock before the next lower one is tried in it."""
    forgetting: Annotated[float, Field(gt=0.9, le=1)] = 0.999
    """Discount of a phase's regression per step: half is forgotten in 693."""


class VoltaGovernor:
    """Predicts the step about to run at each of a few clocks, takes the lowest that is in time.

    VoltanaLLM's EcoFreq (arXiv 2509.04827) does so per iteration with a latency predictor a phase
    on engines that only prefill or only decode; its router is left out. Here one engine does both:
    a ridge regression for steps with prefill and one for the others, on
    `(1, tokens of the batch, tokens of context) x (1, 1/f)`, learned from the steps observed. A
    step that only decodes is in time within the TPOT bound; a step with prefill within the TTFT
    bound divided among the requests that wait behind it.

    It starts at the highest clock and, per phase, tries the next lower one of its list only after
    `learn_steps` steps at the present lowest. The clock rises at once but falls only
    `min_dwell_s` after a change, so it changes at most twice in that time.
    """

    name = "volta"

    def __init__(self, config: VoltaConfig) -> None:
        self._config = config
        self._phases = {has_prefill: _Phase(config.forgetting) for has_prefill in (False, True)}
        self._arms: tuple[int, ...] = ()
        self._levels: list[int] = []
        self._clock: Arm = None
        self._changed_s = -math.inf
        self.changes = 0
        """How often the choice changed while the engine worked."""

    def choose(self, step: StepSample, arms: Sequence[int]) -> Arm:
        """See `StepGovernor.choose`."""
        if tuple(arms) != self._arms:
            self._arms, self._levels = tuple(arms), self._listed(arms)
            self._clock = None
        if not self._levels:
            return None
        wanted = self._lowest_in_time(step)
        current = self._clock
        if current is not None and wanted < current and self._dwells(step.t_s):
            return current
        if wanted != current:
            self.changes += current is not None
            self._clock, self._changed_s = wanted, step.t_s
        return wanted

    def _listed(self, arms: Sequence[int]) -> list[int]:
        """The clocks to choose among, ascending."""
        if not arms:
            return []
        shares = {*self._config.clock_shares, 1.0}
        return sorted({nearest(sorted(arms), share * max(arms)) for share in shares})

    def _dwells(self, t_s: float) -> bool:
        return t_s - self._changed_s < self._config.min_dwell_s

    def _lowest_in_time(self, step: StepSample) -> int:
        """The lowest clock tried, or next to be tried, at which the step is in time."""
        phase, highest = self._phases[step.has_prefill], self._levels[-1]
        bound_s = self._bound_s(step)
        if bound_s is None:
            return highest
        for level in self._levels[self._lowest_allowed(phase) :]:
            if phase.predict_s(step, level) <= bound_s:
                return level
        return highest

    def _bound_s(self, step: StepSample) -> float | None:
        config = self._config
        if not step.has_prefill:
            return config.tpot_slo_s * (1 - config.margin)
        if config.ttft_slo_s is None:
            return None
        return config.ttft_slo_s * (1 - config.margin) / (1 + step.waiting)

    def _lowest_allowed(self, phase: _Phase) -> int:
        """Place in the list of one below the lowest clock that is known well enough."""
        steps, enough = phase.steps, self._config.learn_steps
        for place, level in enumerate(self._levels):
            if steps[level] >= enough:
                return max(0, place - 1)
        return max(0, len(self._levels) - 1)

    def choose_idle(self, arms: Sequence[int]) -> Arm:
        """The lowest clock; after it, the first step starts anew and is not held down."""
        self._clock, self._changed_s = None, -math.inf
        return min(arms, default=None)

    def observe(self, step: StepSample, *, duration_s: float, sm_clock_mhz: int) -> None:
        """Learn how long the step took; see `StepGovernor.observe`."""
        check_observation(duration_s, sm_clock_mhz)
        settled = step.t_s - self._changed_s >= ACTUATION_S
        if not self._levels or not (settled or duration_s >= LONG_STEP_S):
            return
        clock, levels = sm_clock_mhz, self._levels
        level = clock if clock in levels else nearest(levels, clock)
        self._phases[step.has_prefill].learn(step, duration_s, sm_clock_mhz, level)

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        decode, prefill = self._phases[False], self._phases[True]
        known = min(decode.samples, prefill.samples) >= self._config.learn_steps
        return {
            "phase": "predict" if known else "learn",
            "sm_clock_mhz": self._clock,
            "changes": self.changes,
            "decode_steps": decode.samples,
            "prefill_steps": prefill.samples,
        }


class _Phase:
    """The latency model of one phase, and how many steps at each clock it rests on."""

    def __init__(self, forgetting: float) -> None:
        self._ridge = Ridge(
            penalties=[MEMORY_PENALTY] * 3 + [COMPUTE_PENALTY] * 3,
            guess=[0.0] * 6,
            forgetting=forgetting,
        )
        self.steps: Counter[int] = Counter()
        self._step: StepSample | None = None
        self._clock_mhz = 0
        self._x = np.zeros(0)

    @property
    def samples(self) -> int:
        return self._ridge.samples

    def predict_s(self, step: StepSample, sm_clock_mhz: int) -> float:
        return float(self._features(step, sm_clock_mhz) @ self._ridge.theta)

    def learn(self, step: StepSample, duration_s: float, sm_clock_mhz: int, level: int) -> None:
        self._ridge.learn(self._features(step, sm_clock_mhz), duration_s)
        self.steps[level] += 1

    def _features(self, step: StepSample, sm_clock_mhz: int) -> np.ndarray:
        """Kept for one step at one clock: what ran is mostly what was predicted last."""
        if self._step is not step or self._clock_mhz != sm_clock_mhz:
            self._step, self._clock_mhz = step, sm_clock_mhz
            self._x = _features(step, sm_clock_mhz)
        return self._x


def _features(step: StepSample, sm_clock_mhz: int) -> np.ndarray:
    tokens = (step.prefill_tokens + step.decode_sequences) / UNIT_TOKENS[step.has_prefill]
    context = step.context_tokens / UNIT_CONTEXT_TOKENS
    scale = UNIT_MHZ / sm_clock_mhz
    return np.array((1.0, tokens, context, scale, tokens * scale, context * scale))
