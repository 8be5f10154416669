"""The noise of steps and of the energy counter, against closed forms."""

import itertools
import math
import statistics

import pytest

from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.noise import StepNoise
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
QUIET = {"noise.outlier_share": 0.0}


def profile(**changes):
    return PLAIN.with_values(QUIET | {f"noise.{name}": value for name, value in changes.items()})


def device(gpu=PLAIN, **options):
    return Device(gpu, gpu.model_profile(MODEL), **options)


@pytest.mark.parametrize("steps", [1, 4, 100])
@pytest.mark.parametrize("outlier_share", [0.0, 0.02])
def test_the_time_of_a_series_has_the_mean_and_variance_of_a_sum_of_steps(steps, outlier_share):
    noise = StepNoise(cv=0.05, outlier_share=outlier_share, outlier_factor=3.0)
    factors = [noise.factor(7, 0.25 * k, steps) for k in range(40_000)]
    variance = (0.05**2 + 4.0 * outlier_share * (1 - outlier_share)) / steps
    error = 4 * math.sqrt(variance / len(factors))
    assert statistics.fmean(factors) == pytest.approx(1 + 2 * outlier_share, abs=error)
    assert statistics.pvariance(factors) == pytest.approx(variance, rel=0.06)


def test_the_noise_of_a_step_is_log_normal():
    noise = StepNoise(cv=0.05, outlier_share=0.0, outlier_factor=3.0)
    logs = sorted(math.log(noise.factor(7, 0.25 * k)) for k in range(40_000))
    sigma = math.sqrt(math.log1p(0.05**2))
    normal = statistics.NormalDist(-(sigma**2) / 2, sigma)
    for share in (0.025, 0.5, 0.975):
        found = logs[int(share * len(logs))]
        assert found == pytest.approx(normal.inv_cdf(share), abs=0.04 * sigma)


def test_outliers_are_as_rare_and_as_long_as_the_profile_says():
    noise = StepNoise(cv=0.0, outlier_share=0.002, outlier_factor=5.0)
    factors = [noise.factor(7, 0.25 * k) for k in range(100_000)]
    assert set(factors) == {1.0, 5.0}
    assert factors.count(5.0) == pytest.approx(200, abs=4 * math.sqrt(200))


def test_noise_depends_on_the_seed_and_on_when_a_step_starts_alone():
    noise = StepNoise(cv=0.05, outlier_share=0.01, outlier_factor=3.0)
    times_s = [0.1 * k for k in range(100)]
    factors = {t_s: noise.factor(1, t_s) for t_s in times_s}
    assert factors == {t_s: noise.factor(1, t_s) for t_s in reversed(times_s)}
    assert len(set(factors.values())) == 100
    assert not set(factors.values()) & {noise.factor(2, t_s) for t_s in times_s}


def test_a_simulation_has_no_noise_unless_it_is_asked_for():
    quiet = PLAIN.model_copy(update={"noise": NoiseProfile()})
    runs = [Served(PLAIN, noise=False), Served(quiet, noise=True)]
    assert runs[0].timings == runs[1].timings
    assert runs[0].device.energy_j == runs[1].device.energy_j


@pytest.mark.parametrize("work", [DECODE, PREFILL])
def test_a_step_with_noise_takes_longer_at_the_same_power(work):
    plain, noisy = device(), device(profile(step_cv=0.05), noise=True, seed=3)
    factor = StepNoise(0.05, 0.0, 3.0).factor(3, 0.0)
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
    factor = StepNoise(0.05, 0.0, 3.0).factor(3, 0.0)
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


@pytest.mark.parametrize("look_s", [0.03, 0.05, 0.5, 1e3])
@pytest.mark.parametrize("jumps", [True, False])
def test_noise_leaves_the_mean_step_time_as_it_is_however_often_a_series_is_cut(look_s, jumps):
    steps, cv = 3000, 0.05
    plain = Served(profile(), noise=False, look_s=look_s)
    noisy = [Served(profile(step_cv=cv), jumps=jumps, look_s=look_s, seed=k) for k in range(4)]
    ratio = statistics.fmean(run.end_s for run in noisy) / plain.end_s
    assert ratio == pytest.approx(1.0, abs=4 * cv / math.sqrt(4 * steps))


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
