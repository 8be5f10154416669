"""The loop against a scripted GPU and engine, in virtual time."""

import pytest

from agft_ray.clock import ManualClock
from agft_ray.errors import (
    GpuArgumentError,
    GpuLostError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    LeaseHeldError,
    LeaseLostError,
)
from agft_ray.policy.goals import Goals
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.energy_weight import EnergyWeight
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.tuner import MAX_FAULTS, Tuner
from agft_ray.types import Actuator, Decision, EngineSample, EventReason, GpuSample


class ScriptedGpu:
    """A fake GPU: does what it is told at once, remembers every call, fails on demand."""

    uuid, model, actuator = "GPU-scripted", "Scripted", Actuator.SM_CLOCK
    arms = tuple(range(210, 2101, 15))

    def __init__(self, clock):
        self.clock = clock
        self.locked = 1500  # left behind by somebody
        self.calls = []
        self.read_error = self.lock_error = self.reset_error = None
        self.claim_error = None
        self.claims = self.releases = 0
        self.reasons = EventReason.NONE
        self.runs_at = lambda locked: locked or 2100
        self.energy_stuck = False

    def claim(self):
        if self.claim_error:
            error = self.claim_error
            if isinstance(error, LeaseLostError):
                self.claim_error = None  # as renewed
            raise error
        self.claims += 1

    def release(self):
        self.releases += 1

    def read(self):
        if self.read_error:
            raise self.read_error
        t_s = self.clock.now_s()
        power_w = 300.0 if self.locked is None else 100.0 + self.locked / 15
        return GpuSample(
            t_s=t_s,
            power_w=power_w,
            energy_j=0.0 if self.energy_stuck else power_w * t_s,
            energy_t_s=0.0 if self.energy_stuck else t_s,
            sm_clock_mhz=self.runs_at(self.locked),
            locked=self.locked,
            event_reasons=self.reasons,
        )

    def lock(self, sm_clock_mhz):
        if self.lock_error:
            raise self.lock_error
        self.calls.append(sm_clock_mhz)
        self.locked = sm_clock_mhz

    def reset(self):
        if self.reset_error:
            raise self.reset_error
        self.calls.append(None)
        self.locked = None


class ScriptedPolicy:
    """Plays the given arms in turn and remembers what it was told."""

    name = "scripted"
    keeps_goals = False

    def __init__(self, *arms):
        self.arms = list(arms) or [1230]
        self.goals = []
        self.outcomes = []
        self.prior = None
        self.error = None

    def select(self, context, arms):
        if self.error:
            raise self.error
        return Decision(self.arms[len(self.outcomes) % len(self.arms)], "scripted")

    def select_idle(self, arms):
        return Decision(arms[0], "idle")

    def update(self, outcome):
        self.outcomes.append(outcome)

    def pursue(self, goals):
        self.goals.append(goals)

    def merge(self, prior):
        self.prior = prior


class Bench:
    """A tuner on scripted parts; `run(seconds)` drives it in steps of its own wake-ups."""

    def __init__(self, *arms, **settings):
        self.clock = ManualClock()
        self.gpu = ScriptedGpu(self.clock)
        self.inbox = EngineInbox()
        self.policy = ScriptedPolicy(*arms)
        self.records = []
        self.load = True
        self.silent = False
        self.itl_s = 0.02
        self.counters = {"tokens": 0, "itl": 0.0}
        self.tuner = Tuner(
            TunerConfig(**settings),
            gpu=self.gpu,
            engine=self.inbox,
            serve=ServeMetrics(max_age_s=10.0),
            clock=self.clock,
            policy=self.policy,
            on_record=self.records.append,
        )
        self.loop = self.tuner.run()
        self.push()

    def push(self):
        if self.silent:
            return
        if self.load:
            self.counters["tokens"] += 10
            self.counters["itl"] += 10 * self.itl_s
        tokens = self.counters["tokens"]
        self.inbox.push(
            EngineSample(
                t_s=self.clock.now_s(),
                running=int(self.load),
                generation_tokens=tokens,
                iterations=tokens,
                iteration_tokens=tokens,
                itl_sum_s=self.counters["itl"],
                itl_count=tokens,
            )
        )

    def run(self, seconds):
        end_s = self.clock.now_s() + seconds
        while self.clock.now_s() < end_s:
            wake_s = next(self.loop, None)
            if wake_s is None:
                return
            while self.clock.now_s() < wake_s:
                self.clock.advance_to(min(wake_s, self.clock.now_s() + 0.1))
                self.push()

    @property
    def decisions(self):
        return [record.decision for record in self.records]


