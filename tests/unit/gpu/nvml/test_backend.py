"""`NvmlGpu` on the fake driver: reading, setting, and every way in which NVML fails."""

import contextlib
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pynvml
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "fake_nvml"))

from fake_nvml import ENV, SM_CLOCKS_MHZ, FakeNvml, build, use_in_pynvml

from agft_ray.clock import ManualClock, WallClock
from agft_ray.errors import (
    GpuArgumentError,
    GpuError,
    GpuLostError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    GpuUnavailableError,
)
from agft_ray.gpu.nvml import backend as nvml
from agft_ray.gpu.nvml.backend import DeviceInfo, NvmlGpu, driver_versions, list_devices
from agft_ray.gpu.nvml.errors import gpu_error
from agft_ray.gpu.nvml.reader import NvmlReader
from agft_ray.gpu.nvml.session import NvmlSession
from agft_ray.types import Actuator, EventReason

SETTLED_S = 0.025
PERMANENT = {3, 9, 12, 13, 17, 18, 25, 26}
CODES = {
    **dict.fromkeys(PERMANENT, GpuNotSupportedError),
    4: GpuPermissionError,
    # 28 of a GPU that was there; `test_an_unknown_uuid` is about one that was not.
    **dict.fromkeys((15, 16, 28), GpuLostError),
    **dict.fromkeys((2, 24), GpuArgumentError),
    **dict.fromkeys((1, 8, 10, 19, 20, 27, 77, 999), GpuTransientError),
}
TRANSIENT = [code for code, error in CODES.items() if error is GpuTransientError]
LOST = [code for code, error in CODES.items() if error is GpuLostError]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    directory = tmp_path_factory.mktemp("library")
    return build(directory), build(directory, old_driver=True)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeNvml(tmp_path / "gpus")
    monkeypatch.setenv(ENV, str(fake.path))
    return fake


@contextlib.contextmanager
def session_on(library_dir, monkeypatch):
    use_in_pynvml(library_dir)
    session = NvmlSession(pynvml)
    monkeypatch.setattr(nvml, "_SESSION", session)
    yield
    if session._is_open:
        session.thread.call(pynvml.nvmlShutdown, deadline_s=5.0)
    use_in_pynvml(None)


@pytest.fixture
def driver(libraries, fake, monkeypatch):
    with session_on(libraries[0], monkeypatch):
        yield fake


@pytest.fixture
def old_driver(libraries, fake, monkeypatch):
    with session_on(libraries[1], monkeypatch):
        yield fake


@pytest.fixture
def device(driver):
    return driver.gpu(0)


@pytest.fixture
def gpu(device):
    return NvmlGpu(device.uuid, clock=WallClock())


@pytest.fixture
def capped(device):
    return NvmlGpu(device.uuid, clock=WallClock(), actuator=Actuator.POWER_LIMIT)


def settled(gpu):
    time.sleep(SETTLED_S)
    return gpu.read()


def all_calls(driver):
    return driver.init_calls + sum(driver.gpu(k).calls("any") for k in range(len(driver)))


class Recorder:
    """A FAKE `ClockWriter`: remembers what it was told."""

    def __init__(self, error=None):
        self.told = []
        self.error = error

    def target(self):
        return {"backend": "zeusd", "path": "/s", "index": 3, "token_path": ""}

    def _tell(self, *what):
        if self.error:
            raise self.error
        self.told.append(what)

    def lock_sm_clocks(self, min_mhz, max_mhz):
        self._tell("lock", min_mhz, max_mhz)

    def reset_sm_clocks(self):
        self._tell("reset")

    def set_power_limit(self, limit_w):
        self._tell("limit", limit_w)


# --- identity, arms, locking ----------------------------------------------------------------


def test_making_one_calls_nothing_and_identity_is_read_when_asked(driver, gpu):
    assert all_calls(driver) == 0
    assert gpu.uuid == driver.gpu(0).uuid
    assert gpu.model == "NVIDIA H100 80GB HBM3"
    assert gpu.actuator is Actuator.SM_CLOCK


