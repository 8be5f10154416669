"""The simulator against load tests of real servers, and against tables by clock and phase.

Quick form; `agft-ray calibrate FILE --base P --model M --check` prints all lines.
"""

import statistics
from pathlib import Path

import pytest

from agft_ray.calibration.load_check import check_load_table
from agft_ray.calibration.load_table import read_load_table
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import load_gpu_profile

H100 = load_gpu_profile("h100_sxm_80gb")
LLAMA_70B = "llama-3.1-70b-tp4"
A100 = load_gpu_profile("a100_sxm_80gb")
LLAMA_8B = "llama-3.1-8b"
LOADS = "calibration/h100_llama33_70b_tp4_by_clock_and_rate.csv"
RATES_PER_S = (0.95, 1.9, 4.0)


@pytest.fixture(scope="module")
def rows(data_file):
    return read_load_table(Path(data_file(LOADS))).rows


@pytest.fixture(scope="module")
def poisson(rows):
    return check_load_table(rows, H100, LLAMA_70B)


def test_h100_70b_load_test(poisson, reached):
    bounds = {"power_w": 0.05, "ttft_p99_s": 0.15, "tpot_p99_s": 0.10}
    quality = poisson.quality()
    for quantity, bound in bounds.items():
        found = quality[quantity]
        what = f"H100, 70B on four, {found.count} clocks and rates: {quantity}"
        worst = found.worst.row.load
        reached(
            f"{what}, worst ({worst.sm_clock_mhz} MHz, {worst.rate_per_s}/s)",
            found.worst.error,
            None,
        )
        assert reached(f"{what}, MAE", found.mean_absolute, bound) <= bound


def test_h100_70b_load_test_with_arrivals_that_the_fit_has_not_seen(rows, reached):
    """A p99 of 200 requests hangs on their luck, which all rows of a draw share: medians of 16."""
    draws = [
        check_load_table(rows, H100, LLAMA_70B, seeds=[seed]).quality() for seed in range(20, 36)
    ]
    bounds = {"power_w": 0.05, "ttft_p99_s": 0.20, "tpot_p99_s": 0.10}
    for quantity, bound in bounds.items():
        errors = [found[quantity].mean_absolute for found in draws]
        what = f"H100, 70B on four, each of 16 other draws of arrivals: {quantity}, MAE"
        reached(f"{what}, least", min(errors), None)
        reached(f"{what}, largest", max(errors), None)
        assert reached(f"{what}, median", statistics.median(errors), bound) <= bound


def test_even_arrivals_explain_the_load_test_worse(rows, poisson, reached):
    """Its arrivals are not stated; with even ones no prompt meets another."""
    even = check_load_table(rows, H100, LLAMA_70B, arrivals="even", requests=100, seeds=[0])
    for quantity, found in even.quality().items():
        reached(f"H100, 70B on four, even arrivals: {quantity}, mean", found.mean, None)
        assert found.mean_absolute > poisson.quality()[quantity].mean_absolute


@pytest.mark.parametrize(("clock", "bound"), [(1380, 0.05), (1080, 0.10)])
@pytest.mark.parametrize("quantity", ["power_w", "tpot_p99_s"])
def test_h100_70b_changes_against_1830_mhz(poisson, reached, quantity, clock, bound):
    found = [
        c for c in poisson.changes(RATES_PER_S) if (c.sm_clock_mhz, c.quantity) == (clock, quantity)
    ]
    assert [c.rate_per_s for c in found] == list(RATES_PER_S)
    for c in found:
        assert c.reference_sm_clock_mhz == 1830
        off = reached(
            f"H100, 70B on four, {clock} against 1830 MHz at {c.rate_per_s}/s: {quantity} "
            f"{c.measured:+.0%} measured, {c.simulated:+.0%} simulated, points apart",
            c.simulated - c.measured,
            bound,
        )
        assert abs(off) <= bound


def prompt(profile, tokens):
    return StepWork(tokens, 0, 0, prefill_attention_s(profile, tokens, 0))


def test_h100_70b_prefill_and_loaded_idle_watts(table, reached):
    model = H100.model_profile(LLAMA_70B)
    errors = {"prefill": {}, "loaded_idle": {}}
    for r in table("h100_llama70b_tp4_power_by_clock.csv"):
        clock, tokens = int(r["sm_mhz"]), int(r["batch_tokens"])
        power_w = idle_power_w(H100.power, clock, model.spinning_activity)
        if r["state"] == "prefill":
            work = prompt(model, tokens)
            ran_at = effective_sm_clock_mhz(H100, model, work, clock)
            power_w = busy_power_w(H100, model, work, ran_at)
        errors[r["state"]][clock, tokens] = power_w / r["watts_per_gpu"] - 1
    for state, found in errors.items():
        worst = max(found, key=lambda key: abs(found[key]))
        what = f"H100, 70B on four, {state}: watts at {len(found)} clocks and lengths"
        reached(f"{what}, worst ({worst[0]} MHz, {worst[1]} tokens)", found[worst], None)
        mape = reached(f"{what}, MAPE", statistics.mean(map(abs, found.values())), 0.06)
        assert mape <= 0.06


def by_phase(table):
    """What was run on the A800 -> clock -> time and energy of it, measured."""
    found = {}
    for r in table("a800_qwen3_32b_decode_by_clock.csv"):
        energy = r["attn_mj_per_layer"] + r["ffn_mj_per_layer"]
        work = StepWork(0, int(r["batch"]), 0)
        found.setdefault(work, {})[int(r["sm_mhz"])] = r["tpot_ms"], energy
    for r in table("a800_qwen3_32b_prefill_by_clock.csv"):
        energy = r["attn_mj_per_layer"] + r["ffn_mj_per_layer"]
        work = prompt(A100.model_profile(LLAMA_8B), int(r["input_len"]))
        found.setdefault(work, {})[int(r["sm_mhz"])] = r["ttft_ms"], energy
    return found


def of_step(work, clock):
    """Time and energy of a step of Llama-3.1-8B on the A100."""
    model = A100.model_profile(LLAMA_8B)
    clock = effective_sm_clock_mhz(A100, model, work, clock)
    time_s = step_time_s(model, work, clock)
    return time_s, time_s * busy_power_w(A100, model, work, clock)


def test_a800_by_phase_against_1410_mhz(table, reached):
    """Of another model, so against 1410 MHz only.

    6 of the 15 times are more than 6 points off: the measured feed-forward part of a decode step
    slows by 1.47 from 930 to 690 MHz, more than the clock does.
    """
    times, energies = {}, {}
    for work, measured in by_phase(table).items():
        what = (
            f"{work.prefill_tokens} prompt tokens"
            if work.prefill_tokens
            else (f"{work.decode_sequences} running")
        )
        for clock in (1170, 930, 690):
            for name, index, found in (("time", 0, times), ("energy", 1, energies)):
                seen = measured[clock][index] / measured[1410][index]
                said = of_step(work, clock)[index] / of_step(work, 1410)[index]
                found[what, clock] = reached(
                    f"A800, {what}, {clock} against 1410 MHz: {name} {seen - 1:+.0%} measured, "
                    f"{said - 1:+.0%} simulated, points apart",
                    said - seen,
                    0.08,
                )
    assert len(times) == 15
    assert statistics.mean(map(abs, times.values())) <= 0.05
    assert max(map(abs, times.values())) <= 0.08
    assert sum(abs(off) > 0.06 for off in times.values()) <= 6
    assert max(map(abs, energies.values())) <= 0.08
