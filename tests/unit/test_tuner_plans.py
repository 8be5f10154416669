"""The loop with plans of several clocks, on scripted parts in virtual time."""

from dataclasses import replace
from itertools import pairwise

import pytest

from agft_ray.errors import GpuTransientError
from agft_ray.switch import MAX_CHANGES_PER_S
from agft_ray.types import Decision, Phase, Plan, Rises
from unit.test_tuner import Bench

PREFILL, DECODE, IDLE = Phase.PREFILL, Phase.DECODE, Phase.IDLE
PLAN = Plan(1500, 1230, 210)


class PlanningBench(Bench):
    """Its policy chooses plans in turn; a switch tells what the engine does now and then."""

    def __init__(self, *plans, **settings):
        super().__init__(**settings)
        self.plans = plans or (PLAN,)
        self.policy.select = lambda context, arms: Decision.of(self._plan(), "planned")
        self.policy.select_idle = self.policy.select
        self.switch_every_s, self.told = None, [DECODE, PREFILL]
        read = self.gpu.read
        # The scripted one's energy is that of the present clock throughout, and would go backwards.
        self.gpu.read = lambda: replace(read(), energy_j=200.0 * self.clock.now_s())

    def _plan(self):
        return self.plans[len(self.policy.outcomes) % len(self.plans)]

    def push(self):
        super().push()
        every_s = self.__dict__.get("switch_every_s")
        if every_s and round(self.clock.now_s() / 0.1) % round(every_s / 0.1) == 0:
            self.told.reverse()
            self.tuner.enter(self.told[0])


def test_a_decision_of_one_clock_is_a_plan_of_it():
    assert Decision(1230, "x").chosen == Plan.of(1230)
    assert Decision.of(Plan.of(1230), "x") == Decision(1230, "x")
    assert (Decision.of(PLAN, "x").arm, Decision.of(PLAN, "x").chosen) == (1230, PLAN)


def test_a_window_tells_how_often_prompts_had_their_clock_set_and_from_where():
    bench = PlanningBench()
    bench.run(6.0)
    for phase in (DECODE, PREFILL, PREFILL, DECODE, PREFILL, IDLE, PREFILL):
        bench.tuner.enter(phase)
    bench.run(4.0)
    told = [outcome.window.rises for outcome in bench.policy.outcomes]
    assert Rises(from_decode=2, from_idle=1) in told
    assert sum(each.from_decode for each in told) == 2


def test_a_plan_of_one_clock_has_none_to_rise_from():
    bench = PlanningBench(Plan.of(1230))
    bench.run(6.0)
    for phase in (DECODE, PREFILL, IDLE, PREFILL):
        bench.tuner.enter(phase)
    bench.run(4.0)
    assert {outcome.window.rises for outcome in bench.policy.outcomes} == {Rises()}


def test_until_a_switch_tells_prompts_have_their_clock():
    bench = PlanningBench()
    bench.run(20.0)
    assert bench.gpu.calls == [None, 1500]


def test_what_the_engine_does_has_its_clock_at_once():
    bench = PlanningBench()
    bench.run(6.0)
    for phase, arm in ((DECODE, 1230), (IDLE, 210), (PREFILL, 1500), (DECODE, 1230)):
        bench.tuner.enter(phase)
        assert bench.gpu.locked == arm
    bench.tuner.enter(DECODE)
    assert bench.gpu.calls == [None, 1500, 1230, 210, 1500, 1230]
    assert (bench.tuner.control.changes, bench.tuner.control.phase_changes) == (5, 4)


def test_windows_in_which_the_clock_was_switched_are_evidence_about_the_plan():
    bench = PlanningBench()
    bench.run(6.0)
    seen, bench.switch_every_s = len(bench.records), 0.3
    bench.run(20.0)
    windows = [record.window for record in bench.records[seen + 1 :]]
    assert len(windows) >= 9
    assert None not in windows
    assert {(window.plan, window.arm) for window in windows} == {(PLAN, 1230)}
    last = bench.policy.outcomes[-1]
    assert (last.requested, last.arm, last.window.plan) == (1230, 1230, PLAN)


def test_a_change_of_phase_has_no_settling_and_one_of_plan_has():
    bench = PlanningBench(PLAN, Plan(1800, 1230, 210), settle_s=0.5)
    bench.run(6.0)
    bench.switch_every_s = 0.3
    bench.run(30.0)
    good = [record for record in bench.records if record.window]
    for before, after in pairwise(good):
        assert after.window.start_s == pytest.approx(before.t_s + 0.5, abs=0.11)


def test_somebody_elses_lock_is_still_noticed():
    bench = PlanningBench()
    bench.run(6.0)
    bench.switch_every_s = 0.3
    bench.run(4.0)
    bench.switch_every_s = None
    bench.run(2.0)
    bench.gpu.locked = 900
    seen = len(bench.records)
    bench.run(4.0)
    assert any("somebody else" in r.note or "changed" in r.note for r in bench.records[seen:])
    bench.run(4.0)
    assert bench.gpu.locked in PLAN.arms