def test_arms_are_the_supported_clocks_ascending_and_read_once(device, gpu):
    assert gpu.arms == SM_CLOCKS_MHZ
    before = device.calls("any")
    assert gpu.arms == SM_CLOCKS_MHZ
    assert device.calls("any") == before


def test_lock_and_reset_reach_the_gpu_and_locked_follows(device, gpu):
    assert gpu.read().locked is None
    gpu.lock(900)
    assert device.locked_mhz == (900, 900)
    assert (settled(gpu).sm_clock_mhz, gpu.read().locked) == (900, 900)
    gpu.lock(910)
    assert device.locked_mhz == (900, 900)
    for _ in range(3):
        gpu.reset()
    assert device.locked_mhz is None
    assert (settled(gpu).sm_clock_mhz, gpu.read().locked) == (1980, None)


@pytest.mark.parametrize("arm", [0, -900, 209, 1981])
def test_a_clock_outside_the_range_is_refused_and_nothing_is_called(device, gpu, arm):
    gpu.lock(900)
    with pytest.raises(GpuArgumentError, match=rf"{gpu.uuid} .* {arm} MHz: .* 210\.\.1980 MHz"):
        gpu.lock(arm)
    assert device.calls("set") == 1
    assert gpu.read().locked == 900


def test_a_silent_clamp_shows_in_the_reading(device, gpu):
    device.clamp_steps = 6
    gpu.lock(1095)
    assert (settled(gpu).sm_clock_mhz, gpu.read().locked) == (1005, 1095)


def test_reset_locks_the_administrators_range_again(driver, device):
    gpu = NvmlGpu(device.uuid, clock=WallClock(), restore_sm_clocks_mhz=(600, 1410))
    gpu.lock(900)
    gpu.reset()
    assert device.locked_mhz == (600, 1410)
    assert gpu.read().locked is None
    assert [entry.args for entry in driver.log()] == [(900, 900), (), (600, 1410)]