def test_clocks_are_reset_before_anything_else_and_after_everything():
    bench = Bench(1230)
    bench.run(0.1)
    assert bench.gpu.calls == [None]
    bench.run(5.0)
    assert bench.gpu.locked == 1230
    bench.loop.close()
    assert bench.gpu.locked is None
    assert bench.tuner.state == "stopped"


def test_stopped_it_ends_within_a_fraction_of_a_window():
    bench = Bench(1230, window_s=8.0)
    bench.run(21.0)
    assert bench.gpu.locked == 1230
    bench.tuner.stop()
    bench.run(1.1)
    assert next(bench.loop, "ended") == "ended"
    assert (bench.gpu.locked, bench.tuner.state) == (None, "stopped")


def test_one_call_per_change_and_no_call_without_one():
    bench = Bench(1230)
    bench.run(30.0)
    assert bench.gpu.calls == [None, 1230]
    assert bench.tuner.control.changes == 1


def test_the_reward_is_credited_to_the_clock_that_was_observed():
    bench = Bench(1230)
    original = bench.gpu.read
    bench.gpu.read = lambda: __import__("dataclasses").replace(original(), sm_clock_mhz=1172)
    bench.run(10.0)
    outcome = bench.policy.outcomes[-1]
    assert (outcome.requested, outcome.arm) == (1230, 1170)


def test_no_window_covers_the_settling_of_a_clock():
    bench = Bench(1230, 1500, settle_s=0.5)
    bench.run(20.0)
    starts = [r.window.start_s for r in bench.records if r.window]
    changes = [r.t_s for r in bench.records if r.window]
    for changed_s, start_s in zip(changes, starts[1:], strict=False):
        assert start_s >= changed_s + 0.5 - 1e-9


def test_observe_touches_nothing_but_decides():
    bench = Bench(1230, mode="observe")
    bench.run(10.0)
    bench.loop.close()
    assert bench.gpu.calls == []
    assert bench.decisions[-1].arm == 1230
    assert {outcome.arm for outcome in bench.policy.outcomes} == {1500}, "what others locked"


def test_off_reads_nothing():
    bench = Bench(1230, mode="off")
    bench.gpu.read_error = AssertionError("off must not read")
    bench.run(10.0)
    assert bench.gpu.calls == []
    assert bench.records == []
    assert (bench.tuner.state, bench.tuner.fault) == ("off", "")


def test_a_holdout_keeps_default_clocks_and_teaches_the_baseline():
    bench = Bench(1230)
    bench.tuner.holdout = True
    bench.run(10.0)
    assert bench.gpu.calls == [None]
    assert bench.policy.outcomes[-1].arm is None


def test_missing_statistics_are_not_read_as_idle():
    bench = Bench(1230, stale_windows=2, idle_windows=1)
    bench.run(6.0)
    assert bench.gpu.locked == 1230
    bench.silent = True
    bench.run(12.0)
    assert bench.gpu.locked is None
    assert bench.tuner.state == "blind"
    assert 210 not in bench.gpu.calls
    bench.silent = False
    bench.run(8.0)
    assert bench.gpu.locked == 1230


def test_a_silent_replica_has_the_clocks_reset_at_the_loops_next_step_not_at_its_windows_end():
    bench = Bench(1230, window_s=60.0, stale_after_s=600.0)
    bench.run(70.0)
    assert bench.gpu.locked == 1230
    bench.silent = bench.tuner.is_cut_off = True
    bench.run(60.0 / 8)
    assert bench.gpu.locked is None
    assert (bench.tuner.state, bench.records[-1].note) == ("blind", "the replica is silent")
    records = len(bench.records)
    bench.run(100.0)
    assert bench.gpu.calls == [None, 1230, None]
    assert len(bench.records) == records + 1, "windows of full length from then on"
    bench.silent = bench.tuner.is_cut_off = False
    bench.run(150.0)
    assert bench.gpu.locked == 1230


