"""How long changes of the clock take, from readings: and when nothing can be said of it."""

from dataclasses import replace

import pytest

from agft_ray.clock_timer import KEPT, POLL_S, ClockTimer
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import EventReason
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.workloads.generators import generate_conversation
from unit.test_tuner import Bench


@pytest.fixture
def reading(make_gpu_sample):
    """A reading of a busy GPU that is locked at 1230 MHz."""

    def make(t_s, sm_clock_mhz, **changes):
        sample = make_gpu_sample(t_s, sm_clock_mhz=sm_clock_mhz)
        return replace(sample, **({"locked": 1230} | changes))

    return make


def timed(reading, took_s, timer=None):
    """A timer that has seen one change, polled every 5 ms."""
    timer = timer or ClockTimer()
    timer.begin(1230, 10.0, reading(9.99, 2100))
    for poll in range(1, 60):
        t_s = 10.0 + poll * POLL_S
        timer.see(reading(t_s, 1230 if t_s >= 10.0 + took_s else 2100))
        if not timer.is_running:
            break
    return timer


def test_a_change_is_over_when_it_was_first_seen_to_be(reading):
    assert 0.0301 <= timed(reading, 0.0301).median_s <= 0.0301 + POLL_S


def test_of_several_the_median_of_the_last_is_told(reading):
    timer = timed(reading, 0.2)
    for took_s in (0.03, 0.03, 0.15, 0.03):
        timed(reading, took_s, timer)
    assert timer.median_s == pytest.approx(0.03, abs=POLL_S + 1e-9)
    for _ in range(KEPT):
        timed(reading, 0.1, timer)
    assert timer.median_s == pytest.approx(0.1, abs=POLL_S + 1e-9)


def test_a_slow_card_is_waited_for_twice_as_long_as_its_changes_take(reading):
    assert ClockTimer().settling_s(0.2) == timed(reading, 0.03).settling_s(0.2) == 0.2
    assert timed(reading, 0.25).settling_s(0.2) > 0.4


def test_a_clock_that_never_comes_is_unknown_and_one_that_seldom_does_takes_as_long_as_waited(
    reading,
):
    timer = ClockTimer()
    for _ in range(3):
        timer.begin(1230, 10.0, reading(9.99, 2100))
        timer.see(reading(10.1, 2100))
        timer.give_up(10.2, 0.2)
        assert (timer.is_running, timer.median_s) == (False, None)
    assert timed(reading, 0.1, timer).median_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"event_reasons": EventReason.GPU_IDLE},
        {"locked": 1500},
        {"event_reasons": EventReason.SW_POWER_CAP},
        {"event_reasons": EventReason.HW_THERMAL},
    ],
    ids=str,
)
def test_what_else_holds_the_clock_is_no_slow_change(reading, changes):
    timer = timed(reading, 0.02)
    for _ in range(KEPT):
        timer.begin(1230, 10.0, reading(9.99, 2100))
        timer.see(reading(10.1, 2100, **changes))
        timer.give_up(10.2, 0.2)
    assert timer.median_s == pytest.approx(0.02, abs=0.003)


@pytest.mark.parametrize("lock", [None, 2085], ids=["default clocks", "a clock as good as there"])
def test_what_cannot_be_seen_is_not_waited_for(reading, lock):
    timer = ClockTimer()
    timer.begin(lock, 10.0, reading(9.99, 2100))
    assert not timer.is_running


def settling(took_s, **settings):
    """A bench whose clock follows so late, and how often the GPU was read."""
    bench = Bench(1230, 1500, **settings)
    read, since, reads = bench.gpu.read, {"locked": None, "s": 0.0, "before": 2100}, []

    def late_read():
        sample, now_s = read(), bench.clock.now_s()
        if sample.locked != since["locked"]:
            since.update(s=now_s, before=since["locked"] or 2100, locked=sample.locked)
        reads.append(now_s)
        return (
            replace(sample, sm_clock_mhz=since["before"]) if now_s - since["s"] < took_s else sample
        )

    bench.gpu.read = late_read
    return bench, reads


def test_the_loop_times_changes_while_it_waits_for_them_and_reads_no_more_otherwise():
    bench, reads = settling(0.04)
    bench.run(30.0)
    windows = [record.window for record in bench.records if record.window]
    assert 0.04 <= windows[-1].clock_change_s <= 0.04 + POLL_S + 1e-9
    assert windows[0].clock_change_s is None
    changes = bench.tuner.control.changes
    assert changes > 8
    assert len(reads) <= 9 * len(windows) + changes * (0.05 / POLL_S + 1)


def test_a_clock_that_never_arrives_is_no_fault_of_the_loop():
    bench, _ = settling(1e9, settle_s=0.1)
    bench.run(8.0)
    assert bench.tuner.control.timer.median_s is None
    assert bench.tuner.fault == ""


@pytest.mark.parametrize("median_s", [0.025, 0.1])
def test_in_virtual_time_it_is_what_the_profile_says(median_s):
    profile = load_gpu_profile("rtx_a6000")
    change = profile.clock_change.model_copy(update={"median_s": median_s})
    found = []
    setup = FleetSetup(
        gpu=profile.model_copy(update={"clock_change": change}),
        model="llama-3.1-8b",
        engine=EngineConfig(),
        tuner=TunerConfig(policy={"name": "rules"}),
    )
    run_fleet(
        generate_conversation(0.5, 120.0, seed=1),
        setup,
        on_record=lambda _, record: found.append(record.window and record.window.clock_change_s),
    )
    assert found[-1] == pytest.approx(median_s, rel=0.3)