def test_a_gpu_that_lists_no_clocks_can_be_read_and_says_what_to_do(gpu, monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetSupportedMemoryClocks", lambda handle: [])
    assert gpu.arms == ()
    assert gpu.read().power_w > 0
    for attempt in (gpu.claim, lambda: gpu.lock(1200)):
        with pytest.raises(GpuNotSupportedError, match=rf"{gpu.uuid}.*actuator: power_limit"):
            attempt()


def test_the_writer_is_substituted_and_reads_stay_local(device):
    writer = Recorder()
    gpu = NvmlGpu(device.uuid, clock=WallClock(), writer=writer, restore_sm_clocks_mhz=(600, 1410))
    gpu.lock(907)
    assert gpu.read().locked == 900
    gpu.reset()
    assert writer.told == [("lock", 900, 900), ("reset",), ("lock", 600, 1410)]
    assert device.calls("set") == device.calls("reset") == 0
    assert gpu.target() == {
        "uuid": device.uuid,
        "backend": "zeusd",
        "actuator": "sm_clock",
        "path": "/s",
        "index": 3,
        "token_path": "",
        "restore_power_limit_w": None,
        "restore_sm_clocks_mhz": [600, 1410],
    }


def test_a_failed_lock_leaves_locked_as_it_was(device, gpu):
    gpu.lock(900)
    device.fail("set", 999, times=1)
    with pytest.raises(GpuTransientError):
        gpu.lock(1200)
    assert gpu.read().locked == 900
    device.fail("reset", 999, times=1)
    with pytest.raises(GpuTransientError):
        gpu.reset()
    assert gpu.read().locked == 900


def test_target_takes_no_nvml_call_for_clocks(driver, gpu):
    target = gpu.target()
    assert all_calls(driver) == 0
    assert target == {
        "uuid": gpu.uuid,
        "backend": "nvml",
        "actuator": "sm_clock",
        "path": "",
        "index": None,
        "token_path": "",
        "restore_power_limit_w": None,
        "restore_sm_clocks_mhz": None,
    }


# --- claims ---------------------------------------------------------------------------------


def test_claim_and_release_change_nothing(driver, gpu):
    gpu.claim()
    gpu.release()
    assert driver.log() == []
    assert gpu.restore_power_limit_w is None


def test_mig_is_refused(device, gpu):
    device.mig_mode = 1
    with pytest.raises(GpuNotSupportedError, match=rf"{gpu.uuid}.*MIG is on.*-mig 0.*observe"):
        gpu.claim()


def test_a_gpu_without_mig_is_not(device, gpu):
    device.mig_mode = -1
    gpu.claim()


@pytest.mark.parametrize(("mode", "name"), [(2, "vgpu"), (3, "host_vgpu"), (4, "host_vsga")])
def test_vgpus_are_refused(device, gpu, mode, name):
    device.virtualization_mode = mode
    with pytest.raises(GpuNotSupportedError, match=rf"{name},.*pass-through.*mode: observe"):
        gpu.claim()


@pytest.mark.parametrize("mode", [0, 1])
def test_bare_metal_and_passthrough_are_not(device, gpu, mode):
    device.virtualization_mode = mode
    gpu.claim()


# --- power limits ---------------------------------------------------------------------------


def test_power_limits_in_about_twenty_steps_with_the_one_found(device, capped):
    device.power_limit_w = 610.0
    arms = capped.arms
    assert arms == tuple(sorted({*range(200, 701, 25), 610}))


def test_a_power_limit_is_set_and_the_one_found_put_back(driver, device, capped):
    device.power_limit_w = 650.5
    capped.reset()
    assert driver.log() == []
    capped.claim()
    assert capped.restore_power_limit_w == 650.5
    capped.lock(449)
    assert device.power_limit_w == 425.0
    capped.claim()
    assert capped.restore_power_limit_w == 650.5
    assert capped.target()["restore_power_limit_w"] == 650.5
    assert capped.target()["actuator"] == "power_limit"
    sample = settled(capped)
    assert sample.locked == 425
    assert sample.power_w <= 425
    assert EventReason.SW_POWER_CAP in sample.event_reasons
    capped.reset()
    assert device.power_limit_w == 650.5
    assert capped.read().locked is None
    assert device.calls("reset") == 0


def test_a_power_limit_is_found_before_the_first_change_without_a_claim(device, capped):
    device.power_limit_w = 640.0
    capped.lock(300)
    capped.reset()
    assert device.power_limit_w == 640.0


def test_a_power_limit_outside_the_range_is_refused(device, capped):
    with pytest.raises(GpuArgumentError, match=r"750 W: choose from 200\.\.700 W"):
        capped.lock(750)
    assert device.calls("set") == 0


# --- readings -------------------------------------------------------------------------------


def test_a_reading_has_everything(device, gpu):
    device.event_reasons = 0x1 | 0x2 | 0x20 | 0x100 | 1 << 40
    sample = gpu.read()
    assert sample.power_w == pytest.approx(device.power_w, abs=1e-3)
    assert sample.energy_j == pytest.approx(device.counter_j, abs=2 * device.power_w)
    assert sample.event_reasons == EventReason.GPU_IDLE | EventReason.SW_THERMAL
    assert (sample.temperature_c, sample.power_source, sample.energy_source) == (
        45.0,
        "instant",
        "counter",
    )
    assert abs(sample.t_s - time.monotonic()) < 5.0


def test_a_reading_is_few_calls(driver, device, gpu):
    gpu.read()
    before = device.calls("any"), device.calls("handle"), driver.init_calls
    gpu.read()
    after = device.calls("any"), device.calls("handle"), driver.init_calls
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 0, 0]


