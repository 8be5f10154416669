"""Every NVML code, given to the real tuner by the fake driver, ends in its documented state.

The tuner runs in virtual time; what it calls is counted by the fake.
"""

import sys
from pathlib import Path

import pynvml
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_nvml"))

from fake_nvml import ENV, FakeNvml, build, use_in_pynvml

from agft_ray.clock import ManualClock
from agft_ray.errors import GpuLostError
from agft_ray.gpu.nvml import backend as nvml
from agft_ray.gpu.nvml.backend import NvmlGpu
from agft_ray.gpu.nvml.session import NvmlSession
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.tuner import MAX_FAULTS, Tuner
from agft_ray.types import EngineSample

ARGUMENT = (2, 24)
PERMANENT = (3, 4, 9, 12, 13, 17, 18)
GONE = (15, 16, 28)
TRANSIENT = (1, 6, 8, 10, 19, 27, 999)
LONG_S = 400.0
ARMS_REFUSED = 4
"""Arms in a row after whose refusal no other is tried."""


@pytest.fixture(scope="module")
def library_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def driver(library_dir, tmp_path, monkeypatch):
    driver = FakeNvml(tmp_path / "gpus", gpus=1)
    driver.gpu(0).settle_s = 0.0
    # Energy from power over the tuner's own time, since the counter's is the wall's.
    driver.gpu(0).fail("energy", 3)
    monkeypatch.setenv(ENV, str(driver.path))
    use_in_pynvml(library_dir)
    session = NvmlSession(pynvml)
    monkeypatch.setattr(nvml, "_SESSION", session)
    yield driver
    use_in_pynvml(None)


def fixed(sm_clock_mhz):
    return TunerConfig(policy={"name": "fixed", "sm_clock_mhz": sm_clock_mhz})


class Rig:
    """A tuner that has locked 1230 MHz on the fake GPU, for an engine that is always busy."""

    def __init__(self, driver):
        self.driver, self.device = driver, driver.gpu(0)
        self.clock, self.inbox, self.tokens = ManualClock(), EngineInbox(), 0
        self.tuner = Tuner(
            fixed(1230),
            gpu=NvmlGpu(self.device.uuid, clock=self.clock),
            engine=self.inbox,
            serve=ServeMetrics(max_age_s=10.0),
            clock=self.clock,
        )
        self.loop = self.tuner.run()
        self.run(10.0)
        assert self.device.locked_mhz == (1230, 1230)
        self.seen = len(driver.log())

    def run(self, seconds):
        """Drive the loop; False once it has ended."""
        end_s = self.clock.now_s() + seconds
        while self.clock.now_s() < end_s:
            wake_s = next(self.loop, None)
            if wake_s is None:
                return False
            self.clock.advance_to(max(wake_s, self.clock.now_s()))
            self.tokens += 100
            self.inbox.push(
                EngineSample(
                    t_s=self.clock.now_s(),
                    running=1,
                    generation_tokens=self.tokens,
                    iterations=self.tokens,
                    iteration_tokens=self.tokens,
                    itl_sum_s=self.tokens * 0.02,
                    itl_count=self.tokens,
                )
            )
        return True

    def new_calls(self, function):
        entries = self.driver.log()[self.seen :]
        return sum(entry.function == f"nvmlDevice{function}GpuLockedClocks" for entry in entries)

    @property
    def setter_calls(self):
        return len(self.driver.log())

    @property
    def all_calls(self):
        return self.device.calls("any") + self.driver.init_calls


@pytest.fixture
def rig(driver):
    return Rig(driver)


def change_clock(rig):
    rig.tuner.reconfigure(fixed(900))


