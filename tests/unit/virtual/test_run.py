"""The real loop, policies and engine together, in virtual time."""

import numpy as np
import pytest

from agft_ray.gpu.simulated import InMemoryGpu
from agft_ray.settings import TunerConfig
from agft_ray.simulation.physics import StepWork, effective_sm_clock_mhz, step_time_s
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.virtual.run import run_virtual
from agft_ray.workloads.generators import generate_conversation

DURATION_S = 600.0


@pytest.fixture(scope="module")
def requests():
    return list(generate_conversation(0.5, DURATION_S, seed=3))


def run(requests, policy, **changes):
    config = TunerConfig(policy=policy, **changes)
    return run_virtual(requests, config, duration_s=DURATION_S, seed=1)


@pytest.fixture(scope="module")
def default(requests):
    return run(requests, {"name": "default"})


def mean_tpot_s(result):
    return np.mean([t.tpot_s for t in result.timings if t.tpot_s is not None])


def test_nothing_is_lost_and_windows_account_for_the_tokens(requests, default):
    assert len(default.timings) == len(requests)
    assert default.final.generation_tokens == sum(r.output_tokens for r in requests)
    windows = [record.window for record in default.records if record.window]
    covered = sum(window.duration_s for window in windows) / default.duration_s
    counted = sum(window.generation_tokens for window in windows)
    assert counted == pytest.approx(covered * default.final.generation_tokens, rel=0.05)
    energy_j = sum(window.energy_j for window in windows)
    assert energy_j == pytest.approx(covered * default.energy_j, rel=0.02)


def test_the_same_arguments_give_the_same_run(requests):
    first, second = (run(requests[:60], {"name": "agft", "seed": 5}) for _ in range(2))
    assert first.energy_j == second.energy_j
    assert first.records == second.records


def test_a_fixed_clock_saves_what_the_physics_says(requests, default):
    fixed = run(requests, {"name": "fixed", "sm_clock_mhz": 1230})
    # A sketch of this load and card had -44.7 %, with decode that slows less.
    assert fixed.energy_j / default.energy_j - 1 == pytest.approx(-0.447, abs=0.03)
    gpu = load_gpu_profile("rtx_a6000")
    model = gpu.model_profile("llama-3.1-8b")

    def slower(work):
        times_s = [
            step_time_s(model, work, effective_sm_clock_mhz(gpu, model, work, clock))
            for clock in (1230, gpu.max_sm_clock_mhz)
        ]
        return times_s[0] / times_s[1]

    # Answers wait for decode steps of a few sequences, and for the prompts that come between.
    decode, prompt = slower(StepWork(0, 2, 2 * 1200)), slower(StepWork(1000))
    assert decode < mean_tpot_s(fixed) / mean_tpot_s(default) < prompt


@pytest.mark.parametrize("policy", [{"name": "fixed", "sm_clock_mhz": 1230}, {"name": "default"}])
def test_a_policy_that_learns_nothing_is_read_less_with_the_same_result(
    requests, policy, monkeypatch
):
    read = [InMemoryGpu.read, []]
    monkeypatch.setattr(InMemoryGpu, "read", lambda gpu: read[1].append(0) or read[0](gpu))
    fewer, few = run(requests, policy), len(read[1])
    monkeypatch.setattr("agft_ray.virtual.replica.StaticPolicy", type(None))
    more = run(requests, policy)
    assert few < (len(read[1]) - few) / 4
    assert fewer.energy_j == pytest.approx(more.energy_j, rel=1e-9)
    assert fewer.clock_changes == more.clock_changes
    assert [r.decision for r in fewer.records] == [r.decision for r in more.records]
    for one, other in zip(fewer.timings, more.timings, strict=True):
        assert (one.ttft_s, one.e2e_s) == pytest.approx((other.ttft_s, other.e2e_s), rel=1e-9)


def test_agft_learns_to_save_energy_from_nothing(requests, default):
    learned = run(requests, {"name": "agft"})
    assert learned.energy_j < 0.75 * default.energy_j
    assert mean_tpot_s(learned) < 1.35 * mean_tpot_s(default)
    late = [r.decision.arm for r in learned.records[-50:] if r.decision.reason == "exploit"]
    assert all(arm is not None and 800 < arm < 1600 for arm in late)


def test_observe_changes_nothing(requests, default):
    observed = run(requests, {"name": "agft"}, mode="observe")
    # To rounding: a series of steps is cut where the loop looks.
    assert len(observed.timings) == len(default.timings)
    for one, other in zip(observed.timings, default.timings, strict=True):
        assert one.request_id == other.request_id
        assert (one.ttft_s, one.e2e_s) == pytest.approx((other.ttft_s, other.e2e_s), rel=1e-9)
    assert observed.clock_changes == 0


def test_an_slo_that_nothing_meets_ends_in_default_clocks(requests):
    config = TunerConfig(policy={"name": "agft"}, slo={"tpot_s": 0.001})
    result = run_virtual(requests[:40], config, seed=1)
    reasons = {record.decision.reason for record in result.records}
    assert "cooldown" in reasons