def test_the_time_of_the_energy_counter_is_nvmls_own(device, gpu):
    device.counter_update_s = 0.2
    samples = []
    for _ in range(20):
        samples.append(gpu.read())
        time.sleep(0.1)
    counted = [sample for sample in samples if sample.energy_j != samples[0].energy_j]
    # The fake updates its counter at whole multiples of the period of the monotonic clock.
    # When a value was first seen would be 0.05 s later, on average.
    phases_s = [(sample.energy_t_s + 0.1) % 0.2 - 0.1 for sample in counted]
    assert abs(statistics.median(phases_s)) < 0.01
    assert all(sample.energy_t_s <= sample.t_s for sample in samples)
    for a, b in pairwise(samples):
        assert (b.energy_j > a.energy_j) == (b.energy_t_s > a.energy_t_s)
    first, last = counted[0], counted[-1]
    mean_w = (last.energy_j - first.energy_j) / (last.energy_t_s - first.energy_t_s)
    assert mean_w == pytest.approx(device.power_w, rel=0.1)


def test_a_stuck_energy_counter_keeps_its_time(device, gpu):
    device.counter_stuck = True
    first = gpu.read()
    time.sleep(0.12)
    second = gpu.read()
    assert (second.energy_j, second.energy_t_s) == (first.energy_j, first.energy_t_s)


def test_a_reset_of_the_energy_counter_is_passed_on(device, gpu):
    first = gpu.read()
    time.sleep(0.002)
    device.reset_counter()
    second = gpu.read()
    assert second.energy_j < first.energy_j
    assert second.energy_t_s > first.energy_t_s


def test_without_an_energy_counter_power_is_integrated(device, gpu):
    device.fail("energy", 3)
    first = gpu.read()
    assert (first.energy_j, first.energy_t_s, first.energy_source) == (0.0, first.t_s, "integrated")
    for _ in range(5):
        time.sleep(0.01)
        last = gpu.read()
    assert last.energy_t_s == last.t_s
    assert last.energy_j == pytest.approx(device.power_w * (last.t_s - first.t_s), rel=1e-3)


def test_a_passing_failure_of_the_counter_does_not_give_it_up(device, gpu):
    device.fail("energy", 999, times=1)
    with pytest.raises(GpuTransientError):
        gpu.read()
    assert gpu.read().energy_source == "counter"


def test_an_old_drivers_ways_are_found_once(old_driver):
    device = old_driver.gpu(0)
    gpu = NvmlGpu(device.uuid, clock=WallClock())
    device.event_reasons = 0x40
    sample = gpu.read()
    assert sample.power_w == pytest.approx(device.power_w, abs=1e-3)
    assert (sample.power_source, sample.energy_source) == ("average", "counter")
    assert sample.event_reasons == EventReason.HW_THERMAL
    assert sample.temperature_c == 45.0
    before = device.calls("any")
    gpu.read()
    assert device.calls("any") - before == 5


def test_impossible_power_is_refused_and_counted(gpu, monkeypatch):
    gpu.read()
    for power_w in (3.7e12, 1051.0, -1.0, math.nan, math.inf):
        monkeypatch.setattr(gpu._reader, "_power", lambda nvml, w=power_w: (w, "instant"))
        with pytest.raises(GpuTransientError, match=rf"{gpu.uuid}.*dropped.*0\.\.1050 W"):
            gpu.read()
    assert gpu.rejected_readings == 5
    monkeypatch.undo()


class OneCounter:
    """A FAKE of `NvmlCalls`: a counter with a timestamp, and all else constant."""

    gpu = "GPU-0"

    def __init__(self):
        self.energy_mj, self.stamp_us = 0, 0

    def __call__(self, function, *args):
        return [0, 700_000] if function.endswith("Constraints") else 300

    def field(self, field_id):
        return (self.energy_mj, self.stamp_us) if field_id == 83 else (300_000, 0)


@pytest.mark.parametrize(
    ("age_s", "expected_t_s"),
    [
        (0.04, 9.92),
        (0.0, 10.0),
        (-0.001, 10.0),
        (3600.0, 10.0),
        (-3600.0, 10.0),
        (1.001, 10.0),
        (0.7, 10.0),
    ],
    ids=["ours", "now", "ahead", "an hour old", "an hour ahead", "too old", "before the last"],
)
def test_an_implausible_timestamp_gives_way_to_when_the_value_was_first_seen(age_s, expected_t_s):
    clock, calls, now_s = ManualClock(9.0, speed=2.0), OneCounter(), 1.7e9
    reader = NvmlReader(clock, epoch_s=lambda: now_s)
    reader.read(calls, None)
    clock.advance_to(10.0)
    calls.energy_mj, calls.stamp_us = 5000, round((now_s - age_s) * 1e6)
    sample = reader.read(calls, None)
    assert sample.energy_t_s == pytest.approx(expected_t_s, abs=1e-5)
    assert sample.energy_j == 5.0
    clock.advance_to(11.0)
    assert reader.read(calls, None).energy_t_s == sample.energy_t_s


