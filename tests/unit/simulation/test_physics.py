"""The formulas against small cited tables, and against themselves in limits that are known.

The large tables are in tests/acceptance.
"""

import math

import pytest

from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
    voltage,
)
from agft_ray.simulation.profiles import load_gpu_profile

A6000 = load_gpu_profile("rtx_a6000")
A100 = load_gpu_profile("a100_sxm_80gb")
LLAMA_A6000 = A6000.model_profile("llama-3.1-8b")
LLAMA_A100 = A100.model_profile("llama-3.1-8b")
H100 = load_gpu_profile("h100_sxm_80gb")
PRO_6000 = load_gpu_profile("rtx_pro_6000")

# 254 running at 63 % of the KV cache, with as much prefill as gives 260-266 ms at the cap.
SATURATED = StepWork(900, 254, 136_000, prefill_attention_s(LLAMA_A6000, 900, 300))

# Medians of power at locked clocks, from the logs of github.com/SusCom-Lab/AGFT.
A6000_POWER_W = {
    1005: 176,
    1095: 186,
    1185: 194,
    1275: 202,
    1365: 222,
    1455: 246.5,
    1545: 280,
}
# Loaded idle power at locked clocks, from github.com/THUlqs15/power_profiling (A800).
A100_IDLE_W = {
    210: 54.31,
    300: 54.53,
    510: 55.13,
    720: 56.40,
    825: 56.46,
    930: 58.56,
    1020: 59.94,
    1125: 61.83,
    1200: 64.80,
    1305: 71.26,
    1335: 74.75,
    1410: 80.47,
}


def point(gpu, model, work, target):
    clock = effective_sm_clock_mhz(gpu, model, work, target)
    return busy_power_w(gpu, model, work, clock), step_time_s(model, work, clock)


@pytest.mark.parametrize("clock", A6000_POWER_W)
@pytest.mark.parametrize("work", [SATURATED, StepWork(0, 254, 136_000)])
def test_a6000_saturated_power_by_clock(clock, work):
    power_w, _ = point(A6000, LLAMA_A6000, work, clock)
    assert power_w == pytest.approx(A6000_POWER_W[clock], rel=0.03)


def test_a100_idle_power_by_clock():
    errors = [idle_power_w(A100.power, f) / w - 1 for f, w in A100_IDLE_W.items()]
    assert max(map(abs, errors)) < 0.02
    assert sum(map(abs, errors)) / len(errors) < 0.01


def test_power_by_utilization_is_the_energy_of_a_step_over_its_time():
    work = StepWork(0, 32, 32_000)
    x = 1410 / 1200
    weights_ms = 9.41 * ((1 + (0.827 * x) ** 16) / (1 + 0.827**16)) ** (1 / 16)
    computing_ms = 0.0677 * 32 * x
    dense_ms = (weights_ms**1.38 + computing_ms**1.38) ** (1 / 1.38)
    attention_ms = 32 * (11.5 + 0.155 * 32 + 0.002336 * 32_000) / 1e3
    asking_ms = 1.165 * 0.827 * 9.41 * x
    working_ms = min(dense_ms, (asking_ms**1.055 + computing_ms**1.055) ** (1 / 1.055))
    v = 1 + 0.1385 * ((1200 - 850) / (1410 - 850)) ** 2.52
    energy_mj = 14.85 * (dense_ms + attention_ms) + 15.0 * (9.41 + attention_ms)
    energy_mj += 184.7 * v**2 * 1200 / 1410 * (working_ms + 0.19 * attention_ms)
    expected_w = idle_power_w(A100.power, 1200) + energy_mj / (1.0 + dense_ms + attention_ms)
    assert busy_power_w(A100, LLAMA_A100, work, 1200) == pytest.approx(expected_w)


def test_what_waits_for_the_host_draws_idle_power():
    work = StepWork(0, 8, 8000)
    slow_host = LLAMA_A100.model_copy(update={"host_ms": 11.0})
    idle_w = idle_power_w(A100.power, 1410)
    energies_j = [
        (busy_power_w(A100, model, work, 1410) - idle_w) * step_time_s(model, work, 1410)
        for model in (LLAMA_A100, slow_host)
    ]
    assert energies_j[1] == pytest.approx(energies_j[0])