def test_a_silent_replica_changes_nothing_in_observe():
    bench = Bench(1230, mode="observe")
    bench.run(10.0)
    bench.silent = bench.tuner.is_cut_off = True
    bench.run(10.0)
    assert bench.gpu.calls == []
    assert bench.tuner.state == "blind"


def test_a_frozen_energy_counter_is_no_evidence_and_ends_in_default_clocks():
    bench = Bench(1230)
    bench.run(6.0)
    seen = len(bench.policy.outcomes)
    bench.gpu.energy_stuck = True
    bench.run(12.0)
    assert len(bench.policy.outcomes) <= seen + 1
    assert bench.gpu.locked is None


def test_the_idle_clock_comes_after_empty_windows_and_goes_at_the_first_work():
    bench = Bench(1230, idle_windows=2)
    bench.run(6.0)
    bench.load = False
    bench.run(10.0)
    assert bench.gpu.locked == 210
    learned = len(bench.policy.outcomes)
    bench.run(10.0)
    assert len(bench.policy.outcomes) == learned, "an empty window taught something"
    bench.load = True
    bench.push()
    before_s = bench.clock.now_s()
    while bench.gpu.locked == 210:
        bench.run(0.01)
    assert bench.gpu.locked == 1230
    assert bench.clock.now_s() - before_s <= 0.5


@pytest.mark.parametrize("idle_windows", [1, 2, 4, 7])
def test_the_idle_clock_is_asked_for_after_exactly_so_many_empty_windows_in_a_row(idle_windows):
    bench = Bench(1230, idle_windows=idle_windows)
    bench.run(6.0)
    for _ in range(2):
        seen = len(bench.records)
        bench.load = False
        bench.run(2.0 * (idle_windows + 3))
        empty = [r for r in bench.records[seen:] if r.window is not None and r.window.is_idle]
        reasons = [record.decision.reason for record in empty[: idle_windows + 2]]
        assert reasons == ["scripted"] * (idle_windows - 1) + ["idle"] * 3
        bench.load = True
        bench.run(6.0)


def test_work_ends_an_idle_window_long_before_its_time():
    bench = Bench(1230, window_s=16.0, stale_after_s=60.0, idle_windows=1)
    bench.run(40.0)
    bench.load = False
    while bench.gpu.locked != 210:
        bench.run(0.1)
    bench.run(3.0)
    bench.load = True
    bench.run(2.1)
    assert bench.gpu.locked == 1230
    assert bench.records[-1].note == "woken"


def test_the_clock_of_an_idle_gpu_is_no_mismatch_though_it_does_not_say_that_it_idles():
    bench = Bench(1230, idle_windows=3)
    bench.run(6.0)
    bench.load = False
    while not bench.records[-1].window.is_idle:
        bench.run(0.1)
    bench.gpu.runs_at = lambda locked: 345
    bench.run(30.0)
    assert bench.gpu.calls == [None, 1230, 210]
    assert bench.tuner.arms == bench.gpu.arms


def test_empty_windows_count_from_the_very_first_one():
    bench = Bench(1230, idle_windows=3)
    bench.load = False
    bench.push()
    bench.run(10.0)
    empty = [record.decision.reason for record in bench.records if record.window is not None]
    assert empty[:4] == ["no load yet"] * 2 + ["idle"] * 2


def test_before_any_load_the_policy_is_not_asked():
    bench = Bench(1230, idle_windows=100)
    bench.load = False
    bench.push()
    bench.run(10.0)
    assert [decision.reason for decision in bench.decisions[1:]] == ["no load yet"] * 3
    assert bench.gpu.calls == [None]


@pytest.mark.parametrize("fault", [{"energy_stuck": True}, {"reasons": EventReason.SW_THERMAL}])
def test_after_a_window_without_evidence_the_clock_stays(fault):
    bench = Bench(1230, 1500, 1800, stale_windows=3)

    def next_decision():
        seen = len(bench.records)
        while len(bench.records) == seen:
            bench.run(0.1)
        return bench.decisions[-1]

    bench.run(6.0)
    chosen = next_decision()
    for name, value in fault.items():
        setattr(bench.gpu, name, value)
    assert [next_decision(), next_decision()] == [Decision(chosen.arm, "hold")] * 2
    assert bench.gpu.locked == chosen.arm