# --- failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_every_code_of_a_setter_becomes_its_error_and_nothing_is_tried_again(device, gpu, code):
    _ = gpu.arms
    device.fail("set", code)
    before = device.calls("any")
    with pytest.raises(CODES[code]) as raised:
        gpu.lock(900)
    message = str(raised.value)
    assert type(raised.value) is CODES[code]
    assert f"nvmlDeviceSetGpuLockedClocks failed for {gpu.uuid}: " in message
    assert f"(NVML code {code}): " in message
    assert device.calls("any") - before == 1
    assert device.locked_mhz is None


@pytest.mark.parametrize("code", CODES)
def test_every_code_of_a_read_becomes_its_error(device, gpu, code):
    gpu.read()
    device.fail("clock", code)
    with pytest.raises(CODES[code], match=r"nvmlDeviceGetClockInfo failed"):
        gpu.read()


@pytest.mark.parametrize("code", TRANSIENT)
def test_after_a_passing_failure_nvml_is_initialised_anew_once_a_call(driver, device, gpu, code):
    gpu.read()
    device.fail("clock", code, times=3)
    for failures in range(1, 4):
        with pytest.raises(GpuTransientError):
            gpu.read()
        assert (driver.init_calls, device.calls("handle")) == (failures, failures)
    gpu.read()
    gpu.read()
    assert (driver.init_calls, device.calls("handle")) == (4, 4)


@pytest.mark.parametrize("code", [c for c in CODES if c not in TRANSIENT])
def test_after_any_other_failure_it_is_not(driver, device, gpu, code):
    device.fail("set", code)
    for _ in range(3):
        with pytest.raises(CODES[code]):
            gpu.lock(900)
    assert driver.init_calls == 1


@pytest.mark.parametrize("code", LOST)
def test_a_lost_gpu_is_never_called_again(driver, device, gpu, code):
    _ = gpu.arms
    device.fail("clock", code, times=1)
    with pytest.raises(GpuLostError):
        gpu.read()
    before = all_calls(driver)
    for call in (gpu.read, gpu.claim, gpu.reset, lambda: gpu.lock(900), lambda: gpu.model):
        with pytest.raises(GpuLostError, match=rf"nvmlDeviceGetClockInfo failed for {gpu.uuid}"):
            call()
    assert all_calls(driver) == before


def test_neither_is_its_substituted_writer(device):
    writer = Recorder()
    gpu = NvmlGpu(device.uuid, clock=WallClock(), writer=writer)
    device.fail("clock", 15)
    with pytest.raises(GpuLostError):
        gpu.read()
    for call in (gpu.reset, lambda: gpu.lock(900)):
        with pytest.raises(GpuLostError):
            call()
    assert writer.told == []


def test_an_unknown_uuid_is_no_lost_gpu(driver):
    gpu = NvmlGpu("GPU-nowhere", clock=WallClock())
    for _ in range(2):
        with pytest.raises(GpuUnavailableError, match=r"HandleByUUID .* GPU-nowhere.*smi -L"):
            gpu.read()


@pytest.mark.parametrize("code", [6, 28])
def test_a_gpu_that_is_not_visible_is_lost_only_if_it_was_there_before(device, gpu, code):
    device.fail("handle", code)
    for _ in range(2):
        with pytest.raises(GpuUnavailableError):
            gpu.read()
    device.fail("handle", 0)
    gpu.read()
    device.fail("clock", 999, times=1)
    with pytest.raises(GpuTransientError):
        gpu.read()
    device.fail("handle", code)
    for _ in range(2):
        with pytest.raises(GpuLostError, match=rf"NVML code {code}"):
            gpu.read()


