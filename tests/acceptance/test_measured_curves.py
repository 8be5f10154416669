"""The formulas and profiles against public measurements by clock, by batch and by power cap.

The tables are in AGFT_RAY_DATA's calibration/; what each was measured on, the profiles say.
"""

import functools
import math
import random
import statistics

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
from agft_ray.workloads.requests import Request

A6000 = load_gpu_profile("rtx_a6000")
A100 = load_gpu_profile("a100_sxm_80gb")
H100 = load_gpu_profile("h100_sxm_80gb")
PRO_6000 = load_gpu_profile("rtx_pro_6000")
LLAMA = "llama-3.1-8b"


def chunk(gpu, tokens, offset):
    return prefill_attention_s(gpu.model_profile(LLAMA), tokens, offset)


# 254 running at 63 % of the KV cache, as recorded. The prefill of a step was not: 940 tokens give
# the level of the TPOT curve, a number of the load and not of the profile.
SATURATED = StepWork(940, 254, 136_000, chunk(A6000, 940, 300))
PROMPT = StepWork(2048, 0, 0, chunk(A100, 2048, 0))


def point(gpu, work, target, model=LLAMA):
    """Power in W of one GPU, and duration in s, of a step at a locked clock."""
    profile = gpu.model_profile(model)
    clock = effective_sm_clock_mhz(gpu, profile, work, int(target))
    return busy_power_w(gpu, profile, work, clock), step_time_s(profile, work, clock)


def mape(errors):
    return statistics.mean(map(abs, errors))


def worst(errors):
    return max(map(abs, errors))


def test_a6000_saturated_power_by_clock(table, reached):
    rows = table("a6000_saturated_by_clock.csv")
    errors = [point(A6000, SATURATED, r["sm_clock_mhz"])[0] / r["power_w_median"] - 1 for r in rows]
    reached(f"A6000 saturated: power at {len(rows)} clocks, MAPE", mape(errors), 0.03)
    assert reached("A6000 saturated: power, worst clock", worst(errors), 0.03) <= 0.03


def test_a6000_saturated_tpot_by_clock(table, reached):
    rows = table("a6000_saturated_by_clock.csv")
    errors = [
        point(A6000, SATURATED, r["sm_clock_mhz"])[1] * 1e3 / r["tpot_ms_median"] - 1 for r in rows
    ]
    reached("A6000 saturated: TPOT, worst clock", worst(errors), None)
    assert reached(f"A6000 saturated: TPOT at {len(rows)} clocks, MAPE", mape(errors), 0.03) <= 0.03


def test_a6000_saturated_is_most_efficient_between_1185_and_1365_mhz(reached):
    products = {f: math.prod(point(A6000, SATURATED, f)) for f in range(210, 2101, 15)}
    best = reached(
        "D.5.1 A6000 saturated: lowest W x TPOT, MHz",
        min(products, key=products.get),
        "1185 to 1365",
    )
    assert 1185 <= best <= 1365


def test_a6000_settings_above_the_power_cap_are_one_machine(reached):
    points = [point(A6000, SATURATED, f) for f in range(1590, 2101, 15)]
    powers_w, times_s = zip(*points, strict=True)
    spread = max(max(values) / min(values) - 1 for values in (powers_w, times_s))
    assert (
        reached("D.5.1 A6000 saturated: spread of settings from 1590 MHz up", spread, 0.02) < 0.02
    )


def test_a6000_1275_against_2100_mhz(reached):
    slow, fast = (point(A6000, SATURATED, f) for f in (1275, 2100))
    power = reached("D.5.2 A6000 1275 against 2100 MHz: power", slow[0] / fast[0] - 1, "-32 +- 2 %")
    tpot = reached("D.5.2 A6000 1275 against 2100 MHz: TPOT", slow[1] / fast[1] - 1, "+22 +- 4 %")
    assert power == pytest.approx(-0.32, abs=0.02)
    assert tpot == pytest.approx(0.22, abs=0.04)


def test_a100_prefill_and_idle_power_by_clock(table, reached):
    rows = table("a800_prefill_by_clock.csv")
    prefill = [point(A100, PROMPT, r["locked_mhz"])[0] / r["prefill_power_w"] - 1 for r in rows]
    idle = [
        idle_power_w(A100.power, r["locked_mhz"]) / r["first_sample_idle_power_w"] - 1 for r in rows
    ]
    assert reached("A100 prefill: power at 36 clocks, MAPE", mape(prefill), 0.03) < 0.03
    assert reached("A100 loaded idle: power at 36 clocks, MAPE", mape(idle), 0.01) < 0.01


