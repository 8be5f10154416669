"""Step governors on a virtual replica: what they are handed, and that they are obeyed."""

import dataclasses

import pytest

from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import StepWork, idle_power_w, step_time_s
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.virtual.replica import FleetSetup, Listeners, VirtualReplica
from agft_ray.virtual.run import run_fleet
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

GPU = load_gpu_profile("rtx_a6000")
MODEL = GPU.models["llama-3.1-8b"]


class Recorder:
    """Always the same clocks: for steps with prefill, for decodes, and while empty."""

    name = "recorder"

    def __init__(self, prefill=1500, decode=1200, idle=600):
        self.clocks = prefill, decode, idle
        self.steps, self.observed, self.arms, self.idles = [], [], None, 0

    def choose(self, step, arms):
        self.steps.append(step)
        self.arms = arms
        return self.clocks[0] if step.prefill_tokens else self.clocks[1]

    def choose_idle(self, arms):
        self.idles += 1
        return self.clocks[2]

    def observe(self, step, *, duration_s, sm_clock_mhz):
        assert step is self.steps[-1]
        self.observed.append((duration_s, sm_clock_mhz))

    def status(self):
        return {}


def make_setup(governor, **changes):
    tuner = TunerConfig.model_validate({"policy": {"name": "default"}, **changes.pop("tuner", {})})
    return FleetSetup(
        gpu=GPU,
        model="llama-3.1-8b",
        tuner=tuner,
        governor=lambda replica: governor,
        **{"engine": EngineConfig(), "duration_s": 60.0, "seed": 1, **changes},
    )


def test_it_is_asked_before_every_step_and_told_of_every_end():
    governor = Recorder()
    totals = run_fleet(generate_conversation(1.0, 50.0, seed=2), make_setup(governor))
    engine = totals.replicas[0].engine
    assert len(governor.steps) == len(governor.observed) == engine.iterations
    assert sum(s.prefill_tokens > 0 for s in governor.steps) == engine.prefill_steps.steps
    assert sum(s.prefill_tokens + s.decode_sequences for s in governor.steps) == (
        engine.iteration_tokens
    )
    busy_s = engine.prefill_steps.time_s + engine.decode_steps.time_s
    assert sum(duration for duration, _ in governor.observed) == pytest.approx(busy_s, rel=1e-9)
    times = [step.t_s for step in governor.steps]
    assert times == sorted(times)
    assert governor.arms == GPU.supported_sm_clocks_mhz


def test_it_knows_the_step_before_unless_the_engine_was_empty():
    governor = Recorder()
    run_fleet([Request("a", 1.0, 100, 3), Request("b", 30.0, 100, 2)], make_setup(governor))
    lasts = [(step.last_step_s, step.last_sm_clock_mhz) for step in governor.steps]
    done = governor.observed
    assert lasts == [(None, None), done[0], done[1], (None, None), done[3]]
    assert governor.idles == 3  # at the start, and after each request


def test_clocks_follow_after_the_actuation_delay_and_only_changes_are_sent():
    governor = Recorder(prefill=1500, decode=1200, idle=600)
    totals = run_fleet([Request("a", 10.0, 100, 100)], make_setup(governor, duration_s=20.0))
    # At the start to 600; then 1500, 1200, and 600 again.
    assert totals.clock_changes == 4
    durations = [duration for duration, _ in governor.observed]
    clocks = [clock for _, clock in governor.observed]
    assert clocks[-90:] == [1200] * 90
    context = governor.steps[-1].context_tokens
    assert durations[-1] == pytest.approx(step_time_s(MODEL, StepWork(0, 1, context), 1200))


def test_an_empty_engine_draws_the_idle_power_of_its_clock():
    windows = []
    run_fleet([], make_setup(Recorder(idle=600)), on_window=windows.append)
    assert all(w.arm == 600 for w in windows)
    expected_j = 2.0 * idle_power_w(GPU.power, 600)
    assert [w.energy_j for w in windows[1:]] == pytest.approx([expected_j] * 29, rel=1e-9)


@pytest.mark.parametrize("kv_blocks", [600, 20_000])
def test_counted_tokens_show_it_the_very_steps_that_tokens_one_by_one_do(kv_blocks):
    engine = EngineConfig(kv_blocks=kv_blocks, max_model_len=8192)
    requests = list(generate_conversation(4.0, 40.0, seed=5))
    runs, seen, windows, answers = [], [], ([], []), ([], [])
    for jumps, rows, answered in zip((True, False), windows, answers, strict=True):
        governor = Recorder()
        setup = make_setup(governor, engine=engine, jumps=jumps)
        runs.append(
            run_fleet(
                requests,
                setup,
                on_window=rows.append,
                on_request=lambda replica, timings, answered=answered: answered.append(timings),
            )
        )
        seen.append((governor.steps, governor.observed, governor.idles))
    assert seen[0] == seen[1]
    assert answers[0] == answers[1]
    assert runs[0].energy_j == runs[1].energy_j
    for one, other in zip(*windows, strict=True):
        assert one == dataclasses.replace(
            other, itl_sum_s=pytest.approx(other.itl_sum_s, rel=1e-9, abs=1e-9)
        )
    assert (runs[0].replicas[0].engine.preemptions > 0) == (kv_blocks == 600)


def test_default_clocks_are_a_choice_and_bounds_hold():
    governor = Recorder(prefill=None, decode=None, idle=None)
    setup = make_setup(governor, tuner={"min_sm_clock_mhz": 900, "max_sm_clock_mhz": 1500})
    totals = run_fleet([Request("a", 1.0, 100, 5)], setup)
    assert totals.clock_changes == 0
    assert (governor.arms[0], governor.arms[-1]) == (900, 1500)


def test_a_governed_replica_has_no_tuner():
    replica = VirtualReplica(make_setup(Recorder()), 0, Listeners())
    assert replica.tuner is None
    replica.advance_to(1.0)
    replica.close()
