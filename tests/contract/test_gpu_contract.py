"""What every `Gpu` must do, held against each implementation."""

import math
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pynvml
import pytest

from agft_ray.clock import ManualClock, WallClock
from agft_ray.clock_timer import ClockTimer
from agft_ray.errors import GpuArgumentError
from agft_ray.gpu.group import GpuGroup
from agft_ray.gpu.leased import LeasedGpu
from agft_ray.gpu.nvml import backend as nvml_backend
from agft_ray.gpu.nvml.backend import NvmlGpu
from agft_ray.gpu.nvml.session import NvmlSession
from agft_ray.gpu.safety.guard import Guard
from agft_ray.gpu.simulated import InMemoryGpu, SimulatedGpu
from agft_ray.simulation.device import Device
from agft_ray.simulation.device_file import DeviceFile
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import EventReason

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_nvml"))
from fake_nvml import FakeNvml, build, use_in_pynvml

LONGEST_DELAY_S = 0.05
SHORTEST_DELAY_S = 0.01


def in_memory(tmp_path, monkeypatch):
    profile = load_gpu_profile("rtx_a6000")
    clock = ManualClock()
    device = Device(profile, profile.model_profile("llama-3.1-8b"))

    def wait(seconds):
        clock.advance_to(clock.t_s + seconds)

    return InMemoryGpu(device, clock), wait


def simulated(tmp_path, monkeypatch):
    wall_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: wall_s[0])
    path = tmp_path / "gpu.json"
    DeviceFile.create(path, uuid="GPU-0", profile="rtx_a6000", model="llama-3.1-8b", speed=4.0)

    def wait(seconds):
        wall_s[0] += seconds / 4.0

    return SimulatedGpu(path), wait


def leased(tmp_path, monkeypatch):
    """In the simulated GPU's time; the guard is a process in real time, and must not stir."""
    gpu, wait = simulated(tmp_path, monkeypatch)
    start = Guard.start
    monkeypatch.setattr(Guard, "start", lambda leases: start(leases, heartbeat_s=3600.0))
    return LeasedGpu([gpu], directory=tmp_path / "leases", owner="a contract"), wait


def nvml(tmp_path, monkeypatch):
    """The NVML backend on a fake driver; energy is in real time, clocks change when waited for."""
    use_in_pynvml(build(tmp_path))
    fake = FakeNvml(tmp_path / "node.nvml", gpus=1)
    monkeypatch.setenv("AGFT_FAKE_NVML", str(fake.path))
    monkeypatch.setattr(nvml_backend, "_SESSION", NvmlSession(pynvml))
    fake.gpu(0).busy, fake.gpu(0).settle_s = 1, 3600.0

    def wait(seconds):
        time.sleep(min(seconds, 0.3))
        if seconds >= LONGEST_DELAY_S:
            fake.gpu(0).settle()

    return NvmlGpu(fake.gpu(0).uuid, clock=WallClock()), wait


@pytest.fixture(params=[in_memory, simulated, leased, nvml])
def gpu_and_wait(request, tmp_path, monkeypatch):
    gpu, wait = request.param(tmp_path, monkeypatch)
    gpu.claim()
    yield gpu, wait
    gpu.reset()
    gpu.release()


@pytest.fixture
def gpu(gpu_and_wait):
    return gpu_and_wait[0]


@pytest.fixture
def wait(gpu_and_wait):
    return gpu_and_wait[1]


def test_identity(gpu):
    assert gpu.uuid.startswith("GPU-")
    assert gpu.model


def test_supported_clocks_ascend(gpu):
    clocks = gpu.arms
    assert len(clocks) > 1
    assert list(clocks) == sorted(set(clocks))


def test_a_lock_takes_effect_after_the_delay_and_not_before(gpu, wait):
    wait(10.0)
    before = gpu.read()
    gpu.lock(900)
    wait(SHORTEST_DELAY_S)
    during = gpu.read()
    assert during.sm_clock_mhz == before.sm_clock_mhz != 900
    assert during.locked == 900
    wait(LONGEST_DELAY_S)
    assert gpu.read().sm_clock_mhz == 900


def test_a_change_can_be_timed_and_until_its_clock_is_there_nothing_is_known(gpu, wait):
    def busy_reading():
        return replace(gpu.read(), event_reasons=EventReason.NONE)

    wait(10.0)
    timer, before = ClockTimer(), busy_reading()
    gpu.lock(900)
    timer.begin(900, before.t_s, before)
    timer.see(busy_reading())
    assert (timer.is_running, timer.median_s) == (True, None)
    wait(LONGEST_DELAY_S)
    timer.see(busy_reading())
    assert not timer.is_running
    assert 0.4 * LONGEST_DELAY_S < timer.median_s < 1.0


def test_it_says_of_how_many_gpus_it_reads(gpu):
    assert gpu.read().gpus == 1
    assert GpuGroup([gpu, gpu]).read().gpus == 2


def test_every_supported_clock_can_be_locked(gpu, wait):
    for clock in gpu.arms[::7]:
        gpu.lock(clock)
        wait(LONGEST_DELAY_S)
        sample = gpu.read()
        assert (sample.sm_clock_mhz, sample.locked) == (clock, clock)


def test_a_clock_between_two_is_the_one_below(gpu, wait):
    low, high = gpu.arms[3:5]
    gpu.lock(high - 1)
    wait(LONGEST_DELAY_S)
    assert gpu.read().sm_clock_mhz == low


def test_a_clock_outside_the_range_is_refused_and_changes_nothing(gpu, wait):
    gpu.lock(900)
    for clock in (0, gpu.arms[0] - 1, gpu.arms[-1] + 1):
        with pytest.raises(GpuArgumentError, match=str(clock)):
            gpu.lock(clock)
    wait(LONGEST_DELAY_S)
    assert gpu.read().locked == gpu.read().sm_clock_mhz == 900


def test_reset_returns_to_default_clocks_any_number_of_times(gpu, wait):
    wait(10.0)
    default_mhz = gpu.read().sm_clock_mhz
    gpu.reset()
    wait(LONGEST_DELAY_S)
    assert gpu.read().sm_clock_mhz == default_mhz
    gpu.lock(900)
    wait(LONGEST_DELAY_S)
    for _ in range(3):
        gpu.reset()
        assert gpu.read().locked is None
        wait(LONGEST_DELAY_S)
    assert gpu.read().sm_clock_mhz == default_mhz


def test_readings_are_finite_and_the_energy_counter_only_grows(gpu, wait):
    samples = []
    for k in range(60):
        wait(0.12)
        if k % 20 == 0:
            gpu.lock(gpu.arms[k])
        samples.append(gpu.read())
    for sample in samples:
        values = (sample.t_s, sample.power_w, sample.energy_j, sample.temperature_c)
        assert all(math.isfinite(value) for value in values)
        assert sample.power_w > 0
        assert 0 <= sample.energy_t_s <= sample.t_s
        assert sample.sm_clock_mhz in gpu.arms
    for earlier, later in pairwise(samples):
        assert later.t_s >= earlier.t_s
        assert later.energy_j >= earlier.energy_j
        assert (later.energy_j > earlier.energy_j) == (later.energy_t_s > earlier.energy_t_s)
    assert samples[-1].energy_j > 40 * 6