def test_an_all_reduce_draws_what_the_dense_kernels_do():
    model = H100.model_profile("llama-3.1-70b-tp4")
    attention = model.attention.model_copy(update={"decode_floor_us": 0.0})
    work = StepWork(0, 64, 0)
    idle_w = idle_power_w(H100.power, 1380, model.spinning_activity)

    def above_idle_j_and_time_s(all_reduce_ms):
        changes = {"all_reduce_ms": all_reduce_ms, "all_reduce_token_ms": 0.0}
        group = model.model_copy(update={"attention": attention, **changes})
        time_s = step_time_s(group, work, 1380)
        return (busy_power_w(H100, group, work, 1380) - idle_w) * time_s, time_s

    without_j, step_s = above_idle_j_and_time_s(0.0)
    with_j, _ = above_idle_j_and_time_s(30.0)
    dense_s = step_s - (model.host_ms + 64 * model.host_sequence_ms) / 1e3
    assert with_j / without_j == pytest.approx((dense_s + 0.030) / dense_s)


def test_workers_that_spin_draw_their_share_of_the_cores_power():
    power = H100.power
    v = voltage(power, 1680)
    more_w = idle_power_w(power, 1680, 0.1) - idle_power_w(power, 1680)
    assert more_w == pytest.approx(0.1 * power.busy_clock_w * v**2 * 1680 / 1980)


def test_the_head_is_part_of_the_dense_time():
    model = PRO_6000.model_profile("llama-3.1-8b")
    headless = model.model_copy(update={"head_ms": 0.0})
    work = StepWork(0, 8, 4000)
    at_reference = step_time_s(model, work, 2700) - step_time_s(headless, work, 2700)
    assert at_reference * 1e3 == pytest.approx(0.85)
    slow = step_time_s(model, work, 600) - step_time_s(headless, work, 600)
    assert slow == pytest.approx(
        at_reference * ((1 + (0.51 * 4.5) ** 6) / (1 + 0.51**6)) ** (1 / 6)
    )


@pytest.mark.parametrize(
    ("gpu", "model"),
    [(A100, "llama-3.1-8b"), (H100, "llama-3.1-8b"), (H100, "llama-3.1-70b-tp4")],
)
def test_decode_time_and_energy_are_affine_in_context(gpu, model):
    """What jumps over series of decode steps rely on."""
    profile = gpu.model_profile(model)
    works = [StepWork(0, 24, context) for context in (1000, 26_000, 51_000)]
    times_s = [step_time_s(profile, work, 1200) for work in works]
    energies_j = [
        time_s * busy_power_w(gpu, profile, work, 1200)
        for time_s, work in zip(times_s, works, strict=True)
    ]
    for low, middle, high in (times_s, energies_j):
        assert middle == pytest.approx((low + high) / 2, rel=1e-12)


def test_voltage_is_flat_below_the_knee_and_as_fitted_above():
    assert voltage(A6000.power, 210) == voltage(A6000.power, 1303) == 1.0
    assert voltage(A6000.power, 1800) == pytest.approx(1.335)
    assert voltage(A100.power, 1130) == pytest.approx(1 + 0.1385 * 0.5**2.52)


def test_a6000_idle_power():
    assert idle_power_w(A6000.power, 900) == pytest.approx(45 + 13)
    assert idle_power_w(A6000.power, 1800) == pytest.approx(45 + 26 * 1.335**2)


def test_decode_activity_grows_with_the_batch():
    powers_w = [busy_power_w(A6000, LLAMA_A6000, StepWork(0, b, 0), 1200) for b in (1, 80, 10_000)]
    idle_w = idle_power_w(A6000.power, 1200)
    full_w = 36.7 + 143.7 * 1200 / 1800
    shares = [0.7 + 0.3 * (1 - math.exp(-1 / 80)), 0.7 + 0.3 * (1 - math.exp(-1)), 1.0]
    assert powers_w == pytest.approx([idle_w + share * full_w for share in shares])


