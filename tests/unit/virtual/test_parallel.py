"""A fleet over several processes against the same fleet in one: equal to the last bit."""

import functools

import pytest

from agft_ray.policy.baselines.volta import VoltaConfig, VoltaGovernor
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.virtual import parallel
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

AGFT_ALONE = {"policy": {"name": "agft"}, "share_experience": False}
PAIR = {"name": "pair", "prefill_sm_clock_mhz": 1470, "decode_sm_clock_mhz": 1230}
HELD_OUT = {"policy": {"name": "fixed", "sm_clock_mhz": 1230}, "holdout_replicas": 1}


def governor(replica):
    return VoltaGovernor(VoltaConfig(tpot_slo_s=0.05, ttft_slo_s=1.0))


def make_setup(tuner, **changes):
    return FleetSetup(
        gpu=load_gpu_profile("rtx_a6000"),
        model="llama-3.1-8b",
        engine=EngineConfig(),
        tuner=TunerConfig.model_validate(tuner),
        seed=3,
        **{"replicas": 5, "duration_s": 60.0, **changes},
    )


def run(requests, setup, workers):
    """The totals, and all that was told, in order."""
    told = []
    totals = run_fleet(
        requests,
        setup,
        workers=workers,
        on_request=lambda replica, timings: told.append((replica, timings)),
        on_window=told.append,
        on_record=lambda replica, record: told.append((replica, record)),
    )
    return totals, told


@pytest.mark.parametrize(
    ("tuner", "changes"),
    [
        (HELD_OUT, {}),
        (HELD_OUT, {"noise": True}),
        (AGFT_ALONE, {"replicas": 4, "router": "round_robin"}),
        ({"policy": PAIR}, {}),
        ({"policy": {"name": "default"}}, {"governor": governor}),
    ],
)
def test_a_fleet_comes_to_the_same_in_several_processes(tuner, changes, monkeypatch):
    monkeypatch.setattr(parallel, "ROUND_REQUESTS", 50)
    requests = list(generate_conversation(5.0, 50.0, seed=4))
    requests.append(Request("too long", 50.0, 100_000, 1))
    setup = make_setup(tuner, **changes)
    one, three = (run(iter(requests), setup, workers) for workers in (1, 3))
    assert one == three
    assert one[0].rejected == 1


def test_an_empty_fleet_lasts_as_long_as_it_should():
    setup = make_setup(HELD_OUT, duration_s=5.0)
    assert run([], setup, 1) == run([], setup, 2)


def test_replicas_that_share_experience_stay_in_one_process(monkeypatch):
    monkeypatch.setattr("agft_ray.virtual.run.Workers", pytest.fail)
    setup = make_setup(AGFT_ALONE | {"share_experience": True}, duration_s=5.0)
    assert run_fleet([], setup, workers=2).duration_s == 6.0


def test_what_a_callback_raises_ends_the_processes():
    started = []

    class Kept(parallel.Workers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.extend(self._processes)

    def raise_it(replica, timings):
        raise KeyError(replica)

    requests = generate_conversation(5.0, 20.0, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agft_ray.virtual.run.Workers", Kept)
        with pytest.raises(KeyError):
            run_fleet(requests, make_setup(HELD_OUT), workers=2, on_request=raise_it)
    assert [process.is_alive() for process in started] == [False, False]


def test_what_goes_wrong_in_a_process_is_raised_here():
    setup = make_setup(HELD_OUT, governor=functools.partial(_fails, "oh"))
    with pytest.raises(ValueError, match="oh"):
        run_fleet([], setup, workers=2)


def _fails(message, replica):
    raise ValueError(message)
