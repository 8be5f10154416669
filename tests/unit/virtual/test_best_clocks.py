"""The best clocks of a window: by hand, against every pair of clocks, and of whole runs."""

import itertools

import pytest

from agft_ray.settings import SloConfig, TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import bundled_profiles, load_gpu_profile
from agft_ray.simulation.work_done import WorkDone
from agft_ray.virtual.best_clocks import BestClocks, WindowRegret
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

PROFILES = {name: load_gpu_profile(name) for name in bundled_profiles()}
PAIRS = [(name, model) for name, profile in PROFILES.items() for model in profile.models]
A6000 = PROFILES["rtx_a6000"]
MODEL = A6000.model_profile("llama-3.1-8b")
WINDOW_S = 2.0
NO_SLO = SloConfig()

LOADS = {
    "prefill": [StepWork(1500, 0, 0, 0.03), StepWork(300, 8, 8000, 0.002), StepWork(16, 64, 10**5)],
    "decode": [StepWork(0, 1, 500), StepWork(0, 32, 40_000), StepWork(0, 200, 300_000)],
}


def cost(gpu, model, works, target):
    """Time and energy of whole steps with a clock locked, from the formulas alone."""
    time_s = energy_j = 0.0
    for work in works:
        clock = effective_sm_clock_mhz(gpu, model, work, target)
        step_s = step_time_s(model, work, clock)
        time_s += step_s
        energy_j += step_s * model.tensor_parallel * busy_power_w(gpu, model, work, clock)
    return time_s, energy_j


def ran(gpu, model, works, target, slack_s=WINDOW_S):
    """What a device says it did with steps at a clock, how long and with what energy; then it
    idles at the lowest clock."""
    done = WorkDone()
    for work in works:
        time_s, energy_j = cost(gpu, model, [work], target)
        done.add(work, 1.0, work.context_tokens, time_s, energy_j)
    duration_s = done.prefill_s + done.decode_s + slack_s
    idle_j = slack_s * idle_w(gpu, model)
    return done, duration_s, done.prefill_j + done.decode_j + idle_j


def idle_w(gpu, model):
    gpu_w = idle_power_w(gpu.power, gpu.min_sm_clock_mhz, model.spinning_activity)
    return model.tensor_parallel * gpu_w


def exhaustive(gpu, model, works, duration_s, limit):
    """The least energy of a window over all pairs of clocks within `limit(phase)` of each."""
    phases = [[w for w in works if w.prefill_tokens], [w for w in works if not w.prefill_tokens]]
    costs = [[cost(gpu, model, phase, c) for c in gpu.supported_sm_clocks_mhz] for phase in phases]
    limits_s = [limit(phase) for phase in phases]
    return min(
        p[1] + d[1] + idle_w(gpu, model) * (duration_s - p[0] - d[0])
        for p, d in itertools.product(*costs)
        if p[0] <= limits_s[0] and d[0] <= limits_s[1]
    )


def ten_percent(gpu, model):
    return lambda works: 1.1 * (1 + 1e-12) * cost(gpu, model, works, gpu.max_sm_clock_mhz)[0]


@pytest.mark.parametrize(("name", "model_name"), PAIRS)
@pytest.mark.parametrize("prefill", range(4))
@pytest.mark.parametrize("decode", range(4))
def test_no_pair_of_clocks_is_better(name, model_name, prefill, decode):
    gpu, model = PROFILES[name], PROFILES[name].models[model_name]
    works = LOADS["prefill"][:prefill] + LOADS["decode"][3 - decode :]
    found = BestClocks(gpu, model, NO_SLO).regret(*ran(gpu, model, works, gpu.max_sm_clock_mhz))
    _, duration_s, energy_j = ran(gpu, model, works, gpu.max_sm_clock_mhz)
    best_j = exhaustive(gpu, model, works, duration_s, ten_percent(gpu, model))
    assert found.best_energy_j == pytest.approx(best_j, rel=1e-9)
    assert found.regret_j == pytest.approx(energy_j - best_j, rel=1e-6, abs=1e-6)
    assert not found.is_over_bound