def test_throttled_windows_teach_nothing_and_two_of_them_reset():
    bench = Bench(1230, cooldown_windows=3)
    bench.run(6.0)
    seen = len(bench.policy.outcomes)
    bench.gpu.reasons = EventReason.SW_THERMAL
    bench.run(8.0)
    assert len(bench.policy.outcomes) == seen
    assert bench.gpu.locked is None
    bench.gpu.reasons = EventReason.NONE
    bench.run(4.0)
    assert bench.gpu.locked is None, "no cool-down"
    bench.run(10.0)
    assert bench.gpu.locked == 1230


def test_a_lasting_slo_violation_resets_for_a_while():
    bench = Bench(1230, slo={"tpot_s": 0.05}, slo_windows=2, cooldown_windows=3)
    bench.run(6.0)
    bench.itl_s = 0.1
    bench.run(8.0)
    assert bench.gpu.locked is None
    assert bench.tuner.state == "cooldown"
    bench.itl_s = 0.02
    bench.run(14.0)
    assert bench.gpu.locked == 1230


@pytest.mark.parametrize(("slo_windows", "cooldown_windows"), [(1, 1), (3, 2), (4, 5)])
def test_the_windows_beyond_an_slo_and_those_of_the_cool_down_are_counted_exactly(
    slo_windows, cooldown_windows
):
    settings = {"slo_windows": slo_windows, "cooldown_windows": cooldown_windows}
    bench = Bench(1230, slo={"tpot_s": 0.05}, **settings)
    bench.run(6.0)
    seen, bench.itl_s = len(bench.records), 1.0
    bench.run(40.0)
    records = [r for r in bench.records[seen:] if bench.tuner.reward.violates_slo(r.window)]
    expected = ["scripted"] * (slo_windows - 1) + ["cooldown"] * cooldown_windows + ["scripted"]
    assert [r.decision.reason for r in records][: len(expected)] == expected


def test_an_exception_of_the_policy_resets_and_the_loop_goes_on():
    bench = Bench(1230)
    bench.run(6.0)
    bench.policy.error = RuntimeError("a bug")
    bench.run(3.0)
    assert bench.gpu.locked is None
    assert bench.tuner.state == "fault"
    bench.policy.error = None
    bench.run(12.0)
    assert bench.gpu.locked == 1230


def test_faults_without_end_end_the_tuner():
    bench = Bench(1230)
    bench.policy.error = RuntimeError("a bug")
    bench.run(1000.0)
    assert next(bench.loop, "ended") == "ended"
    assert bench.gpu.locked is None
    assert bench.tuner.state == "fault"
    assert len(bench.gpu.calls) <= 2 * MAX_FAULTS + 3


@pytest.mark.parametrize(("window_s", "first_s"), [(0.5, 4.0), (2.0, 4.0), (3.0, 6.0)])
def test_the_pause_after_a_fault_doubles_with_each_in_a_row(window_s, first_s):
    bench = Bench(1230, window_s=window_s, settle_s=0.1)

    def pauses():
        while (wake_s := next(bench.loop, None)) is not None:
            if (pause_s := wake_s - bench.clock.now_s()) > window_s:
                yield pause_s
            bench.clock.advance_to(wake_s)
            bench.push()

    def observed(times):
        return [next(faults) for _ in range(times)]

    faults = pauses()
    bench.policy.error = RuntimeError("a bug")
    assert observed(3) == pytest.approx([first_s, 2 * first_s, 4 * first_s])
    bench.policy.error = None
    seen = len(bench.records)
    while len(bench.records) == seen:
        bench.clock.advance_to(next(bench.loop))
        bench.push()
    bench.policy.error = RuntimeError("a bug")
    assert observed(2) == pytest.approx([first_s, 2 * first_s]), "a step that went well counts"


def test_a_refused_lock_means_observing_from_then_on_without_further_calls():
    bench = Bench(1230)
    bench.run(6.0)
    bench.policy.arms = [900]
    bench.gpu.lock_error = GpuPermissionError("may not")
    bench.run(100.0)
    assert bench.gpu.calls == [None, 1230, None], "one lock refused, one reset"
    assert bench.gpu.locked is None
    assert (bench.tuner.state, bench.tuner.control.reason) == ("refused", "may not")
    assert bench.records[-1].window is not None, "it does not observe any more"
    bench.gpu.lock_error = None
    bench.tuner.reconfigure(TunerConfig())
    bench.run(6.0)
    assert bench.gpu.locked == 900, "new settings do not try again"


