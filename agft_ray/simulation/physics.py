"""Power and step time of a GPU by SM clock: pure functions with closed forms.

The forms and their coefficients were fitted to public measurements, which each profile names.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from agft_ray.simulation.profiles import (
    ActivityDecode,
    GpuProfile,
    ModelProfile,
    PowerProfile,
    UtilizationDecode,
)


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


def idle_power_w(power: PowerProfile, sm_clock_mhz: float, spinning_activity: float = 0.0) -> float:
    """Power with the model loaded and nothing running: `base + clock v^2 f + leakage (v^3 - 1)`.

    v is the relative voltage and f the SM clock relative to the reference clock. Workers that spin
    add their activity's share of `busy_clock_w v^2 f`.
    """
    v = voltage(power, sm_clock_mhz)
    clock_w = power.idle_clock_w + spinning_activity * power.busy_clock_w
    switched_w = clock_w * v * v * sm_clock_mhz / power.reference_sm_clock_mhz
    return power.idle_base_w + switched_w + power.idle_leakage_w * (v**3 - 1.0)


def busy_power_w(
    gpu: GpuProfile, model: ModelProfile, work: StepWork, sm_clock_mhz: float
) -> float:
    """Power of one GPU during a step at a clock, before the power cap.

    By `activity`, a step with prefill draws `idle + base + clock v^2 f`, a decode step a share of
    the part above idle, by batch size. By `utilization`, energy above idle is a sum over a step:
    `base` while kernels run, `clock v^2 f` times the time that the SMs work, `memory_w` while
    memory is read; nothing while the host is waited for. All-reduces, which spin, draw what the
    dense kernels do. Both forms rise with the clock.
    """
    power = gpu.power
    idle_w = idle_power_w(power, sm_clock_mhz, model.spinning_activity)
    if isinstance(power.decode, UtilizationDecode):
        return idle_w + _utilization_w(power, power.decode, model, work, sm_clock_mhz)
    activity = 1.0
    if not work.prefill_tokens:
        activity = decode_activity(power.decode, work.decode_sequences)
    return idle_w + activity * (power.busy_base_w + _core_w(power, sm_clock_mhz))


def decode_activity(decode: ActivityDecode, sequences: int) -> float:
    """Share of full activity in a decode step of so many sequences."""
    return decode.single + (1.0 - decode.single) * (1.0 - math.exp(-sequences / decode.batch_scale))


def _core_w(power: PowerProfile, sm_clock_mhz: float) -> float:
    v = voltage(power, sm_clock_mhz)
    return power.busy_clock_w * v * v * sm_clock_mhz / power.reference_sm_clock_mhz


def _utilization_w(
    power: PowerProfile,
    busy: UtilizationDecode,
    model: ModelProfile,
    work: StepWork,
    sm_clock_mhz: float,
) -> float:
    slowdown = model.reference_sm_clock_mhz / sm_clock_mhz
    dense_ms = _dense_ms(model, work, slowdown)
    decode_ms = _decode_attention_ms(model, work)
    prefill_ms = 1e3 * work.prefill_attention_s * slowdown
    all_reduce_ms = _all_reduce_ms(model, work)
    asking_ms = busy.issue_activity * model.issue_share * model.weights_ms * slowdown
    computing_ms = model.token_ms * work.tokens * slowdown
    s = busy.activity_exponent
    working_ms = min(dense_ms, (asking_ms**s + computing_ms**s) ** (1.0 / s))
    longer = 1.0 + all_reduce_ms / dense_ms
    core_ms = working_ms * longer + busy.attention_activity * decode_ms + prefill_ms
    reading_ms = model.weights_ms * longer + decode_ms
    busy_ms = dense_ms + decode_ms + prefill_ms + all_reduce_ms
    energy_mj = (
        power.busy_base_w * busy_ms
        + _core_w(power, sm_clock_mhz) * core_ms
        + busy.memory_w * reading_ms
    )
    return float(energy_mj / (_host_ms(model, work) + busy_ms))


def step_time_s(model: ModelProfile, work: StepWork, sm_clock_mhz: float) -> float:
    """Duration of a step at a clock: host, all-reduces, `dense(N, f)` for N tokens, attention.

    `dense = (W^q + (token N f_ref/f)^q)^(1/q) + head`. W is the time to read the weights,
    `weights ((1 + (r f_ref/f)^p) / (1 + r^p))^(1/p)` with r the issue share: it hardly depends on
    the clock f until r f_ref/f nears 1. The clock changes neither the host's time nor that of
    all-reduces and of decode attention, which waits for memory; prefill attention goes as 1/f.
    """
    slowdown = model.reference_sm_clock_mhz / sm_clock_mhz
    fixed_ms = _host_ms(model, work) + _all_reduce_ms(model, work)
    fixed_ms += _decode_attention_ms(model, work)
    dense_ms = _dense_ms(model, work, slowdown)
    return float((fixed_ms + dense_ms) / 1e3 + work.prefill_attention_s * slowdown)


def _host_ms(model: ModelProfile, work: StepWork) -> float:
    sequences_ms = model.host_sequence_ms * work.decode_sequences
    return model.host_ms + sequences_ms + (model.prefill_host_ms if work.prefill_tokens else 0.0)


def _all_reduce_ms(model: ModelProfile, work: StepWork) -> float:
    return model.all_reduce_ms + model.all_reduce_token_ms * work.tokens


def _dense_ms(model: ModelProfile, work: StepWork, slowdown: float) -> float:
    q, p, r = model.dense_exponent, model.clock_exponent, model.issue_share
    stretch = ((1.0 + (r * slowdown) ** p) / (1.0 + r**p)) ** (1.0 / p)
    compute_ms = model.token_ms * work.tokens * slowdown
    weights_ms = model.weights_ms * stretch
    return float((weights_ms**q + compute_ms**q) ** (1.0 / q) + model.head_ms * stretch)


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

    If even the lowest clock exceeds the cap, the lowest.
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
