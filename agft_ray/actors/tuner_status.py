"""A tuner's figures for people: what the status page and the aggregator show of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agft_ray.gpu.base import Gpu
from agft_ray.telemetry.status import UNKNOWN, TunerStatus
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import Actuator, EngineSample, GpuSample, ServeWindow, Window


def with_tuner(status: TunerStatus, tuner: Tuner, last: WindowRecord | None) -> TunerStatus:
    """And what the loop does; `reason` says why clocks are not set, or what its last fault was."""
    return replace(
        status,
        state=str(tuner.state),
        reason=tuner.control.reason or tuner.fault,
        mode=tuner.mode.value,
        policy=tuner.policy.name,
        gpu_uuid=tuner.gpu.uuid,
        gpu_model=tuner.gpu.model,
        actuator=tuner.gpu.actuator.value,
        clock_changes=tuner.control.changes,
        phase_changes=tuner.control.phase_changes,
        clock_change_s=tuner.control.timer.median_s,
        phase_changes_put_off=tuner.control.phase_changes_put_off,
        plan=tuner.control.plan.arms,
        reset_due=tuner.control.reset_due,
        energy_weight=tuner.energy_weight.value,
        energy_weight_problem=tuner.energy_weight.problem,
        last_reward=last.reward if last else None,
        last_decision=last.decision.reason if last else None,
        last_note=last.note if last else "",
        last_window=window_figures(last.window) if last and last.window else None,
    )


def with_serve(status: TunerStatus, serve: ServeWindow | None) -> TunerStatus:
    """And what Ray Serve's metrics say, where they are fresh."""
    if serve is None:
        return status
    return replace(
        status,
        serve_request_rate_per_s=serve.request_rate_per_s,
        serve_latency_s=serve.mean_latency_s,
        serve_in_flight=serve.in_flight,
        serve_metrics_age_s=serve.age_s,
    )


def with_gpu(status: TunerStatus, sample: GpuSample, gpu: Gpu) -> TunerStatus:
    """And one reading: energy and power belong to `t_s`."""
    locks_clocks = gpu.actuator is Actuator.SM_CLOCK
    return replace(
        status,
        t_s=sample.t_s,
        energy_j=sample.energy_j,
        energy_t_s=sample.energy_t_s,
        energy_source=sample.energy_source,
        power_w=sample.power_w,
        power_source=sample.power_source,
        sm_clock_mhz=sample.sm_clock_mhz,
        locked_sm_clock_mhz=sample.locked if locks_clocks else UNKNOWN,
        power_limit_w=UNKNOWN if locks_clocks else sample.locked,
    )


def with_engine(status: TunerStatus, sample: EngineSample) -> TunerStatus:
    """And the engine's newest gauges and counters."""
    return replace(
        status,
        running=sample.running,
        waiting=sample.waiting,
        prompt_tokens=sample.prompt_tokens,
        generation_tokens=sample.generation_tokens,
        requests=sample.e2e_count,
        engine_t_s=sample.t_s,
    )


def window_figures(window: Window) -> dict[str, Any]:
    """What a window saw, between two moments on the tuner's clock."""
    return {
        "start_s": window.start_s,
        "end_s": window.end_s,
        "prompt_tokens": window.prompt_tokens,
        "generation_tokens": window.generation_tokens,
        "first_tokens": window.ttft_count,
        "requests": window.e2e_count,
        "energy_j": window.energy_j,
        "request_rate_per_s": window.request_rate_per_s,
    }