def test_a_gpu_that_must_not_be_locked_is_observed():
    bench = Bench(1230)
    bench.gpu.claim_error = GpuNotSupportedError("MIG is on")
    bench.run(10.0)
    assert bench.gpu.calls == []
    assert (bench.tuner.state, bench.tuner.control.reason) == ("refused", "MIG is on")
    assert bench.decisions[-1].arm == 1230


def test_while_another_process_has_the_gpu_it_is_observed_and_then_taken_over():
    bench = Bench(1230)
    bench.gpu.claim_error = LeaseHeldError("pid 7 has it")
    bench.run(10.0)
    assert bench.gpu.calls == []
    assert (bench.tuner.state, bench.tuner.control.reason) == ("held", "pid 7 has it")
    bench.gpu.claim_error = None
    bench.gpu.locked = None
    bench.run(6.0)
    assert bench.gpu.calls == [None, 1230]
    assert bench.tuner.state == "tuning"


def test_a_lost_lease_is_renewed_and_the_clock_set_anew():
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.locked = None  # the guard's reset
    bench.gpu.claim_error = LeaseLostError("hung for 9 s")
    bench.run(8.0)
    assert bench.gpu.calls == [None, 1230, None, 1230]
    assert bench.tuner.state == "tuning"


def test_a_clock_the_gpu_does_not_offer_is_dropped():
    bench = Bench(1230, 1500)
    bench.run(5.0)
    bench.gpu.lock_error = GpuArgumentError("no such clock")
    bench.policy.arms = [1500]
    bench.run(2.5)
    bench.gpu.lock_error = None
    assert 1500 not in bench.tuner.arms
    assert 1230 in bench.tuner.arms
    assert bench.tuner.state == "tuning"


def test_a_clock_that_the_gpu_clamps_is_set_again_once_and_then_dropped():
    bench = Bench(1230)
    bench.gpu.runs_at = lambda locked: 1005 if locked == 1230 else locked or 2100
    bench.run(20.0)
    assert 1230 not in bench.tuner.arms
    assert bench.gpu.calls[:3] == [None, 1230, 1230]
    assert all(o.arm in (None, 1005) for o in bench.policy.outcomes), "not what was observed"


def test_a_gpu_that_keeps_no_arm_is_reset_and_let_alone():
    """It holds less than asked whatever is asked: not a sign of somebody else."""
    bench = Bench(1230, 1500)
    bench.gpu.runs_at = lambda locked: 1100 if locked else 2100
    bench.run(60.0)
    assert (bench.tuner.state, bench.gpu.locked) == ("refused", None)
    assert "1100" in bench.tuner.control.reason
    assert bench.gpu.releases
    assert len(bench.gpu.calls) <= 7


@pytest.mark.parametrize("policy", [{"name": "fixed", "sm_clock_mhz": 1230}, None])
def test_clocks_that_are_all_refused_are_not_tried_for_ever(policy):
    bench = Bench(1230)
    if policy:
        bench.tuner.reconfigure(TunerConfig(policy=policy))
    attempts = []

    def refuse(arm):
        attempts.append(arm)
        raise GpuArgumentError("no such clock")

    bench.gpu.lock = refuse
    bench.run(200.0)
    assert 1 <= len(attempts) <= 4
    assert bench.gpu.locked is None
    assert bench.records[-1].window is not None
    if policy:
        assert bench.tuner.state == "refused"
        assert "no such clock" in bench.tuner.control.reason


def test_the_right_is_given_back_at_the_end_even_if_the_reset_fails():
    """Whoever watches the lease resets then: see `LeasedGpu.release`."""
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.reset_error = GpuTransientError("busy")
    bench.loop.close()
    assert bench.gpu.releases == 1


def test_somebody_elses_lock_is_yielded_to_and_not_undone():
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.runs_at = lambda locked: 1980
    bench.run(20.0)
    assert bench.tuner.state == "yielded"
    assert "1980" in bench.tuner.control.reason
    assert bench.gpu.calls == [None, 1230, 1230], "no tug-of-war, and no reset of their lock"
    assert bench.gpu.releases


