"""What the tuner knows of the clocks, where a call failed half way."""

import pytest

from agft_ray.clock import ManualClock
from agft_ray.clock_control import ClockControl, Obstacle
from agft_ray.errors import GpuPermissionError, GpuTransientError
from agft_ray.types import Actuator, GpuSample, Plan


class FailingGpu:
    """Remembers every write, and raises what is due for it."""

    uuid, actuator = "GPU-failing", Actuator.SM_CLOCK

    def __init__(self):
        self.writes = []
        self.lock_error = self.reset_error = None

    def claim(self):
        pass

    def release(self):
        pass

    def lock(self, arm):
        self.writes.append(arm)
        if self.lock_error:
            raise self.lock_error

    def reset(self):
        self.writes.append(None)
        if self.reset_error:
            raise self.reset_error


@pytest.fixture
def gpu():
    return FailingGpu()


@pytest.fixture
def control(gpu):
    control = ClockControl(gpu, ManualClock())
    assert control.take(0.0)
    gpu.writes.clear()  # of the reset that comes first
    return control


def running_at(sm_clock_mhz, locked):
    return GpuSample(
        t_s=0.0,
        power_w=100.0,
        energy_j=0.0,
        energy_t_s=0.0,
        sm_clock_mhz=sm_clock_mhz,
        locked=locked,
    )


def test_a_lock_that_failed_is_reset_although_nothing_counts_as_locked(control, gpu):
    gpu.lock_error = GpuTransientError("after it acted, perhaps")
    with pytest.raises(GpuTransientError):
        control.set(Plan.of(900), 0.0)
    assert control.locked is None
    control.reset_own()
    assert gpu.writes == [900, None]


def test_clocks_that_a_withdrawal_cannot_reset_are_ours_until_a_reset_succeeds(control, gpu):
    control.set(Plan.of(900), 0.0)
    gpu.lock_error, gpu.reset_error = GpuPermissionError("may not"), GpuTransientError("busy")
    control.set(Plan.of(1200), 0.0)
    assert (control.state, control.locked, control.reset_due) == ("refused", None, True)
    assert not control.let_go()
    gpu.reset_error = None
    assert control.let_go()
    control.reset_own()
    assert gpu.writes == [900, 1200, None, None, None], "not reset once more"


def test_yielding_resets_nothing(control, gpu):
    control.set(Plan.of(900), 0.0)
    control.check(running_at(1980, locked=900))
    control.check(running_at(1980, locked=900))
    assert control.state is Obstacle.YIELDED
    assert control.let_go()
    assert gpu.writes == [900]
