"""A group of GPUs is one GPU: all or none."""

import pytest

from agft_ray.clock import ManualClock
from agft_ray.errors import (
    GpuError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    LeaseHeldError,
)
from agft_ray.gpu.group import GpuGroup, combine
from agft_ray.types import Actuator, EventReason, GpuSample


class Member:
    """A fake GPU that records calls and fails on demand."""

    def __init__(self, name, arms=(600, 900, 1200), model="M", actuator=Actuator.SM_CLOCK):
        self.uuid, self.arms, self.model, self.actuator = name, arms, model, actuator
        self.locked, self.claimed = None, False
        self.errors = {}
        self.clock = ManualClock()

    def _try(self, what):
        if what in self.errors:
            raise self.errors[what]

    def claim(self):
        self._try("claim")
        self.claimed = True

    def release(self):
        self.claimed = False
        self._try("release")

    def lock(self, arm):
        self._try("lock")
        self.locked = arm

    def reset(self):
        self._try("reset")
        self.locked = None

    def read(self):
        self._try("read")
        return GpuSample(1.0, 100.0, 10.0, 0.9, self.locked or 2000, self.locked)


@pytest.fixture
def members():
    return [Member(f"GPU-{k}") for k in range(4)]


def test_all_are_locked_and_reset(members):
    group = GpuGroup(members)
    group.claim()
    group.lock(900)
    assert [m.locked for m in members] == [900] * 4
    assert group.read().locked == 900
    group.reset()
    assert [m.locked for m in members] == [None] * 4
    group.release()
    assert not any(m.claimed for m in members)


def test_one_that_cannot_be_locked_rolls_all_back_and_its_error_is_raised(members):
    group = GpuGroup(members)
    members[2].errors["lock"] = GpuPermissionError("not this one")
    with pytest.raises(GpuPermissionError, match="not this one"):
        group.lock(900)
    assert [m.locked for m in members] == [None] * 4


def test_a_roll_back_reaches_all_even_if_one_cannot_be_reset(members):
    group = GpuGroup(members)
    members[3].errors["lock"] = GpuPermissionError("first")
    members[0].errors["reset"] = GpuTransientError("second")
    with pytest.raises(GpuPermissionError, match="first"):
        group.lock(900)
    assert [m.locked for m in members] == [900, None, None, None]
    with pytest.raises(GpuTransientError, match="second"):
        group.reset()


def test_claims_are_all_or_none(members):
    group = GpuGroup(members)
    members[3].errors["claim"] = LeaseHeldError("pid 7")
    with pytest.raises(LeaseHeldError):
        group.claim()
    assert not any(m.claimed for m in members)


def test_release_reaches_all(members):
    group = GpuGroup(members)
    group.claim()
    members[0].errors["release"] = GpuError("no")
    with pytest.raises(GpuError, match="no"):
        group.release()
    assert not any(m.claimed for m in members)


def test_arms_are_those_in_common():
    group = GpuGroup([Member("a", arms=(600, 900, 1200)), Member("b", arms=(900, 1200, 1500))])
    assert group.arms == (900, 1200)
    assert group.uuid == "a,b"


@pytest.mark.parametrize(
    "other",
    [
        Member("b", model="another"),
        Member("b", arms=(1, 2)),
        Member("b", actuator=Actuator.POWER_LIMIT),
    ],
)
def test_unlike_gpus_are_no_group(other):
    with pytest.raises(GpuNotSupportedError, match="equal ones"):
        GpuGroup([Member("a"), other])


def sample(t_s=10.0, *, power_w=100.0, energy_t_s=10.0, clock=900, locked=900, reasons=0, **more):
    return GpuSample(
        t_s=t_s,
        power_w=power_w,
        energy_j=power_w * energy_t_s,
        energy_t_s=energy_t_s,
        sm_clock_mhz=clock,
        locked=locked,
        event_reasons=EventReason(reasons),
        **more,
    )


def test_energy_of_counters_that_tick_apart_is_exact_for_equal_power():
    power_w = 250.0
    parts = [sample(power_w=power_w, energy_t_s=t) for t in (9.91, 9.95, 9.99, 9.94)]
    whole = combine(parts)
    assert whole.energy_j == pytest.approx(4 * power_w * whole.energy_t_s, rel=1e-12)
    assert whole.power_w == 1000.0


def test_the_slowest_clock_and_every_reason_count_and_idle_only_if_all_are():
    parts = [sample(clock=1200, reasons=0x1), sample(clock=900, reasons=0x20)]
    whole = combine(parts)
    assert whole.sm_clock_mhz == 900
    assert whole.event_reasons == EventReason.SW_THERMAL
    both_idle = combine([sample(reasons=0x1), sample(reasons=0x1)])
    assert both_idle.event_reasons == EventReason.GPU_IDLE


def test_a_lock_that_not_all_have_is_none():
    assert combine([sample(locked=900), sample(locked=None)]).locked is None


def test_the_worst_source_marks_the_reading():
    whole = combine([sample(), sample(power_source="average", energy_source="integrated")])
    assert (whole.power_source, whole.energy_source) == ("average", "integrated")