def test_something_else_not_found_is_no_lost_gpu():
    error = gpu_error(6, function="nvmlDeviceGetName", gpu="GPU-0", text="Not Found")
    assert type(error) is GpuTransientError


def test_a_driver_that_does_not_answer_is_asked_once_a_call(driver, gpu):
    driver.fail_init(9)
    for calls in (1, 2):
        with pytest.raises(GpuNotSupportedError, match=r"nvmlInit.*GPU-.*9\): install the driver"):
            gpu.read()
        assert all_calls(driver) == calls
    driver.fail_init(0)
    gpu.read()


def test_no_permission_names_the_three_ways_out(device, gpu):
    device.fail("set", 4)
    with pytest.raises(GpuPermissionError) as raised:
        gpu.lock(900)
    for way_out in ("root", "CAP_SYS_ADMIN", "`gpu: {kind: zeusd}`", "`mode: observe`"):
        assert way_out in str(raised.value)
    assert gpu.read().locked is None


def test_no_library_is_an_error_with_a_way_out():
    code = (
        "from agft_ray.clock import WallClock\n"
        "from agft_ray.gpu.nvml.backend import NvmlGpu, list_devices\n"
        "for call in (NvmlGpu('GPU-0', clock=WallClock()).read, list_devices):\n"
        "    try: call()\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in (ENV, "LD_LIBRARY_PATH")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if not result.stdout:
        pytest.skip("this machine has an NVML")
    for line in result.stdout.splitlines():
        assert line.startswith("GpuNotSupportedError nvmlInit failed for ")
        assert "install the driver" in line


def test_two_gpus_of_which_one_fails(driver):
    good, bad = (NvmlGpu(driver.gpu(k).uuid, clock=WallClock()) for k in range(2))
    good.lock(900)
    driver.gpu(1).fail("any", 999)
    for _ in range(5):
        with pytest.raises(GpuTransientError, match=bad.uuid):
            bad.read()
        assert settled(good).sm_clock_mhz == 900
    driver.gpu(1).fail("any", 15)
    with pytest.raises(GpuLostError):
        bad.read()
    inits = driver.init_calls
    for _ in range(5):
        with pytest.raises(GpuLostError):
            bad.read()
        assert good.read().locked == 900
    assert driver.init_calls == inits


def test_a_hung_call_returns_in_time_and_recovers_when_it_ends(driver, device):
    gpu = NvmlGpu(device.uuid, clock=WallClock(), deadline_s=0.5)
    gpu.read()
    device.delay("clock", 60.0)
    begin_s = time.monotonic()
    with pytest.raises(GpuTransientError, match=rf"^read of {gpu.uuid} .* 0\.5 s"):
        gpu.read()
    assert 0.5 <= time.monotonic() - begin_s < 5.0
    before, begin_s = all_calls(driver), time.monotonic()
    for call in (gpu.read, gpu.reset, lambda: gpu.lock(900), gpu.claim):
        with pytest.raises(GpuTransientError, match=rf"read of {gpu.uuid} .*\b\d+\.\d s"):
            call()
    assert time.monotonic() - begin_s < 1.0  # less than four deadlines
    assert all_calls(driver) == before
    device.delay("clock", 0.0)
    eventually(gpu.read)
    gpu.lock(900)
    assert settled(gpu).sm_clock_mhz == 900


def test_a_lock_that_hung_takes_effect_late_and_a_reset_after_it_wins(device):
    gpu = NvmlGpu(device.uuid, clock=WallClock(), deadline_s=0.5)
    _ = gpu.arms
    device.delay("set", 60.0)
    with pytest.raises(GpuTransientError):
        gpu.lock(900)
    with pytest.raises(GpuTransientError):
        gpu.reset()
    device.delay("set", 0.0)
    eventually(gpu.reset)
    assert device.calls("set") == 1
    assert device.locked_mhz is None


def eventually(call):
    for _ in range(500):
        with contextlib.suppress(GpuTransientError):
            return call()
        time.sleep(0.002)
    return call()


def test_many_threads_may_share_it(device, gpu):
    failures = []

    def use():
        try:
            for arm in SM_CLOCKS_MHZ[:20]:
                gpu.lock(arm)
                gpu.read()
        except GpuError as error:
            failures.append(error)

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert failures == []
    assert device.calls("set") == 80


# --- the node -------------------------------------------------------------------------------


def test_devices_are_listed_with_all_that_doctor_asks(driver):
    driver.gpu(1).mig_mode = 1
    driver.gpu(1).persistence_mode = 0
    driver.gpu(1).virtualization_mode = 2
    first, second = list_devices()
    assert first == DeviceInfo(
        index=0,
        uuid=driver.gpu(0).uuid,
        model="NVIDIA H100 80GB HBM3",
        pci_address="0000:17:00.0",
        mig_enabled=False,
        virtualization="none",
        persistence_mode=True,
        sm_clocks_mhz=SM_CLOCKS_MHZ,
        has_energy_counter=True,
        power_limit_w=700.0,
        default_power_limit_w=700.0,
        power_limit_range_w=(200.0, 700.0),
        compute_processes=0,
    )
    assert (second.index, second.pci_address) == (1, "0000:18:00.0")
    assert (second.mig_enabled, second.persistence_mode) == (True, False)
    assert second.virtualization == "vgpu"


def test_mig_instances_are_listed(driver, device, monkeypatch):
    device.mig_mode = 1
    by_index, uuid_of = pynvml.nvmlDeviceGetMigDeviceHandleByIndex, pynvml.nvmlDeviceGetUUID

    def instance(handle, slot):
        return "an instance" if slot == 2 else by_index(handle, slot)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", instance)
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetUUID",
        lambda handle: "MIG-1" if handle == "an instance" else uuid_of(handle),
    )
    first, second = list_devices()
    assert (first.mig_enabled, first.mig_uuids, first.problem) == (True, ("MIG-1",), "")
    assert second.mig_uuids == ()


