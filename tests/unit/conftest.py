"""Builders of the values that many tests need."""

import dataclasses

import pytest

from agft_ray.actors.phase_socket import Doorbell, phase_path
from agft_ray.types import EngineSample, EventReason, GpuSample, StepTotals, Window

WINDOW = Window(
    start_s=10.0,
    end_s=12.0,
    arm=1230,
    energy_j=400.0,
    mean_power_w=200.0,
    sm_clock_mhz=1230.0,
    event_reasons=EventReason.NONE,
    running=4.0,
    waiting=0.0,
    kv_cache_usage=0.1,
    prompt_tokens=2000,
    generation_tokens=300,
    iterations=80,
    iteration_tokens=2300,
    ttft_sum_s=0.6,
    ttft_count=2,
    itl_sum_s=9.0,
    itl_count=300,
    e2e_sum_s=10.0,
    e2e_count=2,
    prefix_cache_queries=2000,
    prefix_cache_hits=500,
    preemptions=0,
    decode_steps=StepTotals(78, 300, 1.8),
    prefill_steps=StepTotals(2, 2000, 0.4),
    unknown_steps=StepTotals(),
    request_rate_per_s=1.0,
)


@pytest.fixture
def make_window():
    """A plausible window of a lightly loaded RTX A6000; any field may be replaced."""
    return lambda **changes: dataclasses.replace(WINDOW, **changes)


@pytest.fixture
def make_engine_sample():
    return lambda t_s, **changes: EngineSample(t_s=t_s, **changes)


@pytest.fixture
def make_gpu_sample():
    def make(t_s, energy_j=None, *, energy_t_s=None, sm_clock_mhz=1230, **changes):
        return GpuSample(
            t_s=t_s,
            power_w=200.0,
            energy_j=200.0 * t_s if energy_j is None else energy_j,
            energy_t_s=t_s if energy_t_s is None else energy_t_s,
            sm_clock_mhz=sm_clock_mhz,
            locked=1230,
            **changes,
        )

    return make


@pytest.fixture
def phases_at(tmp_path):
    """Where the phases of a replica "r" are told."""
    return phase_path(tmp_path / "leases", "r")


@pytest.fixture
def bell(phases_at):
    """A tuner's, which listens there."""
    bell = Doorbell()
    bell.listen(phases_at)
    yield bell
    bell.close()
