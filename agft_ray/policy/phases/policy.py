"""A clock for prefill, one for decode and one for an empty engine, by models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from agft_ray.policy.base import Policy
from agft_ray.policy.goals import Goals
from agft_ray.policy.phases import load as loads
from agft_ray.policy.phases import power, step_time
from agft_ray.policy.phases.choice import Choice, Models, choose, idle_kind
from agft_ray.policy.phases.config import MAX_PROBE_SHARE, PhasesConfig
from agft_ray.policy.phases.latency import LatencyModel, left_of_switch_s
from agft_ray.policy.phases.power import PowerSums
from agft_ray.policy.phases.state import CALL_S, State
from agft_ray.policy.phases.step_time import StepTimes
from agft_ray.policy.phases.tails import Tails
from agft_ray.policy.phases.work import WorkSums, decode_work, key_of, prefill_work
from agft_ray.policy.statistics import is_evidence
from agft_ray.types import Arm, Context, Decision, Outcome, Plan, Window

SNAPSHOT_SCHEMA = 2
MIN_DECODE_STEPS, MIN_PREFILL_STEPS = 12.0, 3.0
"""Steps at a clock from which on it counts as measured: none lower is tried before."""
DRIFT_GAIN = 0.05
"""Weight of a window in the mean error of predicted step times."""
MAX_LAG = 0.5
"""Share of the time of prefill steps that may be laid to changes of the clock."""
LAG_DOUBT = 10.0
"""How uncertain that is, against what else makes a window's steps differ: 0.3 of it, to 0.03."""
UNTIMED = 7.0
"""How much more, before a change was timed on this card: it may take 0.2 s."""
FEW_WINDOWS, EARLY_PROBES = 24.0, 3.0
"""With prefill at default clocks; below, so many times the share of probes."""
SLOW_CHANGES = 0.6, 0.8
"""Of a prompt's time: what a change may take for one clock to become a pair, and a pair one."""
MIN_IDLE = 0.03
"""Share of a window that is taken to have been empty."""
MAX_ERROR = 0.4
"""Of one window; more is cut, and teaches no step times: its steps ran at another clock than it
says (a machine too busy to set it), or the engine stood still. If it lasts, it is a drift."""
RELEARN_FACTOR = 0.02
"""What is left of the evidence after a drift."""
PREFILL_PROBES = 0.1
"""Share of the windows with prefill in which that alone is at default clocks: its steps are few and
differ much, so that more of them are needed; and cost little, being a small part of the time."""
PROBE_UTILIZATION = 0.8
"""No default clocks to measure them where an engine is busier."""


