"""Power and step time of a GPU by SM clock: pure functions with closed forms.

The forms and their coefficients were fitted to public measurements, which each profile names.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from agft_ray.simulation.profiles import ActivityDecode, GpuProfile, ModelProfile, PowerProfile


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one engine step computes: prefill chunks, and one token for each decoding sequence."""

    prefill_tokens: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0
    """Tokens in the KV caches of the decoding sequences, summed."""
    prefill_attention_s: float = 0.0
    """The chunks' `prefill_attention_s`, summed."""

    @property
    def tokens(self) -> int:
        """Tokens computed in the step."""
        return self.prefill_tokens + self.decode_sequences


def voltage(power: PowerProfile, sm_clock_mhz: float) -> float:
    """Core voltage relative to its plateau: `1 + rise * x^n` at or above the knee, else 1.

    x is the distance from the knee in units of the distance from knee to reference clock.
    """
    above_mhz = sm_clock_mhz - power.knee_sm_clock_mhz
    if above_mhz <= 0:
        return 1.0
    x = above_mhz / (power.reference_sm_clock_mhz - power.knee_sm_clock_mhz)
    return float(1.0 + power.voltage_rise * x**power.voltage_exponent)


def idle_power_w(power: PowerProfile, sm_clock_mhz: float) -> float:
    """Power with the model loaded and nothing running: `base + clock v^2 f + leakage (v^3 - 1)`.

    v is the relative voltage and f the SM clock relative to the reference clock.
    """
    v = voltage(power, sm_clock_mhz)
    clock_w = power.idle_clock_w * v * v * sm_clock_mhz / power.reference_sm_clock_mhz
    return power.idle_base_w + clock_w + power.idle_leakage_w * (v**3 - 1.0)


def busy_power_w(
    gpu: GpuProfile, model: ModelProfile, work: StepWork, sm_clock_mhz: float
) -> float:
    """Power during a step at a clock, before the power cap.

    A step with prefill has full activity, `idle + base + clock v^2 f`. A decode step has less of
    it, by batch size, or follows the memory bandwidth it achieves at this clock, by profile.
    """
    power = gpu.power
    if work.prefill_tokens:
        return _activity_power_w(power, 1.0, sm_clock_mhz)
    if isinstance(power.decode, ActivityDecode):
        return _activity_power_w(
            power, decode_activity(power.decode, work.decode_sequences), sm_clock_mhz
        )
    return _bandwidth_power_w(gpu, model, work, sm_clock_mhz)


def decode_activity(decode: ActivityDecode, sequences: int) -> float:
    """Share of full activity in a decode step of so many sequences."""
    return decode.single + (1.0 - decode.single) * (1.0 - math.exp(-sequences / decode.batch_scale))


def _activity_power_w(power: PowerProfile, activity: float, sm_clock_mhz: float) -> float:
    v = voltage(power, sm_clock_mhz)
    clock_w = power.busy_clock_w * v * v * sm_clock_mhz / power.reference_sm_clock_mhz
    return idle_power_w(power, sm_clock_mhz) + activity * (power.busy_base_w + clock_w)


def _bandwidth_power_w(
    gpu: GpuProfile, model: ModelProfile, work: StepWork, sm_clock_mhz: float
) -> float:
    power, decode = gpu.power, gpu.power.decode
    assert not isinstance(decode, ActivityDecode)
    tb_s = _bytes_read(model, work) / step_time_s(model, work, sm_clock_mhz) / 1e12
    full_mhz = power.reference_sm_clock_mhz
    above_idle_w = decode.base_w + decode.watts_per_tb_s * tb_s - idle_power_w(power, full_mhz)
    v = voltage(power, sm_clock_mhz) / voltage(power, full_mhz)
    scale = decode.core_share * v * v + 1.0 - decode.core_share
    return idle_power_w(power, sm_clock_mhz) + scale * above_idle_w


def _bytes_read(model: ModelProfile, work: StepWork) -> int:
    return model.weights_bytes + model.kv_bytes_per_token * work.context_tokens


def step_time_s(model: ModelProfile, work: StepWork, sm_clock_mhz: float) -> float:
    """Duration of a step at a clock: `host + dense(N) g(f)/g(f_ref) + attention`.

    `dense(N) = (weights^q + (token N)^q)^(1/q)` for N tokens; `g(f) = (1 + (r f_ref/f)^p)^(1/p)`
    with `r = max(token N / weights, issue_share)`: compute-bound steps slow down as 1/f, small
    ones hardly until r f_ref/f nears 1. Decode attention is memory-bound and does not depend on
    the clock; prefill attention goes as 1/f.
    """
    slowdown = model.reference_sm_clock_mhz / sm_clock_mhz
    compute_ms = model.token_ms * work.tokens
    q, p = model.dense_exponent, model.clock_exponent
    dense_ms = (model.weights_ms**q + compute_ms**q) ** (1.0 / q)
    r = max(compute_ms / model.weights_ms, model.issue_share)
    stretch = ((1.0 + (r * slowdown) ** p) / (1.0 + r**p)) ** (1.0 / p)
    fixed_ms = model.host_ms + _decode_attention_ms(model, work)
    return float((fixed_ms + dense_ms * stretch) / 1e3 + work.prefill_attention_s * slowdown)


def _decode_attention_ms(model: ModelProfile, work: StepWork) -> float:
    if not work.decode_sequences:
        return 0.0
    a = model.attention
    if work.prefill_tokens:
        us = a.mixed_sequence_us * work.decode_sequences + a.mixed_context_us * work.context_tokens
    else:
        us = (
            a.decode_floor_us
            + a.decode_sequence_us * work.decode_sequences
            + a.decode_context_us * work.context_tokens
        )
    return model.layers * us / 1e3


def prefill_attention_s(model: ModelProfile, tokens: int, offset: int) -> float:
    """Attention time of a prefill chunk of `tokens` after `offset` computed ones, all layers.

    At the model's reference clock, the p-norm of a floor and of
    `pair * n (k + n/2) + token * n + context * k` for n tokens at offset k.
    """
    a = model.attention
    work_us = (
        a.prefill_pair_us * tokens * (offset + tokens / 2)
        + a.prefill_token_us * tokens
        + a.prefill_context_us * offset
    )
    pp = a.prefill_exponent
    return float(model.layers * (a.prefill_floor_us**pp + work_us**pp) ** (1.0 / pp) / 1e6)


def effective_sm_clock_mhz(
    gpu: GpuProfile, model: ModelProfile, work: StepWork, target_sm_clock_mhz: int
) -> int:
    """The clock a step runs at: the largest supported one up to the target within the power cap.

    If even the lowest clock exceeds the cap, the lowest. Power rises with the clock in both forms.
    """

    def power_w(sm_clock_mhz: int) -> float:
        return busy_power_w(gpu, model, work, sm_clock_mhz)

    return clock_under_cap(gpu, power_w, target_sm_clock_mhz)


def clock_under_cap(
    gpu: GpuProfile, power_w: Callable[[int], float], target_sm_clock_mhz: int
) -> int:
    """`effective_sm_clock_mhz`, for a step whose power at a clock is known otherwise."""
    if power_w(target_sm_clock_mhz) <= gpu.power.cap_w:
        return target_sm_clock_mhz
    clocks = gpu.supported_sm_clocks_mhz
    below_target = bisect.bisect_left(clocks, target_sm_clock_mhz)
    allowed = bisect.bisect_right(clocks, gpu.power.cap_w, hi=below_target, key=power_w)
    return clocks[max(allowed - 1, 0)]