@pytest.mark.parametrize(("name", "model_name"), PAIRS)
@pytest.mark.parametrize("phase", LOADS)
def test_cost_falls_and_then_rises_with_the_clock(name, model_name, phase):
    """Which the search relies on, so that it may start anywhere; equal where the cap holds."""
    gpu, model = PROFILES[name], PROFILES[name].models[model_name]
    best = BestClocks(gpu, model, NO_SLO)
    for count in (1, 2, 3):
        done, _, _ = ran(gpu, model, LOADS[phase][:count], gpu.max_sm_clock_mhz)
        find = best.prefill_cost if phase == "prefill" else best.decode_cost
        costs = [find(done, clock) for clock in gpu.supported_sm_clocks_mhz]
        rises = [b.above_j > a.above_j * (1 + 1e-12) for a, b in itertools.pairwise(costs)]
        falls = [b.above_j < a.above_j * (1 - 1e-12) for a, b in itertools.pairwise(costs)]
        assert not any(falls[rises.index(True) :] if any(rises) else [])
        assert all(b.time_s <= a.time_s * (1 + 1e-12) for a, b in itertools.pairwise(costs))


def test_a_window_of_rest_has_the_regret_of_its_idle_clock():
    found = BestClocks(A6000, MODEL, NO_SLO).regret(WorkDone(), 2.0, 2.0 * 62.8)
    # 45 + 26 x 210 / 1800 W at the lowest clock.
    assert found.best_energy_j == pytest.approx(2.0 * (45 + 26 * 210 / 1800))
    assert found.regret_j == pytest.approx(2.0 * 62.8 - found.best_energy_j)
    assert not found.is_over_bound


def test_what_breaking_a_bound_saves_is_no_gain():
    works = [StepWork(1500, 0, 0, 0.03), StepWork(0, 32, 40_000)]
    best = BestClocks(A6000, MODEL, NO_SLO)
    # The lowest clock that decode can bear is too low for prefill, which is compute-bound.
    limit_s = ten_percent(A6000, MODEL)(works[1:])
    clocks = A6000.supported_sm_clocks_mhz
    clock = next(c for c in clocks if cost(A6000, MODEL, works[1:], c)[0] <= limit_s)
    slow = best.regret(*ran(A6000, MODEL, works, clock))
    assert slow.is_over_bound
    only_decode = best.regret(*ran(A6000, MODEL, works[1:], clock))
    assert not only_decode.is_over_bound
    assert slow.regret_j == pytest.approx(only_decode.regret_j)
    done, duration_s, energy_j = ran(A6000, MODEL, works, clock)
    assert energy_j - best.regret(done, duration_s, energy_j).best_energy_j < slow.regret_j


def test_an_slo_takes_the_place_of_the_ten_per_cent():
    works = LOADS["decode"][1:2]
    free = BestClocks(A6000, MODEL, SloConfig(tpot_s=10.0)).regret(*ran(A6000, MODEL, works, 2100))
    costs = [cost(A6000, MODEL, works, clock) for clock in A6000.supported_sm_clocks_mhz]
    least_j = min(j - idle_w(A6000, MODEL) * s for s, j in costs)
    _, duration_s, _ = ran(A6000, MODEL, works, 2100)
    assert free.best_energy_j == pytest.approx(idle_w(A6000, MODEL) * duration_s + least_j)
    # One that default clocks cannot keep either: they are the best there is, and keep it.
    tight = BestClocks(A6000, MODEL, SloConfig(tpot_s=1e-3))
    default = tight.regret(*ran(A6000, MODEL, works, 2100))
    assert (default.regret_j, default.is_over_bound) == (pytest.approx(0.0, abs=1e-9), False)
    assert tight.regret(*ran(A6000, MODEL, works, 1200)).is_over_bound


