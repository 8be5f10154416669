"""Predicted latencies, by hand and against the simulator."""

import numpy as np
import pytest

from agft_ray.policy.baselines.default import DefaultConfig
from agft_ray.policy.baselines.pair import PairConfig
from agft_ray.policy.phases.latency import LatencyModel, Slowdowns, left_of_switch_s
from agft_ray.policy.phases.load import SIZE, Load, load_of, totals_of
from agft_ray.policy.phases.step_time import fit
from agft_ray.policy.phases.work import WorkSums, decode_work, key_of, prefill_work
from agft_ray.study.policy_specs import PolicySpec
from agft_ray.study.run import fleet_setup
from agft_ray.study.scenario import Scenario
from agft_ray.virtual.run import run_fleet

PAIR = PairConfig(prefill_sm_clock_mhz=1500, decode_sm_clock_mhz=1200)
SWITCH_S = 0.03


def load(**changes):
    values = {
        "idle": 0.2, "prefill": 0.1, "decode": 0.7, "prefill_step_s": 0.2, "prompt_s": 0.2,
        "prefill_slowdown": 1.0, "prefill_spread": 1.5, "decode_step_s": 0.025,
        "decode_slowdown": 1.0, "interference": 0.12, "others": 1.0, "growth": 0.05,
        "ttft_s": 0.25, "tpot_s": 0.027, "e2e_s": 5.0, "requests_per_s": 0.5,
    }  # fmt: skip
    return Load(**(values | changes))


def slowdowns(prefill, decode, decode_lag=0.0, idle_lag=0.0):
    return Slowdowns(*(np.array([each]) for each in (prefill, decode, decode_lag, idle_lag)))


def test_default_clocks_are_the_measure():
    ratios = LatencyModel(load(), SWITCH_S).ratios(slowdowns(1, 1))
    assert ratios.ttft[0] == ratios.tpot[0] == ratios.e2e[0] == pytest.approx(1)


def test_without_prefill_or_others_tpot_is_the_step():
    model = LatencyModel(load(interference=0.0, growth=0.0), SWITCH_S)
    assert model.ratios(slowdowns(1.3, 1.08)).tpot[0] == pytest.approx(1.08)


def test_a_batch_that_grows_slows_itself():
    """r = r0 (1 + g (r - 1)), at its fixed point."""
    model = LatencyModel(load(interference=0.0, growth=0.3), SWITCH_S)
    assert model.ratios(slowdowns(1, 1.06)).tpot[0] == pytest.approx(
        1.06 * 0.7 / (1 - 0.3 * 1.06), abs=2e-3
    )


def test_the_lag_of_the_clock_is_part_of_ttft():
    model = LatencyModel(load(), SWITCH_S)
    without, idle = (model.ratios(slowdowns(1, 1, 0, lag)).ttft[0] for lag in (0.0, 0.8))
    base_s = 0.2 + 0.2 * 1.5 * 0.1 / (2 * 0.9) + 0.7 * 0.025 / 2
    assert idle - without == pytest.approx(0.2 * SWITCH_S * 0.8 / base_s)


def test_what_is_left_of_a_change_when_the_step_is_over():
    assert left_of_switch_s(0.0, 0.03) == 0.03
    assert left_of_switch_s(0.02, 0.03) == pytest.approx(0.02)
    assert left_of_switch_s(0.06, 0.03) == pytest.approx(0.03**2 / 0.12)


def simulated(policy, rate):
    """Mean TTFT and TPOT of all requests, and all windows."""
    scenario = Scenario(workload="conversation", rate_per_s=rate, duration_s=900.0)
    timings, windows = [], []
    run_fleet(
        scenario.requests(0),
        fleet_setup(scenario, PolicySpec("x", policy), 0),
        on_request=lambda _, each: timings.append(each),
        on_record=lambda _, record: windows.append(record.window),
        workers=1,
    )
    tpot = [(t.e2e_s - t.ttft_s) / (t.output_tokens - 1) for t in timings if t.output_tokens > 1]
    return np.mean([t.ttft_s for t in timings]), np.mean(tpot), [w for w in windows if w]


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_tpot_and_ttft_of_a_pair_as_simulated(rate):
    ttft_s, tpot_s, windows = simulated(DefaultConfig(), rate)
    pair_ttft_s, pair_tpot_s, pair_windows = simulated(PAIR, rate)
    prefill, decode, sums = WorkSums(), WorkSums(), np.zeros(SIZE)
    for window in windows + pair_windows:
        for to, totals, work, arm in (
            (prefill, window.prefill_steps, prefill_work(window), window.plan.prefill),
            (decode, window.decode_steps, decode_work(window), window.plan.decode),
        ):
            if totals.steps:
                to.add(key_of(arm), work, totals.time_s, totals.steps)
    for window in windows:
        sums += totals_of(window)
    models = [fit(each, 2100.0, 2) for each in (prefill, decode)]
    slow = [
        model.expected(np.array([clock])) for model, clock in zip(models, (1500, 1200), strict=True)
    ]
    zero = np.zeros(1)  # what the clock's lag costs is in the steps measured
    ratios = LatencyModel(load_of(sums, *models), SWITCH_S).ratios(Slowdowns(*slow, zero, zero))
    assert ratios.tpot[0] == pytest.approx(pair_tpot_s / tpot_s, rel=0.015)
    assert ratios.ttft[0] == pytest.approx(pair_ttft_s / ttft_s, rel=0.03)
