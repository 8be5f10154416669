"""A tuner's figures for people: the keys of its status are an interface, and their absence too."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from agft_ray.actors.tuner_status import (
    window_figures,
    with_engine,
    with_gpu,
    with_serve,
    with_tuner,
)
from agft_ray.replay.result import ReplicaStatus
from agft_ray.telemetry.energy_weight import EnergyWeight
from agft_ray.telemetry.status import TunerState, TunerStatus
from agft_ray.types import Actuator, Mode, Plan, ServeWindow

STARTING = TunerStatus(
    rank=None,
    role="tuned",
    mode="control",
    state="starting",
    reason="",
    tuner_pid=7,
    guard_pid=None,
    windows=0,
    restored_windows=0,
    loop_cpu_s=0.5,
)
OF_THE_STORE = {"replica", "alive"}
OF_THE_SIMULATED_SERVER = {"steps", "late_steps", "max_lateness_s"}


def gpu(actuator=Actuator.SM_CLOCK):
    return SimpleNamespace(uuid="GPU-1", model="A6000", actuator=actuator)


def added(status):
    """The names of what is known beside what a tuner knows from the beginning."""
    return status.as_dict().keys() - STARTING.as_dict().keys()


def test_what_is_not_known_is_not_there_and_none_is():
    assert STARTING.as_dict() == {
        "rank": None,
        "role": "tuned",
        "mode": "control",
        "state": "starting",
        "reason": "",
        "tuner_pid": 7,
        "guard_pid": None,
        "windows": 0,
        "restored_windows": 0,
        "loop_cpu_s": 0.5,
    }


def test_of_the_loop():
    tuner = SimpleNamespace(
        state=TunerState.HELD,
        control=SimpleNamespace(
            reason="",
            reset_due=True,
            changes=3,
            phase_changes=2,
            phase_changes_put_off=1,
            plan=Plan(1500, 1230, 210),
            timer=SimpleNamespace(median_s=0.025),
        ),
        fault="a fault",
        mode=Mode.OBSERVE,
        policy=SimpleNamespace(name="agft"),
        gpu=gpu(),
        energy_weight=EnergyWeight(1.0, "away"),
    )
    status = with_tuner(STARTING, tuner, None).as_dict()
    assert type(status["state"]) is str
    assert (status["state"], status["mode"], status["reason"]) == ("held", "observe", "a fault")
    assert status.keys() - STARTING.as_dict().keys() == {
        "policy",
        "gpu_uuid",
        "gpu_model",
        "actuator",
        "clock_changes",
        "phase_changes",
        "phase_changes_put_off",
        "clock_change_s",
        "plan",
        "reset_due",
        "energy_weight",
        "energy_weight_problem",
        "last_reward",
        "last_decision",
        "last_note",
        "last_window",
    }
    assert (status["last_reward"], status["last_note"]) == (None, "")
    assert (status["clock_changes"], status["plan"]) == (3, (1500, 1230, 210))
    assert status["clock_change_s"] == 0.025


def test_of_serves_metrics_where_they_are_fresh():
    assert with_serve(STARTING, None) == STARTING
    window = ServeWindow(request_rate_per_s=2.0, mean_latency_s=None, in_flight=3.0, age_s=0.5)
    status = with_serve(STARTING, window).as_dict()
    assert {name: figure for name, figure in status.items() if name.startswith("serve_")} == {
        "serve_request_rate_per_s": 2.0,
        "serve_latency_s": None,
        "serve_in_flight": 3.0,
        "serve_metrics_age_s": 0.5,
    }


@pytest.mark.parametrize(
    ("actuator", "locked"),
    [(Actuator.SM_CLOCK, "locked_sm_clock_mhz"), (Actuator.POWER_LIMIT, "power_limit_w")],
)
@pytest.mark.parametrize("arm", [None, 1230])
def test_of_the_gpu_by_what_is_set(actuator, locked, arm, make_gpu_sample):
    sample = replace(make_gpu_sample(1.0), locked=arm)
    status = with_gpu(STARTING, sample, gpu(actuator))
    assert status.as_dict()[locked] == arm
    assert added(status) == {
        "t_s",
        "energy_j",
        "energy_t_s",
        "energy_source",
        "power_w",
        "power_source",
        "sm_clock_mhz",
        locked,
    }


def test_of_the_engine(make_engine_sample):
    status = with_engine(STARTING, make_engine_sample(5.0, running=2, e2e_count=9))
    assert (status.running, status.requests, status.engine_t_s) == (2, 9, 5.0)
    assert added(status) == {
        "running",
        "waiting",
        "prompt_tokens",
        "generation_tokens",
        "requests",
        "engine_t_s",
    }


def test_what_replay_reads_is_what_a_tuner_says():
    said = {figure.name for figure in fields(TunerStatus)}
    assert ReplicaStatus.model_fields.keys() - said == OF_THE_STORE | OF_THE_SIMULATED_SERVER


def test_a_window_says_between_which_moments_it_counted(make_window):
    window = make_window(
        start_s=10.0, end_s=12.0, prompt_tokens=80, generation_tokens=30, ttft_count=2, e2e_count=1
    )
    figures = window_figures(window)
    assert (figures["start_s"], figures["end_s"]) == (10.0, 12.0)
    assert (figures["prompt_tokens"], figures["generation_tokens"]) == (80, 30)
    assert (figures["first_tokens"], figures["requests"]) == (2, 1)
