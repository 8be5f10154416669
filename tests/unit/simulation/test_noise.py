"""The noise of steps and of the energy counter, against closed forms."""

import itertools
import math
import statistics

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agft_ray.simulation.decode_series import NoisyProgression
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.noise import PERIOD_STEPS, Noise
from agft_ray.simulation.physics import (
    StepWork,
    effective_sm_clock_mhz,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import NoiseProfile, load_gpu_profile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.workloads.requests import Request

MODEL = "llama-3.1-8b"
DECODE = StepWork(0, 32, 30_000)
PREFILL = StepWork(1500, 8, 8000, 0.02)
PLAIN = load_gpu_profile("rtx_a6000")
NOISE = Noise(NoiseProfile(step_cv=0.1, outlier_share=0.01), 5)
QUIET = {"noise.outlier_share": 0.0}


def profile(**changes):
    return PLAIN.with_values(QUIET | {f"noise.{name}": value for name, value in changes.items()})


def device(gpu=PLAIN, **options):
    return Device(gpu, gpu.model_profile(MODEL), **options)


def noise_of(seed=7, **fields):
    return Noise(NoiseProfile(**fields), seed)


def factors_of(noise, count=PERIOD_STEPS):
    return [noise.factor(step) for step in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_step_times_have_the_mean_and_spread_of_the_profile(share):
    factors = factors_of(noise_of(step_cv=0.05, outlier_share=share, outlier_factor=3.0))
    mean = 1 + 2 * share
    variance = (1 + 0.05**2) * (1 + 8 * share) - mean**2
    assert statistics.fmean(factors) == pytest.approx(mean, abs=4 * math.sqrt(variance / 2**16))
    assert statistics.pvariance(factors) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("steps", [4, 64])
def test_sums_of_steps_vary_as_those_of_independent_steps(steps):
    noise = noise_of(step_cv=0.05)
    means = [noise.excess(k, steps)[0] / steps for k in range(0, PERIOD_STEPS, steps)]
    assert statistics.fmean(means) == pytest.approx(0, abs=4 * 0.05 / 2**8)
    assert statistics.pstdev(means) == pytest.approx(0.05 / math.sqrt(steps), rel=0.08)


def test_the_noise_of_a_step_is_log_normal():
    logs = sorted(math.log(factor) for factor in factors_of(noise_of(step_cv=0.05)))
    sigma = math.sqrt(math.log1p(0.05**2))
    normal = statistics.NormalDist(-(sigma**2) / 2, sigma)
    for share in (0.025, 0.5, 0.975):
        assert logs[int(share * len(logs))] == pytest.approx(
            normal.inv_cdf(share), abs=0.04 * sigma
        )


def test_outliers_are_as_rare_and_as_long_as_the_profile_says():
    factors = factors_of(noise_of(outlier_share=0.002, outlier_factor=5.0))
    expected = 0.002 * PERIOD_STEPS
    slow = sum(factor == pytest.approx(5.0) for factor in factors)
    assert slow == pytest.approx(expected, abs=4 * math.sqrt(expected))
    assert sum(factor == pytest.approx(1.0) for factor in factors) == PERIOD_STEPS - slow


def test_noise_depends_on_the_seed_and_on_the_number_of_the_step_alone():
    fields = {"step_cv": 0.05, "outlier_share": 0.01}
    forwards, backwards = noise_of(**fields), noise_of(**fields)
    steps = range(0, 5000, 7)
    later = {step: backwards.factor(step) for step in reversed(steps)}
    assert {step: forwards.factor(step) for step in steps} == later
    assert not set(later.values()) & set(factors_of(noise_of(seed=8, **fields), 5000))
    assert forwards.factor(PERIOD_STEPS + 14) == forwards.factor(14)
    assert forwards.for_seed(7) is forwards
    assert forwards.for_seed(8).factor(14) != forwards.factor(14)


@settings(deadline=None)  # noise is drawn when it is first asked for
@given(
    start=st.integers(0, 3 * PERIOD_STEPS),
    count=st.integers(0, 300),
    limit=st.floats(-0.1, 3.0),
    growth=st.floats(0.0, 1e-4),
)
@example(start=PERIOD_STEPS - 40, count=90, limit=0.8, growth=1e-5)
def test_a_series_is_the_sum_of_its_steps(start, count, limit, growth):
    series = NoisyProgression(0.01, growth, NOISE, start)
    terms = [(0.01 + growth * k) * NOISE.factor(start + k) for k in range(count)]
    assert series.total(count) == pytest.approx(math.fsum(terms), rel=1e-9)
    assert [series.at(k) for k in range(count)] == pytest.approx(terms)
    sums = list(itertools.accumulate(terms))
    assert series.count_within(limit, count) in {
        sum(total <= limit + error for total in sums) for error in (-1e-9, 1e-9)
    }


def test_a_simulation_has_no_noise_unless_it_is_asked_for():
    quiet = PLAIN.model_copy(update={"noise": NoiseProfile()})
    runs = [Served(PLAIN, noise=False), Served(quiet, noise=True)]
    assert runs[0].timings == runs[1].timings
    assert runs[0].device.energy_j == runs[1].device.energy_j


@pytest.mark.parametrize("work", [DECODE, PREFILL])
def test_a_step_with_noise_takes_longer_at_the_same_power(work):
    plain, noisy = device(), device(profile(step_cv=0.05), noise=True, seed=3)
    factor = noise_of(seed=3, step_cv=0.05).factor(0)
    assert noisy.begin_step(0.0, work) == pytest.approx(factor * plain.begin_step(0.0, work))
    plain.finish_step()
    noisy.finish_step()
    assert noisy.energy_j == pytest.approx(factor * plain.energy_j)


@pytest.mark.parametrize("carries", [False, True])
def test_a_step_that_is_re_timed_or_carried_over_keeps_its_noise(carries):
    gpu, work = profile(step_cv=0.05), StepWork(0, 64, 100_000)
    model = gpu.models[MODEL]
    dev = device(gpu, noise=True, seed=3)
    dev.begin_step(0.0, work)
    dev.lock(0.0, 300)
    change_s = dev.to_state()["pending_clock_changes"][0][0]
    dev.advance(0.01)
    if carries:
        state = dev.to_state()
        dev = device(gpu, noise=True, seed=99)
        dev.from_state(state)
    factor = noise_of(seed=3, step_cv=0.05).factor(0)
    clocks = effective_sm_clock_mhz(gpu, model, work, 2100), 300
    before_s, after_s = (factor * step_time_s(model, work, clock) for clock in clocks)
    assert 0.01 < change_s < before_s
    end_s = change_s + (1 - change_s / before_s) * after_s
    assert dev.finish_step() == pytest.approx(end_s, rel=1e-12)


class Served:
    """Long decodes, looked at every `look_s`."""

    def __init__(self, gpu, *, jumps=True, look_s=0.5, noise=True, seed=5):
        model = gpu.model_profile(MODEL)
        self.device = Device(gpu, model, seed=seed, noise=noise)
        config = EngineConfig().for_model(model)
        core = BatchingEngine(config, lambda n, k: prefill_attention_s(model, n, k))
        self.timings = []
        engine = VirtualEngine(core, self.device, self.timings.append, jumps=jumps)
        engine.submit(Request(f"r{k}", 0.0, 64, 3000) for k in range(8))
        for look in itertools.count(1):
            if engine.drained:
                break
            engine.run_until(look * look_s)

    @property
    def end_s(self):
        return self.timings[-1].e2e_s


@pytest.mark.parametrize("look_s", [0.03, 0.5, 1e3])
def test_a_run_is_the_same_however_its_series_are_cut(look_s):
    gpu = PLAIN.with_values({"noise.step_cv": 0.05, "noise.outlier_share": 0.002})
    whole, cut = Served(gpu, jumps=False, look_s=7.0), Served(gpu, look_s=look_s)
    assert cut.end_s == pytest.approx(whole.end_s, rel=1e-9)
    moment_s = whole.end_s + 0.5
    for run in (whole, cut):
        run.device.advance(moment_s)
    assert cut.device.energy_j == pytest.approx(whole.device.energy_j, rel=1e-9)
    assert cut.device.to_state()["steps"] == whole.device.to_state()["steps"] == 3000


def test_noise_leaves_the_mean_step_time_and_the_power_as_they_are():
    steps, cv = 3000, 0.05
    plain = Served(profile(), noise=False)
    noisy = [Served(profile(step_cv=cv), seed=seed) for seed in range(4)]
    ratio = statistics.fmean(run.end_s for run in noisy) / plain.end_s
    assert ratio == pytest.approx(1.0, abs=4 * cv / math.sqrt(4 * steps))
    assert noisy[0].end_s != plain.end_s


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    ends_s = [Served(PLAIN, seed=seed).end_s for seed in (1, 1, 2)]
    assert ends_s[0] == ends_s[1] != ends_s[2]


def counted(gpu, noise=True):
    dev = device(gpu, noise=noise, seed=3)
    dev.lock(0.0, 1200)
    dev.advance(1.0)
    samples = [dev.read(1.0 + 0.1 * k + 0.05) for k in range(4000)]
    return dev, [(sample.energy_t_s, sample.energy_j) for sample in samples]


def test_the_counters_noise_is_relative_to_one_update_and_does_not_add_up():
    power_w = idle_power_w(PLAIN.power, 1200)
    exact = dict(counted(PLAIN, noise=False)[1])
    dev, readings = counted(profile(counter_noise=0.02))
    errors = [(energy_j - exact[t_s]) / (power_w * 0.1) for t_s, energy_j in readings]
    assert statistics.fmean(errors) == pytest.approx(0, abs=4 * 0.02 / math.sqrt(4000))
    assert statistics.pstdev(errors) == pytest.approx(0.02, rel=0.05)
    assert statistics.pstdev(errors[-1000:]) == pytest.approx(0.02, rel=0.1)
    assert all(after[1] >= before[1] for before, after in itertools.pairwise(readings))
    assert dev.energy_j == pytest.approx(device_energy_j(1.0 + 400.0 - 0.05), rel=1e-9)


def device_energy_j(t_s):
    dev = device(seed=3)
    dev.lock(0.0, 1200)
    dev.advance(t_s)
    return dev.energy_j


@pytest.mark.parametrize("noise", [False, True])
def test_the_counters_period_is_the_profiles(noise):
    readings = counted(profile(counter_update_s=0.02, counter_noise=0.0), noise)[1]
    assert readings[0][0] == pytest.approx(1.04)
    assert device(profile(), counter_update_s=0.5).read(0.9).energy_t_s == pytest.approx(0.5)