class PhasesPolicy(Policy):
    """Learns step times and power by phase, predicts, and takes the cheapest plan within bounds.

    What the models are: `step_time`, `power`, `latency`; how a plan is chosen, and why walking
    down is safe: `choice`. It begins at default clocks, and returns there for a window now
    and then to measure them again. Where step times are not what was predicted for long, it begins
    anew. All depends on windows only, so `select` is pure.
    """

    name = "phases"
    keeps_goals = True

    def __init__(self, config: PhasesConfig) -> None:
        self._config = config
        self._goals = Goals()
        self._prefill, self._decode = WorkSums(), WorkSums()
        self._power = PowerSums()
        self._tails = Tails()
        self._state = State()
        self._cached: tuple[Any, Models] | None = None

    def pursue(self, goals: Goals) -> None:
        """See `Policy.pursue`: what was learned is physics, and stays."""
        self._goals = goals

    # -- choosing ------------------------------------------------------------------------------

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        if not arms:
            return Decision(None, "no arms")
        default = Plan.of(None)
        may = self._state.ready
        if not may[1]:
            return Decision.of(default, "baseline")
        if self._probe_is_due(arms):
            return Decision.of(default, "probe")
        choice = self._choose(arms, may)
        if choice is None:
            return Decision.of(default, "bound")
        plan = choice.plan
        seen = self._prefill.windows
        if may[0] and plan.prefill != plan.decode and seen[0] < PREFILL_PROBES * seen.sum():
            return Decision.of(replace(plan, prefill=None), "probe")
        return Decision.of(plan, "hold" if plan == self._now else "cheapest")

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`: the plan, which is there when a prompt comes."""
        if not arms:
            return Decision(None, "no arms")
        plan = self.select(Context((), 0), arms).chosen
        idle = min(arms) if plan.is_default else plan.idle
        return Decision.of(replace(plan, idle=idle), "idle")

    def _choose(self, arms: Sequence[int], may: tuple[bool, bool]) -> Choice | None:
        models, now = self._models(max(arms)), Plan(*self._state.held)
        return choose(self._config, self._goals, models, arms, now, may)

    def _probe_is_due(self, arms: Sequence[int]) -> bool:
        share, state = self._config.probe_share, self._state
        if self._prefill.windows[0] < FEW_WINDOWS:
            share = min(EARLY_PROBES * share, MAX_PROBE_SHARE)
        if not share or state.seen_s * share < state.probe_s:
            return False
        return self._models(max(arms)).load.utilization < PROBE_UTILIZATION

    @property
    def _now(self) -> Plan:
        return Plan(*self._state.now)

    def _models(self, top_mhz: float) -> Models:
        key = self._state.windows, self._state.relearned, top_mhz
        if self._cached is None or self._cached[0] != key:
            prefill, decode = self._step_times(top_mhz)
            load = loads.load_of(self._state.load, prefill, decode)
            lowest = prefill.lowest_mhz, decode.lowest_mhz
            powers = power.fit(self._power, top_mhz, math.log1p(load.others), lowest)
            state = self._state
            self._cached = (
                key,
                Models(prefill, decode, powers, load, state.switch_s, state.is_one, self._tails),
            )
        return self._cached[1]

    def _step_times(self, top_mhz: float) -> tuple[StepTimes, StepTimes]:
        """Of prefill and of decode, as surely as they are known at the load of now: a batch that
        has just grown may be one that default clocks have not seen."""
        prefill, decode = loads.works_of(self._state.load)
        latest = np.array(self._state.decode_work)
        scales = step_time.DECODE_SCALES
        fit = step_time.fit
        return (
            fit(self._prefill, top_mhz, MIN_PREFILL_STEPS, works=[prefill]),
            fit(self._decode, top_mhz, MIN_DECODE_STEPS, works=[decode, latest], scales=scales),
        )

    def _current(self) -> Models | None:
        """Those that the plan of now was chosen by; none if it was chosen without any."""
        if self._cached is None or self._cached[0][:2] != (
            self._state.windows,
            self._state.relearned,
        ):
            return None
        return self._cached[1]

    # -- learning ------------------------------------------------------------------------------

    def update(self, outcome: Outcome) -> None:
        """See `Policy.update`."""
        if not is_evidence(outcome):
            return
        window = outcome.window
        plan = window.plan or Plan.of(window.arm)
        state, config = self._state, self._config
        errors = self._errors(window, plan)
        self._notice_drift(errors, plan)
        self._prefill.forget(config.forgetting)
        self._decode.forget(config.forgetting)
        self._power.scale(config.forgetting)
        self._learn_steps(window, plan, errors)
        self._learn_power(window, plan)
        self._learn_tails(window)
        totals = loads.totals_of(window)
        running = loads.averaged(np.array(state.load), totals, window.duration_s, config.memory_s)
        state.load = running.tolist()
        state.now = plan.arms
        if not plan.is_default:
            kept = state.held[0] if state.ready[0] and plan.prefill is None else plan.prefill
            state.held = kept, plan.decode, plan.idle
        state.is_one = window.gpus > 1 or self._changes_too_slowly()
        state.windows += 1
        state.probe_s = window.duration_s
        if window.clock_change_s is not None:
            state.switch_s, state.is_timed = CALL_S + window.clock_change_s, True
        state.ready = (
            state.ready[0] or self._prefill.default_steps() >= config.baseline_prefill_steps,
            state.ready[1] or self._decode.default_steps() >= config.baseline_decode_steps,
        )
        at_default = plan.is_default or not all(state.ready)
        state.seen_s = 0.0 if at_default else state.seen_s + window.duration_s

    def _changes_too_slowly(self) -> bool:
        """Whether a prompt is mostly computed before its clock is there. A pair that is given up
        for that is not taken again before changes are clearly quicker."""
        models = self._current()
        if models is None or models.load.prompt_s <= 0:
            return self._state.is_one
        high = SLOW_CHANGES[0] if self._state.is_one else SLOW_CHANGES[1]
        return self._state.switch_s > high * models.load.prompt_s

    def _learn_steps(self, window: Window, plan: Plan, errors: tuple[float, float]) -> None:
        prefill, decode, state = window.prefill_steps, window.decode_steps, self._state
        if prefill.steps and prefill.time_s > 0 and abs(errors[0]) <= MAX_ERROR:
            lag_s = self._lag_s(window, plan)
            time_s = prefill.time_s - lag_s
            doubt = LAG_DOUBT if state.is_timed else UNTIMED * LAG_DOUBT
            weight = 1.0 / (1.0 + (doubt * lag_s / time_s) ** 2)
            work = prefill_work(window)
            self._prefill.add(key_of(plan.prefill), work, time_s, prefill.steps, weight)
        if decode.steps and decode.time_s > 0 and abs(errors[1]) <= MAX_ERROR:
            work = decode_work(window)
            state.decode_work = work.tolist()
            self._decode.add(key_of(plan.decode), work, decode.time_s, decode.steps)

    def _lag_s(self, window: Window, plan: Plan) -> float:
        """Time that the steps with prefill lost as they began at the clocks before their own."""
        models = self._current()
        if models is None:
            return 0.0
        decode = window.decode_steps
        step_s = decode.time_s / decode.steps if decode.steps else 0.0
        times = models.prefill
        clocks = [times.top_mhz if arm is None else float(arm) for arm in plan.arms]
        lost = times.lost(np.array(clocks[:1]), np.array(clocks[1:]))
        switch_s = self._state.switch_s
        lag_s = window.rises.from_decode * left_of_switch_s(step_s, switch_s) * lost[0]
        lag_s += window.rises.from_idle * switch_s * lost[1]
        return float(min(lag_s, MAX_LAG * window.prefill_steps.time_s))

    def _learn_power(self, window: Window, plan: Plan) -> None:
        duration_s = window.duration_s
        prefill_s, decode_s = window.prefill_steps.time_s, window.decode_steps.time_s
        if duration_s <= 0 or not window.iterations or prefill_s + decode_s <= 0:
            return
        # Steps are counted when they end: more time than there was is of the window before.
        scale = max(1.0, (prefill_s + decode_s) / duration_s) * duration_s
        shares = [prefill_s / scale, decode_s / scale]
        shares.append(max(0.0, 1.0 - sum(shares)))
        if shares[2] < MIN_IDLE:  # rather steps that count in the window after
            busy = shares[0] + shares[1]
            shares = [shares[0] / busy, shares[1] / busy, 0.0]
        steps = window.decode_steps
        batch = steps.tokens / steps.steps if steps.steps else 1.0
        x = power.exposure(shares, (plan.prefill, plan.decode), idle_kind(plan, None), batch)
        self._power.add(x, window.mean_power_w, shares[2] * duration_s)

    def _learn_tails(self, window: Window) -> None:
        models = self._current()
        if models is not None:
            seen = LatencyModel(models.load, self._state.switch_s).seen
            self._tails.add(window, seen, self._config.memory_s)

    def _errors(self, window: Window, plan: Plan) -> tuple[float, float]:
        """Log of the times of prefill and decode steps by what the models say; 0 where they cannot.

        At a clock not measured yet, by the worst that can be."""
        models, prefill, decode = self._current(), window.prefill_steps, window.decode_steps
        if models is None or not all(self._state.ready):
            return 0.0, 0.0
        prefill_s = prefill.time_s - self._lag_s(window, plan)
        return (
            _error(models.prefill, plan.prefill, prefill_s, prefill_work(window)),
            _error(models.decode, plan.decode, decode.time_s, decode_work(window)),
        )

    def _notice_drift(self, seen: tuple[float, float], plan: Plan) -> None:
        """Average the errors at clocks already measured."""
        models, errors = self._current(), list(self._state.errors)
        if models is None:
            return
        for i, times in enumerate((models.prefill, models.decode)):
            if seen[i] and (plan.arms[i] or times.top_mhz) >= times.lowest_mhz:
                error = max(-MAX_ERROR, min(MAX_ERROR, seen[i]))
                errors[i] += DRIFT_GAIN * (error - errors[i])
        self._state.errors = errors[0], errors[1]
        if max(map(abs, errors)) > self._config.max_drift:
            self._begin_anew()

    def _begin_anew(self) -> None:
        for sums in (self._prefill, self._decode, self._power):
            sums.scale(RELEARN_FACTOR)
        self._state.errors = 0.0, 0.0
        self._state.ready = False, False
        self._state.relearned += 1

    # -- sharing, keeping, telling -------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """The whole state; see `Policy.snapshot`."""
        return {
            "schema": SNAPSHOT_SCHEMA,
            "settings": self._config.model_dump(mode="json"),
            "state": self._state.model_dump(mode="json"),
            "prefill": self._prefill.snapshot(),
            "decode": self._decode.snapshot(),
            "power": self._power.snapshot(),
            "tails": self._tails.snapshot(),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; see `Policy.restore`."""
        expected = {"schema": SNAPSHOT_SCHEMA, "settings": self._config.model_dump(mode="json")}
        for name, value in expected.items():
            if snapshot.get(name) != value:
                raise ValueError(
                    f"snapshot: {name} is {snapshot.get(name)}, this policy has {value}; start anew"
                )
        try:
            state = State.model_validate(snapshot["state"])
            prefill, decode = (WorkSums.restored(snapshot[name]) for name in ("prefill", "decode"))
            powers = PowerSums.restored(snapshot["power"])
            tails = Tails.restored(snapshot["tails"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"snapshot of phases is malformed: {error!r}") from None
        self._state, self._power = state, powers
        self._prefill, self._decode, self._tails = prefill, decode, tails
        self._cached = None

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        state = self._state
        learning = not self._state.ready[1]
        phase = "learn" if learning else "tune"
        prefill, decode, idle = state.now
        return {
            "phase": phase,
            "prefill_sm_clock_mhz": prefill,
            "decode_sm_clock_mhz": decode,
            "idle_sm_clock_mhz": idle,
            "switch_s": round(state.switch_s, 4),
            "step_time_errors": [round(error, 4) for error in state.errors],
            "relearned": state.relearned,
        }


def _error(times: step_time.StepTimes, arm: Arm, time_s: float, work: np.ndarray) -> float:
    clock = np.array([times.top_mhz if arm is None else float(arm)])
    is_known = clock[0] >= times.lowest_mhz
    slowdown = times.expected(clock) if is_known else times.slowdown(clock)
    expected_s = times.base_s(work) * float(slowdown[0])
    return math.log(time_s / expected_s) if expected_s > 0 and time_s > 0 else 0.0