@pytest.mark.parametrize("reset_fails_too", [False, True])
@pytest.mark.parametrize("code", PERMANENT)
def test_a_lock_that_is_refused_for_good(rig, code, reset_fails_too):
    rig.device.fail("set", code)
    if reset_fails_too:
        rig.device.fail("reset", code)
    change_clock(rig)
    assert rig.run(60.0)
    assert rig.tuner.state == "refused"
    assert f"NVML code {code}" in rig.tuner.control.reason
    assert (rig.new_calls("Set"), rig.new_calls("Reset")) == (1, 1)
    assert (rig.device.locked_mhz is None) == (not reset_fails_too)
    calls = rig.setter_calls
    assert rig.run(LONG_S), "it measures on"
    assert rig.setter_calls == calls
    rig.device.fail("set", 0)
    rig.device.fail("reset", 0)
    rig.tuner.reconfigure(fixed(600))
    rig.run(30.0)
    assert (rig.tuner.state, rig.device.locked_mhz) == ("tuning", (600, 600))


@pytest.mark.parametrize("code", ARGUMENT)
def test_clocks_that_are_refused_one_after_another(rig, code):
    rig.device.fail("set", code)
    change_clock(rig)
    rig.run(60.0)
    assert rig.tuner.state == "refused"
    assert f"NVML code {code}" in rig.tuner.control.reason
    assert rig.new_calls("Set") == ARMS_REFUSED
    assert rig.device.locked_mhz is None
    calls = rig.setter_calls
    rig.run(LONG_S)
    assert rig.setter_calls == calls


@pytest.mark.parametrize("code", ARGUMENT)
def test_one_clock_that_is_refused_is_dropped_and_another_taken(rig, code):
    rig.device.fail("set", code, times=1)
    change_clock(rig)
    rig.run(60.0)
    assert rig.tuner.state == "tuning"
    assert 900 not in rig.tuner.arms
    assert rig.device.locked_mhz == (885, 885)
    assert rig.new_calls("Set") == 2


@pytest.mark.parametrize("call", ["set", "reset", "clock", "any"])
@pytest.mark.parametrize("code", GONE)
def test_a_gpu_that_is_gone_is_never_called_again(rig, code, call):
    rig.device.fail(call, code)
    change_clock(rig)
    if call == "reset":
        rig.tuner.reconfigure(TunerConfig(mode="observe"))
    with pytest.raises(GpuLostError, match=f"NVML code {code}"):
        rig.run(30.0)
    assert rig.tuner.state == "gpu lost"
    assert len(rig.driver.log()) - rig.seen <= 1
    calls = rig.all_calls
    assert not rig.run(LONG_S)
    assert rig.all_calls == calls


@pytest.mark.parametrize("reset_fails_too", [False, True])
@pytest.mark.parametrize("code", TRANSIENT)
def test_a_lock_that_fails_and_may_pass_is_tried_a_few_times(rig, code, reset_fails_too):
    rig.device.fail("set", code)
    if reset_fails_too:
        rig.device.fail("reset", code)
    change_clock(rig)
    assert not rig.run(LONG_S)
    assert rig.tuner.state == "fault"
    assert f"NVML code {code}" in rig.tuner.fault
    assert 1 <= rig.new_calls("Set") <= MAX_FAULTS
    assert rig.new_calls("Reset") <= 2 * MAX_FAULTS + 1
    assert (rig.device.locked_mhz is None) == (not reset_fails_too)


@pytest.mark.parametrize("code", TRANSIENT)
def test_one_that_passes_is_forgotten(rig, code):
    rig.device.fail("set", code, times=1)
    change_clock(rig)
    assert rig.run(120.0)
    assert (rig.tuner.state, rig.tuner.fault) == ("tuning", "")
    assert rig.device.locked_mhz == (900, 900)
    assert rig.new_calls("Set") == 2


@pytest.mark.parametrize("code", [*ARGUMENT, *PERMANENT, *TRANSIENT])
def test_a_reading_that_fails_ends_at_default_clocks(rig, code):
    rig.device.fail("clock", code)
    reads = rig.device.calls("clock")
    assert not rig.run(LONG_S)
    assert rig.tuner.state == "fault"
    assert f"NVML code {code}" in rig.tuner.fault
    expected = MAX_FAULTS if code in TRANSIENT else 1
    assert rig.device.calls("clock") - reads == expected
    assert rig.device.locked_mhz is None