def test_where_a_search_starts_does_not_matter():
    one = BestClocks(A6000, MODEL, NO_SLO)
    for works in itertools.permutations([*LOADS["prefill"], *LOADS["decode"]], 2):
        window = ran(A6000, MODEL, works, 1500)
        fresh = BestClocks(A6000, MODEL, NO_SLO).regret(*window)
        again = one.regret(*window)
        assert again.best_energy_j == pytest.approx(fresh.best_energy_j, rel=1e-12)


# -- whole runs ------------------------------------------------------------------------------------


def setup_of(policy, **changes):
    return FleetSetup(
        gpu=A6000,
        model="llama-3.1-8b",
        engine=EngineConfig(),
        tuner=TunerConfig.model_validate({"policy": policy}),
        **changes,
    )


def windows_of(policy, requests, **changes):
    windows = []
    run_fleet(requests, setup_of(policy, **changes), on_window=windows.append)
    return windows


def test_a_run_in_closed_form():
    """In the last window of 8 s, a prompt of 1000 tokens and 100 tokens at 1500 MHz, then idle."""
    clock = 1500
    requests = [Request("a", 0.0, 10, 10), Request("b", 16.0, 1000, 100)]
    policy = {"name": "fixed", "sm_clock_mhz": clock}
    *_, window = windows_of(policy, requests, duration_s=24.0, grid_s=8.0)
    prefill = [StepWork(1000, 0, 0, prefill_attention_s(MODEL, 1000, 0))]
    decode = [StepWork(0, 1, 1001 + i) for i in range(99)]
    energy_j = best_j = 8.0 * idle_w(A6000, MODEL)
    busy_s = 0.0
    for works in (prefill, decode):
        limit_s = ten_percent(A6000, MODEL)(works)
        costs = [cost(A6000, MODEL, works, c) for c in A6000.supported_sm_clocks_mhz]
        above_j = [(s, j - idle_w(A6000, MODEL) * s) for s, j in costs]
        best_j += min(j for s, j in above_j if s <= limit_s)
        time_s, in_force_j = cost(A6000, MODEL, works, clock)
        energy_j += in_force_j - idle_w(A6000, MODEL) * time_s
        busy_s += time_s
    energy_j += (8.0 - busy_s) * (idle_power_w(A6000.power, clock) - idle_w(A6000, MODEL))
    assert window.ttft_sum_s + window.itl_sum_s == pytest.approx(busy_s)
    assert window.energy_j == pytest.approx(energy_j, rel=1e-9)
    assert window.best_energy_j == pytest.approx(best_j, rel=1e-9)
    assert window.regret_j == pytest.approx(energy_j - best_j, rel=1e-9)
    assert (window.busy_s, window.over_bound) == (pytest.approx(busy_s), 0)


def test_no_policy_notices_it(monkeypatch):
    def decisions():
        records = []
        requests = generate_conversation(1.0, 60.0, 3)
        setup = setup_of({"name": "agft"})
        run_fleet(requests, setup, on_record=lambda replica, record: records.append(record))
        return records

    before = decisions()
    nonsense = WindowRegret(1e9, 1e9, True)
    monkeypatch.setattr(BestClocks, "regret", lambda *window: nonsense)
    assert decisions() == before


@pytest.mark.parametrize("jumps", [True, False])
def test_jumps_do_not_change_it(jumps):
    requests = list(generate_conversation(1.0, 60.0, 3))
    windows = windows_of({"name": "agft"}, requests, jumps=jumps)
    reference = windows_of({"name": "agft"}, requests, jumps=True)
    for one, other in zip(windows, reference, strict=True):
        assert one.best_energy_j == pytest.approx(other.best_energy_j, rel=1e-9)
        assert one.regret_j == pytest.approx(other.regret_j, abs=1e-6)
        assert one.over_bound == other.over_bound