def test_step_time_at_the_reference_clock_is_the_fit():
    work = StepWork(0, 64, 50_000)
    dense_ms = (22.7**1.58 + (0.1675 * 64) ** 1.58) ** (1 / 1.58)
    attention_ms = 32 * (11.5 + 0.155 * 64 + 0.0062 * 50_000) / 1e3
    assert step_time_s(LLAMA_A6000, work, 1545) * 1e3 == pytest.approx(1 + dense_ms + attention_ms)


def test_step_time_with_prefill():
    chunk_s = prefill_attention_s(LLAMA_A6000, 512, 256)
    work_us = 0.0001387 * 512 * (256 + 256) + 0.1032 * 512 + 0.0607 * 256
    assert chunk_s * 1e6 == pytest.approx(32 * (7.77**1.51 + work_us**1.51) ** (1 / 1.51))
    work = StepWork(512, 10, 8000, chunk_s)
    dense_ms = (22.7**1.58 + (0.1675 * 522) ** 1.58) ** (1 / 1.58)
    mixed_ms = 32 * (0.8 * 10 + 0.0118 * 8000) / 1e3
    expected_ms = 1 + dense_ms + mixed_ms + chunk_s * 1e3
    assert step_time_s(LLAMA_A6000, work, 1545) * 1e3 == pytest.approx(expected_ms)


def test_large_steps_slow_as_1_over_f_and_small_ones_hardly():
    large = StepWork(100_000)
    ratio = step_time_s(LLAMA_A100, large, 705) / step_time_s(LLAMA_A100, large, 1410)
    assert ratio == pytest.approx(2.0, rel=1e-3)
    one = StepWork(0, 1, 0)
    assert step_time_s(LLAMA_A100, one, 1200) / step_time_s(LLAMA_A100, one, 1410) < 1.03
    assert step_time_s(LLAMA_A100, one, 300) / step_time_s(LLAMA_A100, one, 600) > 1.7


def test_weights_and_compute_overlap_at_every_clock():
    work = StepWork(200)
    x = 1545 / 900
    weights_ms = 22.7 * ((1 + (0.8 * x) ** 6) / (1 + 0.8**6)) ** (1 / 6)
    dense_ms = (weights_ms**1.58 + (0.1675 * 200 * x) ** 1.58) ** (1 / 1.58)
    assert step_time_s(LLAMA_A6000, work, 900) * 1e3 == pytest.approx(1 + dense_ms)


def test_the_effective_clock_is_the_largest_within_the_cap():
    for work in (SATURATED, StepWork(0, 1, 100), StepWork(0, 100, 50_000)):
        clock = effective_sm_clock_mhz(A6000, LLAMA_A6000, work, 2100)
        assert busy_power_w(A6000, LLAMA_A6000, work, clock) <= 300
        assert busy_power_w(A6000, LLAMA_A6000, work, clock + 15) > 300
    assert effective_sm_clock_mhz(A6000, LLAMA_A6000, SATURATED, 1200) == 1200


def test_the_lowest_clock_runs_even_above_the_cap():
    weak = A6000.model_copy(update={"power": A6000.power.model_copy(update={"cap_w": 50.0})})
    assert effective_sm_clock_mhz(weak, LLAMA_A6000, SATURATED, 2100) == 210


@pytest.mark.parametrize("gpu", [A6000, A100, H100, PRO_6000])
def test_power_rises_and_step_time_falls_with_the_clock(gpu):
    model = gpu.model_profile("llama-3.1-8b")
    for work in (StepWork(0, 1, 50), StepWork(0, 64, 60_000), StepWork(512, 20, 9000, 0.002)):
        clocks = gpu.supported_sm_clocks_mhz
        powers_w = [busy_power_w(gpu, model, work, f) for f in clocks]
        times_s = [step_time_s(model, work, f) for f in clocks]
        assert powers_w == sorted(powers_w)
        assert times_s == sorted(times_s, reverse=True)
