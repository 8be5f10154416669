"""Plans of several clocks on a virtual replica: followed as the engine works, and at what cost."""

import pytest

from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import StepWork, idle_power_w, step_time_s
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import Plan
from agft_ray.virtual.replica import FleetSetup, Listeners, VirtualReplica
from agft_ray.virtual.run import run_fleet
from agft_ray.virtual.switched import CALL_DELAY_S
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

GPU = load_gpu_profile("rtx_a6000")
MODEL = GPU.models["llama-3.1-8b"]
PLAN = Plan(1500, 1200, 600)


def make_setup(plan=PLAN, **changes):
    prefill, decode, idle = plan.arms
    policy = {"name": "pair", "prefill_sm_clock_mhz": prefill, "decode_sm_clock_mhz": decode}
    tuner = {"policy": policy | {"idle_sm_clock_mhz": idle or "default"}}
    return FleetSetup(
        gpu=GPU,
        model="llama-3.1-8b",
        tuner=TunerConfig.model_validate(tuner | changes.pop("tuner", {})),
        **{"engine": EngineConfig(), "duration_s": 60.0, "seed": 1, **changes},
    )


class Watched:
    """A replica whose GPU's calls are noted, with their times."""

    def __init__(self, setup):
        self.replica = VirtualReplica(setup, 0, Listeners())
        gpu, clock, self.calls = self.replica._gpu, self.replica.clock, []
        lock, reset = gpu.lock, gpu.reset

        def noted_lock(arm):
            self.calls.append((clock.now_s(), arm))
            lock(arm)

        def noted_reset():
            self.calls.append((clock.now_s(), None))
            reset()

        gpu.lock, gpu.reset = noted_lock, noted_reset

    def run(self, requests, until_s):
        for request in requests:
            self.replica.advance_to(request.arrival_s)
            self.replica.submit(request)
        self.replica.advance_to(until_s)
        return self


def test_the_gpu_is_called_a_moment_after_each_change():
    requests = [Request("a", 0.5, 400, 100), Request("b", 20.0, 400, 50)]
    calls = Watched(make_setup()).run(requests, 40.0).calls
    second = [(t_s, arm) for t_s, arm in calls if t_s >= 20.0]
    assert [arm for _, arm in second] == [1500, 1200, 600]
    (up_s, _), (down_s, _), (idle_s, _) = second
    assert up_s == pytest.approx(20.0 + CALL_DELAY_S)
    prefill_s = step_time_s(MODEL, StepWork(400, 0, 0), 600)
    assert up_s < down_s < 20.0 + prefill_s + 2 * CALL_DELAY_S
    decode_s = step_time_s(MODEL, StepWork(0, 1, 400), 1200)
    assert idle_s - down_s == pytest.approx(49 * decode_s, rel=0.05)


def test_a_prompt_that_arrives_in_the_middle_of_decoding_has_its_clock_before_its_step():
    requests = [Request("a", 5.0, 100, 400), Request("b", 10.0, 400, 10)]
    calls = Watched(make_setup()).run(requests, 11.0).calls
    between = [call for call in calls if 10.0 <= call[0] <= 11.0]
    assert [arm for _, arm in between] == [1500, 1200]
    assert between[0][0] == pytest.approx(10.0 + CALL_DELAY_S)


def test_series_are_jumped_over_with_the_same_result():
    requests = list(generate_conversation(1.0, 60.0, seed=4))
    runs, windows = [], ([], [])
    for jumps, rows in zip((True, False), windows, strict=True):
        runs.append(run_fleet(requests, make_setup(jumps=jumps), on_window=rows.append))
    assert runs[0].energy_j == pytest.approx(runs[1].energy_j, rel=1e-9)
    assert runs[0].clock_changes == runs[1].clock_changes > 60
    for one, other in zip(*windows, strict=True):
        assert one.energy_j == pytest.approx(other.energy_j, rel=1e-9)
        assert (one.itl_count, one.arm) == (other.itl_count, other.arm)


def test_an_empty_engine_has_the_idle_clock_at_once_and_draws_its_power():
    windows = []
    run_fleet([Request("a", 0.5, 100, 200)], make_setup(), on_window=windows.append)
    late = [window for window in windows if window.start_s >= 10.0]
    assert {window.arm for window in late} == {600}
    assert [w.energy_j for w in late] == pytest.approx([2.0 * idle_power_w(GPU.power, 600)] * 25)


def test_windows_within_a_plan_are_evidence_and_know_it():
    records = []
    requests = list(generate_conversation(1.0, 60.0, seed=4))
    run_fleet(requests, make_setup(), on_record=lambda replica, record: records.append(record))
    assert [record.note for record in records if record.window is None] == []
    windows = [record.window for record in records]
    assert {window.plan for window in windows[4:]} == {PLAN}
    assert {window.arm for window in windows[4:]} == {1200}


def test_with_one_clock_for_all_steps_nothing_is_switched_but_the_idle_clock():
    requests = list(generate_conversation(1.0, 60.0, seed=4))  # without pressure
    one = run_fleet(requests, make_setup(Plan(1200, 1200, 1200)))
    fixed = make_setup(tuner={"policy": {"name": "fixed", "sm_clock_mhz": 1200}})
    assert one.energy_j == run_fleet(requests, fixed).energy_j
    assert one.clock_changes == 1


def test_a_holdout_and_observe_switch_nothing():
    requests = list(generate_conversation(2.0, 30.0, seed=4))
    for tuner in ({"holdout_replicas": 1}, {"mode": "observe"}):
        assert run_fleet(requests, make_setup(tuner=tuner)).clock_changes == 0