def test_a100_prefill_energy_is_lowest_near_1100_mhz(reached):
    energy_j = {f: math.prod(point(A100, PROMPT, f)) for f in A100.supported_sm_clocks_mhz}
    best = min(energy_j, key=energy_j.get)
    reached(
        "D.5.3 A100 prefill: lowest energy per prompt, MHz",
        best,
        "flat best measured over 1095 to 1200",
    )
    saving = reached(
        "D.5.3 A100 prefill: below 1410 MHz by", 1 - energy_j[best] / energy_j[1410], "13-16 %"
    )
    assert 1020 < best <= 1200  # 1 % above the best is measured at 1020, 8 % at 1305
    assert 0.13 <= saving <= 0.16
    assert energy_j[510] > energy_j[1410]


def test_a6000_tpot_rises_faster_than_1_over_f_below_570_mhz(reached):
    """At a fixed arrival rate, which only an engine with a queue shows: the batch grows."""
    products = {f: light_load_tpot_s(f) * f for f in (300, 390, 480, 570, 660, 840)}
    # AGFT's July logs of light load: constant within 2 % from 660 to 1110 MHz.
    assert products[660] == pytest.approx(products[840], rel=0.05)
    for lower, higher in ((300, 390), (390, 480), (480, 570)):
        more = reached(
            f"D.5.5 A6000 at 1 request/s: TPOT x f at {lower} against {higher} MHz",
            products[lower] / products[higher] - 1,
            "> 0",
        )
        assert more > 0.03


def light_load_tpot_s(sm_clock_mhz):
    """Mean TPOT of 300 requests of 500 and 150 tokens, one a second."""
    model = A6000.model_profile(LLAMA)
    device = Device(A6000, model)
    device.lock(0.0, sm_clock_mhz)
    core = BatchingEngine(
        EngineConfig().for_model(model), functools.partial(prefill_attention_s, model)
    )
    timings = []
    engine = VirtualEngine(core, device, timings.append)
    rng, arrival_s = random.Random(0), 0.0
    for index in range(300):
        arrival_s += rng.expovariate(1.0)
        engine.submit([Request(str(index), arrival_s, 500, 150)])
    engine.run_until(10_000.0)
    assert engine.drained
    return statistics.mean(t.tpot_s for t in timings)


@pytest.mark.parametrize("sequences", [1, 32])
def test_pro_6000_at_450_w_loses_less_than_2_percent(reached, sequences):
    work = StepWork(0, sequences, 1000 * sequences)
    capped = point(PRO_6000.with_value("power.cap_w", 450), work, 2790)
    free = point(PRO_6000, work, 2790)
    loss = reached(
        f"D.5.6 RTX PRO 6000, {sequences} running: tokens/s lost at 450 W",
        1 - free[1] / capped[1],
        0.02,
    )
    assert capped[0] <= 450
    assert loss < 0.02


def test_pro_6000_power_by_clock(table, reached):
    """Decode of a dense model with 1 and 32 running, at the clocks that each power cap left."""
    rows = [r for r in table("rtxpro6000_power_cap_sweep.csv") if "dense" in r["phase"]]
    model = PRO_6000.model_profile(LLAMA)
    errors = []
    for r in rows:
        work = StepWork(0, 32 if r["phase"].endswith("n32") else 1, 0)
        errors.append(busy_power_w(PRO_6000, model, work, r["mhz_mean"]) / r["power_w"] - 1)
    reached("RTX PRO 6000 decode: power, worst of 14 points", worst(errors), None)
    assert reached("RTX PRO 6000 decode: power at 14 points, MAPE", mape(errors), 0.03) < 0.03


@pytest.mark.parametrize(
    ("name", "model", "itl_bound", "power_bound"),
    [
        ("Llama-3.1-8B-Instruct", LLAMA, 0.01, 0.10),
        ("Llama-3.1-70B-Instruct", "llama-3.1-70b-tp4", 0.05, 0.05),
    ],
)
def test_h100_decode_by_batch(table, reached, name, model, itl_bound, power_bound):
    """Median inter-token latency and power at default clocks.

    Up to batch 128, where most steps are free of prefill; 350 tokens of context are assumed.
    """
    profile = H100.model_profile(model)
    rows = [
        r
        for r in table("mlenergy_v3.csv")
        if r["model"].endswith(name) and r["gpu"] == "H100" and r["avg_batch"] < 129
    ]
    itl, power = [], []
    for r in rows:
        batch = round(r["avg_batch"])
        power_w, time_s = point(H100, StepWork(0, batch, 350 * batch), 1980, model)
        itl.append(time_s * 1e3 / r["itl_med"] - 1)
        power.append(power_w * profile.tensor_parallel / r["power_w"] - 1)
    what = f"H100 {model}: {len(rows)} batches of 8 to 128"
    assert reached(f"{what}, ITL MAPE", mape(itl), itl_bound) <= itl_bound
    assert reached(f"{what}, power MAPE", mape(power), power_bound) <= power_bound