def test_what_a_gpu_does_not_support_is_none_and_no_problem(driver, device):
    device.mig_mode = -1
    device.fail("energy", 3)
    first = list_devices()[0]
    assert (first.mig_enabled, first.has_energy_counter, first.problem) == (None, False, "")


def test_a_gpu_that_fails_is_listed_with_its_problem(driver, device):
    device.fail("info", 15)
    lost, fine = list_devices()
    assert (lost.index, lost.uuid, lost.model, lost.sm_clocks_mhz) == (0, None, None, None)
    assert lost.has_energy_counter
    assert re.match(r"nvmlDeviceGetUUID .* GPU 0: .*\b15\b", lost.problem)
    assert (fine.index, fine.uuid, fine.problem) == (1, driver.gpu(1).uuid, "")
    device.fail("info", 0)
    device.fail("handle", 17)
    assert "blocked" in list_devices()[0].problem
    assert list_devices()[0].uuid is None


def test_a_gpu_that_hangs_is_listed_in_time(driver, device):
    device.delay("info", 60.0)
    begin_s = time.monotonic()
    devices = list_devices(deadline_s=0.3)
    assert time.monotonic() - begin_s < 5.0
    assert [d.index for d in devices] == [0, 1]
    assert re.match(r"description of GPU 0 .* 0\.3 s", devices[0].problem)
    assert re.search("description of GPU 0 ", devices[1].problem), "not asked: 0 is in its way"
    device.delay("info", 0.0)
    assert eventually(driver_versions)


def test_listing_fails_as_a_whole_where_nvml_does(driver):
    driver.fail_init(18)
    with pytest.raises(GpuNotSupportedError, match=r"nvmlInit .*\b18\b"):
        list_devices()


def test_driver_versions(driver):
    assert driver_versions() == ("550.54.15", "12.550.54.15", "12.4")


def test_a_pynvml_older_than_a_function_counts_as_an_old_driver(gpu, monkeypatch):
    monkeypatch.delattr(pynvml, "nvmlDeviceGetTemperatureV")
    assert gpu.read().temperature_c == 45.0