def test_a_power_cap_or_an_idle_reading_is_no_mismatch():
    for reason in (EventReason.SW_POWER_CAP, EventReason.GPU_IDLE):
        bench = Bench(1230)
        bench.gpu.reasons = reason
        bench.gpu.runs_at = lambda locked: 1005 if locked else 2100
        bench.run(20.0)
        assert bench.tuner.state == "tuning"
        assert 1230 in bench.tuner.arms


def test_a_fault_while_observing_touches_nothing():
    bench = Bench(1230, mode="observe")
    bench.policy.error = RuntimeError("a bug")
    bench.run(30.0)
    assert bench.gpu.calls == []


def test_leaving_control_gives_the_right_back():
    bench = Bench(1230)
    bench.run(6.0)
    assert (bench.gpu.claims > 0, bench.gpu.releases) == (True, 0)
    bench.tuner.reconfigure(TunerConfig(mode="observe"))
    bench.run(3.0)
    assert bench.gpu.releases
    assert bench.gpu.locked is None


def test_a_gpu_without_arms_can_be_observed():
    bench = Bench(mode="observe")
    bench.gpu.arms, bench.gpu.locked = (), None
    bench.tuner.reconfigure(TunerConfig(mode="observe", idle_windows=1))
    bench.run(8.0)
    assert bench.tuner.state == "observing"
    bench.load = False
    bench.run(8.0)
    assert bench.tuner.state == "observing"
    assert bench.records[-1].window is not None


def test_a_fixed_policy_sets_what_the_actuator_is_about():
    limit = {"name": "fixed", "power_limit_w": 250}
    bench = Bench()
    with pytest.raises(ValueError, match=r"power_limit_w.*sm_clock.*sm_clock_mhz"):
        bench.tuner.reconfigure(TunerConfig(policy=limit))
    bench.gpu.arms, bench.gpu.actuator = (100, 200, 300), Actuator.POWER_LIMIT
    bench.tuner.reconfigure(TunerConfig(policy=limit))
    bench.run(10.0)
    assert bench.gpu.locked == 200
    for both_or_none in ({}, {"sm_clock_mhz": 900, "power_limit_w": 250}):
        with pytest.raises(ValueError, match=r"sm_clock_mhz.*power_limit_w"):
            TunerConfig(policy={"name": "fixed"} | both_or_none)


def test_power_limits_are_arms_and_credited_as_set():
    agft = {"name": "agft"}
    bench = Bench(300, policy=agft)
    bench.gpu.arms, bench.gpu.actuator = (100, 200, 300), Actuator.POWER_LIMIT
    bench.tuner.reconfigure(TunerConfig(min_power_limit_w=200, policy=agft))
    bench.run(10.0)
    assert bench.tuner.arms == (200, 300)
    outcome = bench.policy.outcomes[-1]
    assert (outcome.requested, outcome.arm) == (300, 300)
    with pytest.raises(ValueError, match=r"power limit.*min_power_limit_w=900.*100\.\.300 W"):
        bench.tuner.reconfigure(TunerConfig(min_power_limit_w=900, policy=agft))
    with pytest.raises(ValueError, match=r"policy phases sets SM clocks.*use policy agft"):
        bench.tuner.reconfigure(TunerConfig())


def test_a_transient_gpu_error_is_tried_again():
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.read_error = GpuTransientError("busy")
    bench.run(2.0)
    assert bench.gpu.locked is None
    assert (bench.tuner.state, bench.tuner.fault) == ("fault", "busy")
    assert bench.tuner.reading.locked == 1230, "the last one that was had"
    bench.gpu.read_error = None
    bench.run(12.0)
    assert bench.gpu.locked == 1230
    assert bench.tuner.fault == ""


def test_a_reset_that_fails_is_tried_again():
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.reset_error = GpuTransientError("busy")
    bench.tuner.reconfigure(TunerConfig(mode="observe"))
    bench.run(3.0)
    assert bench.gpu.locked == 1230
    bench.gpu.reset_error = None
    bench.run(20.0)
    assert bench.gpu.locked is None