@pytest.mark.parametrize("cause", ["holdout", "throttled", "silent", "cut off", "slo"])
def test_default_clocks_end_the_plan_and_nothing_is_switched_then(cause):
    bench = PlanningBench(slo={"tpot_s": 0.05}, slo_windows=2, cooldown_windows=8)
    bench.run(6.0)
    bench.switch_every_s = 0.3
    bench.run(4.0)
    match cause:
        case "holdout":
            bench.tuner.holdout = True
        case "throttled":
            bench.gpu.reasons = 0x20
        case "silent":
            bench.silent = True
        case "cut off":
            bench.tuner.is_cut_off = True
        case "slo":
            bench.itl_s = 1.0
    bench.run(11.0)
    assert bench.tuner.control.plan == Plan.of(None)
    calls = len(bench.gpu.calls)
    for phase in (DECODE, IDLE, PREFILL):
        bench.tuner.enter(phase)
    assert bench.gpu.calls[calls:] == []
    assert bench.gpu.locked is None


def test_a_fault_on_the_way_is_the_loops_and_ends_in_default_clocks():
    bench = PlanningBench()
    bench.run(6.0)
    bench.gpu.lock_error = GpuTransientError("busy")
    bench.tuner.enter(DECODE)
    assert bench.tuner.state == "tuning"
    bench.run(0.5)
    assert (bench.tuner.state, bench.gpu.locked) == ("fault", None)
    bench.gpu.lock_error = None
    bench.run(12.0)
    assert bench.gpu.locked == 1230


def test_no_more_changes_a_second_than_stated_and_what_was_put_off_is_caught_up_with():
    bench = PlanningBench()
    bench.run(6.0)
    calls = len(bench.gpu.calls)
    for _ in range(500):
        for phase in (DECODE, PREFILL):
            bench.tuner.enter(phase)
    assert len(bench.gpu.calls) - calls <= MAX_CHANGES_PER_S + 1
    assert bench.gpu.locked == 1500, "the way up is never put off"
    put_off = bench.tuner.control.phase_changes_put_off
    assert 2 * (500 - put_off) == len(bench.gpu.calls) - calls
    bench.tuner.enter(DECODE)
    assert bench.gpu.locked == 1500
    bench.run(2.0)
    assert bench.gpu.locked == 1230
    assert bench.tuner.control.phase_changes_put_off == put_off + 1, "a phase counts once"


def test_a_switch_that_tells_of_no_prompt_while_first_tokens_come_is_not_believed():
    bench = PlanningBench()
    bench.run(6.0)
    bench.tuner.enter(IDLE)
    bench.run(4.0)
    assert bench.gpu.locked == 210, "nothing but decodes, as far as is known"
    push, first_tokens = bench.inbox.push, 0

    def push_with_prompts(sample):
        nonlocal first_tokens
        first_tokens += 1
        push(replace(sample, ttft_sum_s=0.1 * first_tokens, ttft_count=first_tokens))

    bench.inbox.push = push_with_prompts
    bench.run(4.5)
    assert bench.gpu.locked == 1500
    assert any("the switch has told of no prompt" in record.note for record in bench.records)
    bench.tuner.enter(DECODE)
    assert bench.gpu.locked == 1230, "it tells again"


def test_a_clock_that_the_gpu_does_not_keep_is_found_while_switching():
    bench = PlanningBench()
    bench.gpu.runs_at = lambda locked: 1000 if locked == 1230 else locked or 2100
    bench.run(6.0)
    bench.tuner.enter(DECODE)
    bench.run(8.0)
    assert 1230 not in bench.tuner.arms
    assert 1500 in bench.tuner.arms


def test_a_clock_just_set_is_not_held_against_the_gpu():
    bench = PlanningBench(settle_s=0.3)
    bench.run(6.0)
    since = {"s": 0.0, "locked": None}
    read = bench.gpu.read

    def slow_read():  # the clock follows 0.2 s late
        if bench.gpu.locked != since["locked"]:
            since.update(s=bench.clock.now_s(), locked=bench.gpu.locked)
        late = bench.clock.now_s() - since["s"] < 0.2
        sample = read()
        return replace(sample, sm_clock_mhz=2100) if late else sample

    bench.gpu.read = slow_read
    bench.switch_every_s = 0.4
    bench.run(30.0)
    assert bench.tuner.arms == bench.gpu.arms
    assert bench.tuner.control.state == ""


def test_in_observe_nothing_is_switched():
    bench = PlanningBench(mode="observe")
    bench.switch_every_s = 0.3
    bench.run(10.0)
    assert bench.gpu.calls == []
    assert bench.decisions[-1].chosen == PLAN


def test_the_end_resets_whatever_the_engine_does():
    bench = PlanningBench(Plan(None, 1230, 210))
    bench.run(6.0)
    bench.tuner.enter(DECODE)
    assert bench.gpu.locked == 1230
    bench.tuner.enter(PREFILL)
    assert bench.gpu.locked is None
    bench.loop.close()
    bench.tuner.enter(DECODE)
    assert bench.gpu.locked is None
