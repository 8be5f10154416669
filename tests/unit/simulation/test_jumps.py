"""Jumping over series of decode steps against running them one by one."""

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agft_ray.simulation.decode_series import Progression, decode_curve
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import bundled_profiles, load_gpu_profile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.workloads.requests import Request

PROFILES = {name: load_gpu_profile(name) for name in bundled_profiles()}
PAIRS = [(name, model) for name, profile in PROFILES.items() for model in profile.models]
END_S = 60.0


def capped(profile, cap_w):
    """The same GPU with another power cap."""
    return profile.model_copy(update={"power": profile.power.model_copy(update={"cap_w": cap_w})})


@pytest.mark.parametrize(("name", "model_name"), PAIRS)
@pytest.mark.parametrize("sequences", [1, 7, 128])
def test_step_time_and_energy_are_affine_in_the_context(name, model_name, sequences):
    gpu, model = PROFILES[name], PROFILES[name].models[model_name]
    for clock in (gpu.min_sm_clock_mhz, gpu.power.knee_sm_clock_mhz, gpu.max_sm_clock_mhz):
        curve = decode_curve(gpu, model, sequences, clock)
        for context in (1, 5_000, 123_456):
            work = StepWork(0, sequences, context)
            time_s = step_time_s(model, work, clock)
            energy_j = time_s * busy_power_w(gpu, model, work, clock)
            assert curve.durations_s(context).first == pytest.approx(time_s, rel=1e-11)
            assert curve.energies_j(context).first == pytest.approx(energy_j, rel=1e-11)


@given(
    first=st.floats(1e-3, 1.0),
    growth=st.floats(0.0, 1e-3),
    most=st.integers(0, 2000),
    share=st.floats(0.0, 1.2),
)
def test_how_many_terms_fit(first, growth, most, share):
    progression = Progression(first, growth)
    limit = share * progression.total(most)
    sums, fit = 0.0, 0
    while fit < most and sums + progression.at(fit) <= limit * (1 + 1e-12):
        sums += progression.at(fit)
        fit += 1
    count = progression.count_within(limit, most)
    assert count in (fit, fit - 1) if abs(sums - limit) < 1e-9 else count == fit
    assert progression.total(count) == pytest.approx(
        sum(progression.at(i) for i in range(count)), rel=1e-12
    )


class Run:
    """A workload on one GPU, looked at and re-clocked at times drawn from a seed."""

    def __init__(self, profile, model_name, requests, config, seed, *, jumps, history=None):
        model = profile.models[model_name]
        self.device = Device(profile, model, seed=seed, history=history)
        core = BatchingEngine(config, lambda n, k: prefill_attention_s(model, n, k))
        self.timings, self.samples, self.readings = [], [], []
        engine = VirtualEngine(core, self.device, self.timings.append, jumps=jumps)
        engine.submit(requests)
        draw, t_s = random.Random(seed), 0.0
        while t_s < END_S or not engine.drained:
            t_s += draw.choice([0.01, 0.05, 0.25, 1.7])
            engine.run_until(t_s)
            self.readings.append(self.device.read(t_s))
            self.samples.append(engine.sample(t_s))
            action = draw.random()
            if action < 0.15:
                self.device.lock(t_s, draw.choice(profile.supported_sm_clocks_mhz))
            elif action < 0.2:
                self.device.reset(t_s)


def values(item):
    """All numbers in a frozen value, nested ones too."""
    return [
        number
        for field in dataclasses.fields(item)
        for number in (
            values(getattr(item, field.name))
            if dataclasses.is_dataclass(getattr(item, field.name))
            else [getattr(item, field.name)]
        )
    ]


def assert_same(one, other):
    """Whole numbers and words exactly, others to 1e-9."""
    for a, b in zip(values(one), values(other), strict=True):
        if isinstance(a, float):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-9)
        else:
            assert a == b


def assert_equal_runs(jumped, stepped):
    assert len(jumped.timings) == len(stepped.timings)
    for pairs in (
        zip(jumped.timings, stepped.timings, strict=True),
        zip(jumped.samples, stepped.samples, strict=True),
        zip(jumped.readings, stepped.readings, strict=True),
    ):
        for one, other in pairs:
            assert_same(one, other)
    assert jumped.device.energy_j == pytest.approx(stepped.device.energy_j, rel=1e-9)
    assert jumped.device.sm_clock_mhz_s == pytest.approx(stepped.device.sm_clock_mhz_s, rel=1e-9)


