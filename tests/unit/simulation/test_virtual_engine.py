"""Virtual time: exact step times, clock changes in mid-step, determinism."""

import pytest

from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

STEP_S = 0.25


class ConstantDevice:
    """Every step takes STEP_S; `end_s` may be moved while one runs."""

    def __init__(self):
        self.t_s, self.end_s, self.starts = 0.0, None, []

    def begin_step(self, t_s, work):
        self.t_s = max(t_s, self.t_s)
        self.starts.append(self.t_s)
        self.end_s = self.t_s + STEP_S
        return self.end_s

    def step_end_s(self):
        return self.end_s

    def finish_step(self):
        self.t_s, self.end_s = self.end_s, None
        return self.t_s


def make_batching():
    return BatchingEngine(EngineConfig(kv_blocks=1000), lambda tokens, offset: 0.0)


@pytest.fixture
def device():
    return ConstantDevice()


@pytest.fixture
def finished():
    return []


@pytest.fixture
def engine(device, finished):
    return VirtualEngine(make_batching(), device, finished.append)


def test_steps_follow_each_other_and_idle_gaps_are_skipped(engine, device, finished):
    engine.submit([Request("b", 3.0, 10, 1), Request("a", 1.0, 10, 3)])
    engine.run_until(10.0)
    assert device.starts == [1.0, 1.25, 1.5, 3.0]
    assert engine.drained
    assert [(t.request_id, t.ttft_s, t.e2e_s) for t in finished] == [
        ("a", STEP_S, 3 * STEP_S),
        ("b", STEP_S, STEP_S),
    ]


def test_a_step_in_progress_stays_so_and_may_be_retimed(engine, device, finished):
    engine.submit([Request("a", 0.0, 10, 1)])
    engine.run_until(0.125)
    assert not engine.drained
    assert engine.sample(0.125).running == 1
    device.end_s = 0.75
    engine.run_until(0.5)
    assert not finished
    engine.run_until(0.75)
    assert engine.drained
    assert finished[0].e2e_s == 0.75
    assert engine.sample(0.75).prefill_steps.time_s == 0.75


def test_a_request_submitted_late_is_not_served_in_the_past(engine, device):
    engine.run_until(5.0)
    engine.submit([Request("a", 4.0, 10, 1)])
    engine.run_until(6.0)
    assert device.starts == [5.0]


def test_an_aborted_step_still_has_to_end(device):
    batching = make_batching()
    engine = VirtualEngine(batching, device)
    engine.submit([Request("a", 0.0, 10, 1)])
    engine.run_until(0.1)
    batching.abort("a")
    assert not engine.drained
    engine.run_until(STEP_S)
    assert engine.drained


def run_on_gpu(window_s):
    gpu = load_gpu_profile("rtx_a6000")
    model = next(iter(gpu.models.values()))
    timings, device = [], Device(gpu, model, seed=1)
    config = EngineConfig(kv_blocks=1000)
    engine = VirtualEngine(BatchingEngine(config, lambda *_: 0.0), device, timings.append)
    engine.submit(generate_conversation(1.0, 20.0, seed=3))
    t_s = 0.0
    while not engine.drained:
        t_s += window_s
        engine.run_until(t_s)
    return timings


def test_results_do_not_depend_on_how_often_time_is_looked_at():
    coarse, fine = run_on_gpu(1000.0), run_on_gpu(0.8)
    assert len(coarse) >= 10
    assert [t.request_id for t in coarse] == [t.request_id for t in fine]
    for one, other in zip(coarse, fine, strict=True):
        assert one.ttft_s == pytest.approx(other.ttft_s, rel=1e-12)
        assert one.e2e_s == pytest.approx(other.e2e_s, rel=1e-12)
