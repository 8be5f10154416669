"""What a device adds up: shares of steps, in closed form and jumped over, and nothing but them."""

import pytest

from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.simulation.work_done import WorkDone
from agft_ray.workloads.requests import Request

GPU = load_gpu_profile("rtx_a6000")
MODEL = GPU.model_profile("llama-3.1-8b")
DECODE = StepWork(0, 32, 30_000)
PREFILL = StepWork(1500, 8, 8000, 0.02)


def at_default(work):
    clock = effective_sm_clock_mhz(GPU, MODEL, work, GPU.max_sm_clock_mhz)
    return step_time_s(MODEL, work, clock), busy_power_w(GPU, MODEL, work, clock)


def test_a_step_under_way_counts_by_the_share_that_is_done():
    done = WorkDone()
    device = Device(GPU, MODEL, done=done)
    time_s, power_w = at_default(PREFILL)
    device.begin_step(0.0, PREFILL)
    device.advance(0.25 * time_s)
    assert done.prefill == [(PREFILL, pytest.approx(0.25))]
    assert (done.prefill_s, done.decode_s) == (0.25 * time_s, 0.0)
    done.clear()
    device.finish_step()
    assert done.prefill == [(PREFILL, pytest.approx(0.75))]
    assert done.prefill_j == pytest.approx(0.75 * time_s * power_w)


def test_the_shares_at_several_clocks_make_one_step():
    done = WorkDone()
    device = Device(GPU, MODEL, done=done)
    device.lock(0.0, 600)
    device.begin_step(0.0, PREFILL)
    end_s = device.finish_step()
    assert done.prefill == [(PREFILL, pytest.approx(1.0))]
    assert done.prefill_s == pytest.approx(end_s)
    assert done.prefill_j == pytest.approx(device.energy_j)


def test_a_series_is_the_sum_of_its_steps():
    done = WorkDone()
    device = Device(GPU, MODEL, done=done)
    steps, end_s = device.run_series(0.0, DECODE, 10, 60.0)
    assert steps == 10
    assert done.decode == {32: [10, sum(30_000 + 32 * i for i in range(10))]}
    assert (done.decode_s, done.decode_j) == pytest.approx((end_s, device.energy_j))


def test_idle_time_counts_nothing():
    done = WorkDone()
    Device(GPU, MODEL, done=done).advance(10.0)
    assert done == WorkDone()


@pytest.mark.parametrize("jumps", [True, False])
def test_busy_and_idle_energy_is_all_energy(jumps):
    done = WorkDone()
    device = Device(GPU, MODEL, seed=1, done=done)
    device.lock(0.0, 1230)
    device.advance(1.0)
    before_j = device.energy_j
    core = BatchingEngine(
        EngineConfig().for_model(MODEL), lambda n, k: prefill_attention_s(MODEL, n, k)
    )
    engine = VirtualEngine(core, device, jumps=jumps)
    engine.submit([Request("a", 1.0, 300, 50), Request("b", 1.5, 3000, 100)])
    engine.run_until(20.0)
    device.advance(20.0)
    idle_s = 19.0 - done.busy_s
    idle_j = idle_s * idle_power_w(GPU.power, 1230)
    assert done.prefill_j + done.decode_j + idle_j == pytest.approx(device.energy_j - before_j)
    assert sum(work.prefill_tokens * share for work, share in done.prefill) == pytest.approx(3300)
    # All tokens but the two that the prefills gave.
    decoding = sum(work.decode_sequences * share for work, share in done.prefill)
    tokens = sum(sequences * steps for sequences, (steps, _) in done.decode.items())
    assert tokens + decoding == pytest.approx(148)
