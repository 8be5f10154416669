import pytest

from agft_ray.simulation.device import Device
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    step_time_s,
)
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import EventReason

GPU = load_gpu_profile("rtx_a6000")
MODEL = GPU.model_profile("llama-3.1-8b")
DECODE = StepWork(0, 32, 30_000)
PREFILL = StepWork(1500, 8, 8000, 0.02)


def device(**options):
    return Device(GPU, MODEL, **options)


def busy(work, target):
    clock = effective_sm_clock_mhz(GPU, MODEL, work, target)
    return busy_power_w(GPU, MODEL, work, clock), step_time_s(MODEL, work, clock)


def change_s(dev):
    """When the last clock change asked for takes effect."""
    return dev.to_state()["pending_clock_changes"][-1][0]


def test_one_step_takes_its_time_and_energy():
    dev = device()
    power_w, time_s = busy(DECODE, 2100)
    assert dev.begin_step(0.0, DECODE) == time_s == dev.step_end_s()
    assert dev.finish_step() == dev.t_s == time_s
    assert dev.energy_j == pytest.approx(power_w * time_s, rel=1e-12)
    assert dev.step_end_s() is None


def test_a_step_begins_where_the_device_is_if_that_is_later():
    dev = device()
    dev.advance(5.0)
    assert dev.begin_step(3.0, DECODE) == pytest.approx(5.0 + busy(DECODE, 2100)[1])


def test_the_next_step_of_a_late_engine_begins_at_the_end_of_the_last():
    dev = device(stall_grace_s=2.0)
    end_s = dev.begin_step(0.0, DECODE)
    dev.read(end_s + 1.9)
    assert dev.t_s == end_s
    assert dev.finish_step() == end_s
    assert dev.begin_step(end_s, DECODE) == pytest.approx(2 * end_s)


def test_the_gpu_of_a_dead_engine_idles_from_the_end_of_its_step():
    dev = device(stall_grace_s=2.0)
    end_s = dev.begin_step(0.0, DECODE)
    dev.advance(end_s + 2.1)
    assert dev.t_s == end_s + 2.1
    step_j = busy(DECODE, 2100)[0] * end_s
    idle_j = idle_power_w(GPU.power, 2100) * 2.0 + idle_power_w(GPU.power, 1800) * 0.1
    assert dev.energy_j == pytest.approx(step_j + idle_j, rel=1e-12)
    assert dev.finish_step() == end_s + 2.1


def test_an_engine_that_replaces_a_dead_one_ends_its_step():
    dev = device()
    end_s = dev.begin_step(0.0, DECODE)
    assert dev.begin_step(end_s / 2, DECODE) == pytest.approx(1.5 * end_s)
    dev.begin_step(10.0, DECODE)
    idle_j = idle_power_w(GPU.power, 2100) * 2 + idle_power_w(GPU.power, 1800) * (
        10 - 1.5 * end_s - 2
    )
    assert dev.energy_j == pytest.approx(busy(DECODE, 2100)[0] * 1.5 * end_s + idle_j, rel=1e-12)


def test_a_clock_change_in_mid_step_retimes_the_rest():
    dev = device()
    dev.begin_step(10.0, PREFILL)
    dev.lock(10.01, 1005)
    at_s = change_s(dev)
    (fast_w, fast_s), (slow_w, slow_s) = busy(PREFILL, 2100), busy(PREFILL, 1005)
    end_s = at_s + (1 - (at_s - 10.0) / fast_s) * slow_s
    assert dev.step_end_s() == pytest.approx(end_s, rel=1e-12)
    before_j = dev.energy_j - fast_w * 0.01
    assert dev.finish_step() == pytest.approx(end_s, rel=1e-12)
    expected_j = fast_w * (at_s - 10.0) + slow_w * (end_s - at_s)
    assert dev.energy_j - before_j == pytest.approx(expected_j, rel=1e-12)


def test_two_clock_changes_in_one_step():
    dev = device()
    dev.begin_step(0.0, PREFILL)
    dev.lock(0.01, 900)
    first_s = change_s(dev)
    dev.lock(first_s + 0.01, 1500)
    second_s = change_s(dev)
    times = [busy(PREFILL, f)[1] for f in (2100, 900, 1500)]
    done = first_s / times[0] + (second_s - first_s) / times[1]
    assert dev.step_end_s() == pytest.approx(second_s + (1 - done) * times[2], rel=1e-12)


