"""The load of late: exponentially averaged totals of windows, and what is derived from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agft_ray.policy.phases.step_time import StepTimes
from agft_ray.policy.phases.work import FEATURES, decode_work, prefill_work
from agft_ray.types import Window

_NAMES = (
    "duration_s", "idle_s", "prefill_s", "prefill_s2", "prefill_steps", "decode_s",
    "decode_steps", "decode_tokens", "decode_sequence_s", "decode_batch2", "itl_s", "tokens",
    "ttft_s", "first_tokens", "e2e_s", "finished",
)  # fmt: skip
SIZE = len(_NAMES) + 2 * FEATURES


@dataclass(frozen=True, slots=True)
class Load:
    """Averages of late, in s and per s, under the plans that were in force."""

    idle: float
    """Share of the time in which the engine was empty."""
    prefill: float
    """Share of the time in steps with prefill."""
    decode: float
    prefill_step_s: float
    """Mean, as it would be at default clocks."""
    prompt_s: float
    """Mean time of the steps that compute a prompt, at default clocks: a long one takes several,
    several short ones share one."""
    prefill_slowdown: float
    """Mean slowdown of steps with prefill."""
    prefill_spread: float
    """E[t²] / E[t]² of them."""
    decode_step_s: float
    """Mean, as it would be at default clocks."""
    decode_slowdown: float
    interference: float
    """Share of inter-token time that sequences spend in steps with prefill."""
    others: float
    """Sequences that a decoding sequence finds beside it."""
    growth: float
    """Relative growth of a decode step when these become relatively more."""
    ttft_s: float
    tpot_s: float
    e2e_s: float
    requests_per_s: float

    @property
    def utilization(self) -> float:
        """How near the engine is to where delays grow without end."""
        return self.prefill + self.growth


def totals_of(window: Window) -> np.ndarray:
    """What of a window is averaged (SIZE,)."""
    prefill, decode = window.prefill_steps, window.decode_steps
    batch = decode.tokens / decode.steps if decode.steps else 0.0
    each_s = prefill.time_s / prefill.steps if prefill.steps else 0.0
    busy_s = prefill.time_s + decode.time_s
    numbers = (
        window.duration_s, max(0.0, window.duration_s - busy_s), prefill.time_s,
        prefill.steps * each_s**2, prefill.steps, decode.time_s, decode.steps, decode.tokens,
        decode.time_s * batch, decode.tokens * batch, window.itl_sum_s, window.itl_count,
        window.ttft_sum_s, window.ttft_count, window.e2e_sum_s, window.e2e_count,
    )  # fmt: skip
    return np.concatenate([np.array(numbers), prefill_work(window), decode_work(window)])


def averaged(
    before: np.ndarray, totals: np.ndarray, duration_s: float, memory_s: float
) -> np.ndarray:
    """The running sums after one more window."""
    return np.asarray(before * math.exp(-duration_s / memory_s) + totals)


def works_of(sums: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Work of the steps with prefill and of the others of late (FEATURES,), summed."""
    works = np.asarray(sums[len(_NAMES) :])
    return works[:FEATURES], works[FEATURES:]


def load_of(sums: Sequence[float] | np.ndarray, prefill: StepTimes, decode: StepTimes) -> Load:
    """The load that running sums and models tell of."""
    s = dict(zip(_NAMES, sums, strict=False))
    prefill_work_, decode_work_ = works_of(sums)
    base_p, base_d = prefill.base_s(prefill_work_), decode.base_s(decode_work_)
    batch = _ratio(s["decode_batch2"], s["decode_tokens"], 1.0)
    step_d = _ratio(base_d, s["decode_steps"])
    others = max(0.0, batch - 1.0)
    per_sequence_s = _ratio(
        decode.costs[1] * decode_work_[1] + decode.costs[2] * decode_work_[2], s["decode_tokens"]
    )
    growth = max(0.0, min(0.9, _ratio(per_sequence_s * others, step_d)))
    duration_s = max(s["duration_s"], 1e-9)
    interference = 1.0 - _ratio(s["decode_sequence_s"], s["itl_s"], 1.0)
    return Load(
        idle=s["idle_s"] / duration_s,
        prefill=s["prefill_s"] / duration_s,
        decode=s["decode_s"] / duration_s,
        prefill_step_s=_ratio(base_p, s["prefill_steps"]),
        prompt_s=max(_ratio(base_p, s["prefill_steps"]), _ratio(base_p, s["first_tokens"])),
        prefill_slowdown=max(1.0, _ratio(s["prefill_s"], base_p, 1.0)),
        prefill_spread=max(1.0, _ratio(s["prefill_s2"] * s["prefill_steps"], s["prefill_s"] ** 2)),
        decode_step_s=step_d,
        decode_slowdown=max(1.0, _ratio(s["decode_s"], base_d, 1.0)),
        interference=max(0.0, min(0.9, interference)),
        others=others,
        growth=growth,
        ttft_s=_ratio(s["ttft_s"], s["first_tokens"]),
        tpot_s=_ratio(s["itl_s"], s["tokens"]),
        e2e_s=_ratio(s["e2e_s"], s["finished"]),
        requests_per_s=s["first_tokens"] / duration_s,
    )


def _ratio(a: float, b: float, otherwise: float = 0.0) -> float:
    return float(a / b) if b > 0 else otherwise