def workload(seed, rate_per_s, longest, prefixes=0):
    """Random requests; with `prefixes`, so many different beginnings, each with one of two ends."""
    draw, t_s = random.Random(seed), 0.0
    requests = []
    while t_s < END_S / 2:
        t_s += draw.expovariate(rate_per_s)
        prompt, output = draw.randint(1, longest), draw.randint(1, longest // 2)
        ids = (draw.randint(1, prefixes), draw.randint(100, 101)) if prefixes else ()
        requests.append(Request(str(len(requests)), t_s, prompt, output, ids))
    return requests


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    pair=st.sampled_from(PAIRS),
    rate_per_s=st.sampled_from([0.3, 1.0, 4.0]),
    longest=st.sampled_from([20, 300, 1000]),
    max_num_seqs=st.sampled_from([2, 6, 64]),
    kv_blocks=st.sampled_from([100, 300, 5000]),
    share=st.sampled_from([0.0, 0.4]),
    cap_share=st.sampled_from([1.0, 0.75, 0.5]),
    prefixes=st.sampled_from([0, 3]),
)
@example(1, PAIRS[0], 4.0, 1000, 64, 100, 0.0, 1.0, 0)  # preemptions
@example(1, PAIRS[0], 4.0, 1000, 64, 120, 0.0, 1.0, 3)  # prefixes found and evicted
def test_jumps_change_nothing(
    seed, pair, rate_per_s, longest, max_num_seqs, kv_blocks, share, cap_share, prefixes
):
    name, model_name = pair
    profile = capped(PROFILES[name], PROFILES[name].power.cap_w * cap_share)
    config = EngineConfig(
        kv_blocks=kv_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=256,
        max_model_len=1600,
        prefix_hit_share=share,
    )
    requests = workload(seed, rate_per_s, longest, prefixes)
    runs = [
        Run(profile, model_name, requests, config, seed, jumps=jumps) for jumps in (True, False)
    ]
    assert_equal_runs(*runs)
    assert len(runs[0].timings) == len(requests)


def test_the_hard_cases_do_occur():
    requests = workload(1, 4.0, 1000)
    config = EngineConfig(
        kv_blocks=100, max_num_seqs=64, max_num_batched_tokens=256, max_model_len=1600
    )
    run = Run(PROFILES["rtx_a6000"], "llama-3.1-8b", requests, config, 1, jumps=True)
    assert run.samples[-1].preemptions > 0
    profile = capped(PROFILES["a100_sxm_80gb"], 190.0)
    model = profile.models["llama-3.1-8b"]
    clocks = {
        effective_sm_clock_mhz(profile, model, StepWork(0, 16, context), 1410)
        for context in range(0, 200_000, 1000)
    }
    assert len(clocks) > 1  # the cap's clock depends on the context


def test_a_series_in_which_the_capped_clock_moves():
    profile = capped(PROFILES["a100_sxm_80gb"], 190.0)
    model = profile.models["llama-3.1-8b"]
    jumped, stepped = Device(profile, model), Device(profile, model)
    t_s, done, context = 0.0, 0, 16_000
    while done < 8000:
        steps, t_s = jumped.run_series(t_s, StepWork(0, 16, context + 16 * done), 8000 - done, 1e9)
        done += steps
    for step in range(8000):
        stepped.begin_step(stepped.t_s, StepWork(0, 16, context + 16 * step))
        stepped.finish_step()
    assert t_s == pytest.approx(stepped.t_s, rel=1e-9)
    assert jumped.energy_j == pytest.approx(stepped.energy_j, rel=1e-9)
    assert jumped.sm_clock_mhz_s == pytest.approx(stepped.sm_clock_mhz_s, rel=1e-9)
    assert_same(jumped.read(300.0), stepped.read(300.0))


def test_a_series_stops_before_a_pending_clock_change():
    device = Device(PROFILES["rtx_a6000"], PROFILES["rtx_a6000"].models["llama-3.1-8b"])
    step_s = device.begin_step(0.0, StepWork(0, 4, 1000))
    device.finish_step()
    device.lock(9.5 * step_s, 1005)
    change_s = device.to_state()["pending_clock_changes"][0][0]
    steps, end_s = device.run_series(device.t_s, StepWork(0, 4, 1000), 100, 10.0)
    assert steps < 3
    assert change_s - step_s < end_s <= change_s
    device.begin_step(end_s, StepWork(0, 4, 1004))
    assert device.finish_step() > change_s
    steps, _ = device.run_series(device.t_s, StepWork(0, 4, 1008), 100, 10.0)
    assert steps == 100
    assert device.sm_clock_mhz_s < 2100 * device.t_s - 1000


def test_a_history_sees_every_step():
    requests, spans = [Request("a", 0.0, 100, 50)], []
    config = EngineConfig(kv_blocks=1000)
    Run(
        PROFILES["rtx_a6000"],
        "llama-3.1-8b",
        requests,
        config,
        0,
        jumps=True,
        history=lambda *span: spans.append(span),
    )
    contexts = {work.context_tokens for *_, work in spans if work and not work.prefill_tokens}
    assert contexts == set(range(101, 150))
