"""The doctor's measurements, on a scripted GPU in virtual time."""

import pytest

from agft_ray.clock import ManualClock
from agft_ray.errors import GpuPermissionError, GpuTransientError
from agft_ray.gpu.probe import SETTLE_LIMIT_S, probe_clocks, watch_energy_counter
from agft_ray.types import EventReason, GpuSample

CALL_S = 0.003
SETTLE_S = 0.05


class ScriptedGpu:
    """A fake: 100 W, clocks that follow a lock or reset after SETTLE_S, and faults by name."""

    uuid, model = "GPU-scripted", "scripted"
    arms = tuple(range(210, 1981, 15))

    def __init__(self, *, counter_update_s=0.1, source="counter", idle=False, busy_mhz=1980):
        self.clock = ManualClock()
        self.counter_update_s, self.source, self.idle = counter_update_s, source, idle
        self.busy_mhz = self.sm_clock_mhz = busy_mhz
        self.change = (0.0, busy_mhz)
        self.calls = []
        self.beats = 0
        self.faults = {}

    def sleep(self, time_s):
        self.clock.advance_to(self.clock.now_s() + time_s)

    def read(self):
        self._fail("read")
        now_s = self.clock.now_s()
        if now_s >= self.change[0]:
            self.sm_clock_mhz = self.change[1]
        updates = int(now_s / self.counter_update_s) if self.counter_update_s else 0
        return GpuSample(
            t_s=now_s,
            power_w=100.0,
            energy_j=1000 + updates * self.counter_update_s * 100,
            energy_t_s=now_s,
            sm_clock_mhz=210 if self.idle else self.sm_clock_mhz,
            locked=None,
            event_reasons=EventReason.GPU_IDLE if self.idle else EventReason.NONE,
            energy_source=self.source,
        )

    def claim(self):
        self._do("claim")

    def release(self):
        self._do("release")

    def lock(self, arm):
        self._do(f"lock {arm}")
        self._follow(arm)

    def reset(self):
        self._do("reset")
        self._follow(self.busy_mhz)

    def beat(self):
        self.beats += 1

    def _follow(self, sm_clock_mhz):
        self.sleep(CALL_S)
        self.change = (self.clock.now_s() - CALL_S + SETTLE_S, sm_clock_mhz)

    def _do(self, call):
        self.calls.append(call)
        self._fail(call.split()[0])

    def _fail(self, name):
        if self.faults.get(name):
            raise self.faults[name].pop(0)


def probe(gpu):
    return probe_clocks(gpu, gpu.clock, sleep=gpu.sleep)


def watch(gpu):
    return watch_energy_counter(gpu, gpu.clock, sleep=gpu.sleep)


@pytest.mark.parametrize("update_s", [0.02, 0.1, 0.3])
def test_the_counters_period_and_resolution(update_s):
    counter = watch(ScriptedGpu(counter_update_s=update_s))
    assert counter.update_period_s == pytest.approx(update_s, abs=0.004)
    assert counter.resolution_j == pytest.approx(update_s * 100)
    assert counter.changes == pytest.approx(1 / update_s, abs=1)
    assert counter.watched_s == pytest.approx(1.0, abs=0.01)
    assert counter.poll_s == pytest.approx(0.002)


def test_a_counter_that_stands_still():
    counter = watch(ScriptedGpu(counter_update_s=0))
    assert (counter.changes, counter.update_period_s, counter.resolution_j) == (0, None, None)
    assert counter.watched_s >= 1.0


def test_a_counter_that_changed_once_has_no_period():
    counter = watch(ScriptedGpu(counter_update_s=0.6))
    assert (counter.changes, counter.update_period_s) == (1, None)
    assert counter.resolution_j == 60.0


def test_without_a_counter_nobody_waits_for_it():
    gpu = ScriptedGpu(source="integrated")
    assert watch(gpu).source == "integrated"
    assert gpu.clock.now_s() == 0.0


def test_lock_and_reset_are_timed():
    gpu = ScriptedGpu()
    result = probe(gpu)
    assert gpu.calls == ["claim", "lock 1095", "reset", "reset", "release"]
    assert result.arm_mhz == 1095
    for change, sm_clock_mhz in ((result.lock, 1095), (result.reset, 1980)):
        assert change.call_s == pytest.approx(CALL_S)
        assert change.settle_s == pytest.approx(SETTLE_S, abs=0.003)
        assert (change.sm_clock_mhz, change.idle) == (sm_clock_mhz, False)


def test_a_clock_is_chosen_that_the_gpu_has_not():
    assert probe(ScriptedGpu(busy_mhz=1095)).arm_mhz == 645


def test_an_idle_gpu_hides_its_clock():
    gpu = ScriptedGpu(idle=True)
    result = probe(gpu)
    assert (result.lock.settle_s, result.reset.settle_s) == (None, None)
    assert result.lock.idle
    assert result.lock.sm_clock_mhz == 210
    assert SETTLE_LIMIT_S < gpu.clock.now_s() < SETTLE_LIMIT_S + 0.1
    assert gpu.beats > 100


@pytest.mark.parametrize("error", [GpuTransientError("flaky"), KeyboardInterrupt()])
@pytest.mark.parametrize("after_reads", [0, 1, 5])
def test_it_resets_however_it_ends(error, after_reads):
    gpu = ScriptedGpu()
    read = gpu.read

    def read_or_fail():
        gpu.faults["read"] = [error] if len(reads) == after_reads else []
        reads.append(1)
        return read()

    reads = []
    gpu.read = read_or_fail
    with pytest.raises(type(error)):
        probe(gpu)
    assert gpu.calls[-2:] == ["reset", "release"]


def test_a_lock_that_may_have_been_set_is_reset():
    gpu = ScriptedGpu()
    gpu.faults["lock"] = [GpuTransientError("no reply in time")]
    with pytest.raises(GpuTransientError, match="no reply in time"):
        probe(gpu)
    assert gpu.calls == ["claim", "lock 1095", "reset", "release"]


def test_a_refused_lock_needs_no_reset():
    gpu = ScriptedGpu()
    gpu.faults["lock"] = [GpuPermissionError("no")]
    with pytest.raises(GpuPermissionError):
        probe(gpu)
    assert gpu.calls == ["claim", "lock 1095", "release"]


@pytest.mark.parametrize("error", [GpuTransientError("flaky"), KeyboardInterrupt()])
def test_a_failing_reset_leaves_the_lease_to_the_guard(error):
    gpu = ScriptedGpu()
    gpu.faults["reset"] = [error, error]
    with pytest.raises(type(error)):
        probe(gpu)
    assert gpu.calls == ["claim", "lock 1095", "reset", "reset"]


def test_a_gpu_that_is_not_ours_is_left_alone():
    gpu = ScriptedGpu()
    gpu.faults["claim"] = [GpuTransientError("held")]
    with pytest.raises(GpuTransientError):
        probe(gpu)
    assert gpu.calls == ["claim"]


def test_an_interrupt_is_told_even_if_the_reset_fails():
    gpu = ScriptedGpu()
    gpu.faults = {"read": [KeyboardInterrupt()], "reset": [GpuTransientError("busy")]}
    with pytest.raises(KeyboardInterrupt):
        probe_clocks(gpu, gpu.clock, sleep=gpu.sleep)
    assert "release" not in gpu.calls