def test_what_somebody_else_locks_is_no_evidence_and_is_put_right():
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.locked = 600
    seen = len(bench.policy.outcomes)
    bench.run(2.0)
    assert len(bench.policy.outcomes) == seen
    bench.run(4.0)
    assert bench.gpu.locked == 1230
    assert {outcome.arm for outcome in bench.policy.outcomes} == {None, 1230}


def test_quick_changes_of_settings_are_not_blindness():
    bench = Bench(1230, stale_windows=1)
    bench.run(6.0)
    for window_s in (2.0, 2.0, 2.0):
        bench.tuner.reconfigure(TunerConfig(stale_windows=1, window_s=window_s))
        bench.run(0.6)
        assert bench.gpu.locked == 1230


def test_a_lost_gpu_is_reported():
    bench = Bench(1230)
    bench.run(6.0)
    bench.gpu.read_error = bench.gpu.reset_error = GpuLostError("gone")
    with pytest.raises(GpuLostError):
        bench.run(6.0)
    assert bench.tuner.state == "gpu lost"


def test_new_settings_take_effect_within_a_fraction_of_a_window():
    bench = Bench(1230)
    bench.run(6.0)
    bench.run(1.0)
    bench.tuner.reconfigure(TunerConfig(mode="observe"))
    bench.run(0.6)
    assert bench.gpu.locked is None
    assert bench.tuner.policy is bench.policy, "what was learned is gone"


def test_settings_without_any_clock_are_refused_and_nothing_changes():
    bench = Bench(1230)
    with pytest.raises(ValueError, match=r"min_sm_clock_mhz=3000.*210\.\.2100"):
        bench.tuner.reconfigure(TunerConfig(min_sm_clock_mhz=3000))
    bench.run(6.0)
    assert bench.gpu.locked == 1230


def test_another_objective_or_slo_starts_learning_afresh():
    bench = Bench(1230)
    bench.run(6.0)
    bench.tuner.reconfigure(TunerConfig(slo={"tpot_s": 0.1}))
    bench.run(4.0)
    assert bench.tuner.policy is not bench.policy


def test_goals_reach_the_policy_when_they_change_and_what_is_no_reward_is_kept():
    bench = Bench(1230)
    bench.run(6.0)
    changed = TunerConfig(bound=0.05, slo={"e2e_s": 9.0, "statistic": "p99"})
    bench.tuner.reconfigure(changed)
    bench.run(4.0)
    assert bench.tuner.policy is bench.policy
    told = list(dict.fromkeys(bench.policy.goals))
    assert told == [Goals(), Goals(bound=0.05, e2e_s=9.0, statistic="p99")]


def test_a_policy_that_keeps_goals_is_not_reset_beyond_an_slo():
    bench = Bench(1230, slo={"tpot_s": 0.05}, slo_windows=2)
    bench.policy.keeps_goals = True
    bench.itl_s = 0.2
    bench.run(30.0)
    assert {record.decision.reason for record in bench.records[2:]} == {"scripted"}


def test_the_weight_of_energy_reaches_the_policy_as_a_goal():
    bench = Bench(1230)
    weights = iter([0.5, 0.5, 2.0])
    bench.tuner._weigh = lambda config: EnergyWeight(next(weights, 1.0), "late")
    bench.run(20.0)
    told = list(dict.fromkeys(goals.energy_weight for goals in bench.policy.goals))
    assert told == [0.5, 2.0, 1.0]
    assert bench.tuner.energy_weight.problem == "late"


def test_a_policy_that_keeps_goals_survives_another_objective():
    bench = Bench(1230)
    bench.policy.keeps_goals = True
    bench.run(6.0)
    assert bench.tuner.reward.learned_by(bench.policy) == ""
    bench.tuner.reconfigure(TunerConfig(objective="ed2p", slo={"tpot_s": 0.1}))
    bench.run(4.0)
    assert bench.tuner.policy is bench.policy


def test_a_prior_reaches_the_policy_on_the_loops_own_thread():
    bench = Bench(1230)
    bench.tuner.offer_prior("a prior")
    assert bench.policy.prior is None
    bench.run(4.0)
    assert bench.policy.prior == "a prior"


def test_bounds_limit_the_arms():
    bench = Bench(min_sm_clock_mhz=600, max_sm_clock_mhz=1500)
    assert (bench.tuner.arms[0], bench.tuner.arms[-1]) == (600, 1500)