def test_a_later_call_replaces_a_change_not_yet_in_force():
    dev = device()
    dev.lock(1.0, 900)
    dev.lock(1.001, 1200)
    assert [clock for _, clock in dev.to_state()["pending_clock_changes"]] == [1200]
    assert dev.read(1.2).sm_clock_mhz == 1200


def test_a_change_that_was_due_while_the_engine_was_late_is_not_lost():
    dev = device(stall_grace_s=9.0)
    end_s = dev.begin_step(0.0, DECODE)
    dev.lock(end_s + 0.1, 900)
    dev.lock(end_s + 1.0, 1200)
    dev.finish_step()
    dev.advance(end_s + 0.5)
    assert dev.read(end_s + 0.5).sm_clock_mhz == 900
    assert dev.read(end_s + 1.2).sm_clock_mhz == 1200


def test_the_delay_is_log_normal_with_median_25_ms_and_p95_30_ms():
    dev = device(seed=7)
    delays_s = []
    for call in range(4000):
        dev.reset(float(call))
        delays_s.append(change_s(dev) - call)
    delays_s.sort()
    assert delays_s[2000] == pytest.approx(0.025, rel=0.01)
    assert delays_s[3800] == pytest.approx(0.030, rel=0.015)


def test_the_default_governor_drops_the_clock_of_an_idle_gpu_after_its_delay():
    dev = device()
    end_s = dev.begin_step(0.0, DECODE)
    dev.finish_step()
    assert dev.read(end_s + 1.99).sm_clock_mhz == 2100
    assert dev.read(end_s + 2.01).sm_clock_mhz == 1800
    dev.begin_step(5.0, DECODE)
    busy_sample = dev.read(5.001)
    assert 1500 < busy_sample.sm_clock_mhz <= 1800
    assert busy_sample.event_reasons == EventReason.SW_POWER_CAP


def test_a_locked_clock_holds_when_idle():
    dev = device()
    dev.lock(0.0, 1290)
    sample = dev.read(100.0)
    assert (sample.sm_clock_mhz, sample.locked) == (1290, 1290)
    assert sample.event_reasons == EventReason.GPU_IDLE
    dev.begin_step(100.0, DECODE)
    assert dev.read(100.01).event_reasons == EventReason.NONE


def test_the_energy_counter_is_exact_at_multiples_of_its_period():
    dev = device(counter_update_s=0.1)
    power_w = idle_power_w(GPU.power, 2100)
    for t_s in (0.05, 0.13, 0.199, 0.31, 1.99):
        sample = dev.read(t_s)
        updates = int(t_s / 0.1)
        assert sample.energy_t_s == pytest.approx(updates * 0.1)
        assert sample.energy_j == pytest.approx(power_w * updates * 0.1)


def test_power_noise_depends_on_seed_and_time_alone():
    def powers_w(seed):
        dev = device(seed=seed)
        return [dev.read(3.0 + k).power_w for k in range(2000)]

    first = powers_w(1)
    assert first == powers_w(1) != powers_w(2)
    relative = [power_w / idle_power_w(GPU.power, 1800) - 1 for power_w in first]
    assert sum(relative) / 2000 == pytest.approx(0, abs=0.0015)
    assert (sum(r * r for r in relative) / 2000) ** 0.5 == pytest.approx(0.015, rel=0.08)


def test_temperature_follows_power():
    dev = device()
    dev.lock(0.0, 1275)
    dev.begin_step(1.0, StepWork(900, 254, 136_000, 0.0))
    assert dev.read(1.01).temperature_c == pytest.approx(59.7 + 0.0813 * 201.9, abs=0.1)


def test_a_tensor_parallel_group_draws_the_power_of_all_its_gpus():
    gpu = load_gpu_profile("h100_sxm_80gb")
    model = gpu.model_profile("llama-3.1-70b-tp4")
    work = StepWork(0, 16, 8000)
    device = Device(gpu, model)
    device.begin_step(0.0, work)
    end_s = device.finish_step()
    assert end_s == pytest.approx(step_time_s(model, work, 1980))
    busy_j = 4 * busy_power_w(gpu, model, work, 1980) * end_s
    idle_w = idle_power_w(gpu.power, 1980, model.spinning_activity)
    assert device.energy_j == pytest.approx(busy_j)
    device.advance(end_s + 1.0)
    assert device.energy_j == pytest.approx(busy_j + 4 * idle_w)
    temperature_c = device.read(end_s + 1.0).temperature_c
    assert temperature_c == pytest.approx(30 + 0.06 * idle_w)
