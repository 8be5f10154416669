import csv
import time
from itertools import pairwise

import pytest

from agft_ray.errors import ConfigError, GpuLostError
from agft_ray.simulation.device import Device
from agft_ray.simulation.device_file import DeviceFile, request_reset
from agft_ray.simulation.physics import StepWork
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.shared_device import SharedDevice

WORK = StepWork(400, 3, 2000, 0.01)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpu.json"


def create(path, **changes):
    description = {"uuid": "GPU-0", "profile": "rtx_a6000", "model": "llama-3.1-8b", "speed": 5.0}
    DeviceFile.create(path, **description | changes)
    return SharedDevice(path)


def plain(**options):
    profile = load_gpu_profile("rtx_a6000")
    return Device(profile, profile.model_profile("llama-3.1-8b"), **options)


def test_noise_is_that_of_a_device_in_memory(path):
    shared, device = create(path, noise=True, seed=3), plain(noise=True, seed=3)
    ends_s = [shared.begin_step(t_s, WORK) for t_s in (1.0, 2.0, 3.0)]
    assert ends_s == [device.begin_step(t_s, WORK) for t_s in (1.0, 2.0, 3.0)]
    assert SharedDevice(path).step_end_s() == ends_s[-1]
    assert len({round(end_s % 1.0, 9) for end_s in ends_s}) == 3


def test_steps_are_those_of_a_device_in_memory(path):
    shared, device = create(path), plain()
    assert shared.step_end_s() is None
    for t_s in (1.0, 1.0, 7.0):
        assert shared.begin_step(t_s, WORK) == device.begin_step(t_s, WORK)
        assert SharedDevice(path).step_end_s() == device.step_end_s()
        assert shared.finish_step() == device.finish_step()
    with shared.transaction() as (shared_device, _):
        assert shared_device.energy_j == device.energy_j


def test_one_process_sees_the_step_and_the_clock_change_of_the_other(path):
    engine, tuner = create(path, speed=0.001), SharedDevice(path)
    end_s = engine.begin_step(0.0, WORK)
    with tuner.transaction() as (device, now_s):
        device.lock(now_s, 900)
    assert engine.step_end_s() > end_s
    request_reset(path)
    with tuner.transaction() as (device, now_s):
        assert device.read(now_s).locked is None


def test_the_clock_is_the_files(path):
    shared = create(path)
    other = SharedDevice(path)
    first_s = shared.now_s()
    time.sleep(0.01)
    assert first_s + 0.04 < other.now_s() < first_s + 5
    assert shared.clock == other.clock


def test_history_has_every_segment_once(path, tmp_path):
    history = tmp_path / "history.csv"
    shared = create(path, history_path=history)
    for t_s in (0.5, 1.0):
        shared.begin_step(t_s, WORK)
        shared.finish_step()
    with history.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "t0_s",
        "t1_s",
        "sm_clock_mhz",
        "power_w",
        "prefill_tokens",
        "decode_sequences",
        "context_tokens",
    ]
    spans = [(float(row["t0_s"]), float(row["t1_s"])) for row in rows]
    assert spans[0][0] == 0.0
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert [row["prefill_tokens"] for row in rows] == ["0", "400", "0", "400"]
    energy_j = sum((float(r["t1_s"]) - float(r["t0_s"])) * float(r["power_w"]) for r in rows)
    with shared.transaction() as (device, _):
        assert device.energy_j == pytest.approx(energy_j, rel=1e-12)


def test_a_deleted_file_is_a_lost_gpu(path):
    shared = create(path)
    path.unlink()
    with pytest.raises(GpuLostError, match="gone"):
        shared.begin_step(0.0, WORK)


def test_an_unknown_profile_or_model_is_refused(path, tmp_path):
    with pytest.raises(ConfigError, match="h900"):
        create(path, profile="h900")
    with pytest.raises(ConfigError, match="gpt-5"):
        create(tmp_path / "other.json", model="gpt-5")
