"""What the work of a window would have cost at the best clocks: a counterfactual without noise.

Only a simulator can tell, and nothing of it may reach a policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from agft_ray.settings import SloConfig
from agft_ray.simulation.decode_series import DecodeCurve, decode_curve
from agft_ray.simulation.physics import (
    busy_power_w,
    clock_under_cap,
    idle_power_w,
    step_time_s,
)
from agft_ray.simulation.profiles import ActivityDecode, GpuProfile, ModelProfile
from agft_ray.simulation.work_done import WorkDone

ROUNDING = 1e-9
"""A bound counts as exceeded beyond this, relative to it."""


class Cost(NamedTuple):
    """Of steps at one clock."""

    time_s: float
    above_j: float
    """Energy above that of idling meanwhile, at the best idle clock."""


@dataclass(frozen=True, slots=True)
class WindowRegret:
    """A window's energy against that at the best clocks."""

    best_energy_j: float
    regret_j: float
    """Energy beyond it; what was saved by exceeding a bound is not subtracted."""
    is_over_bound: bool
    """Steps with prefill, or the others, took longer than they may."""


class _Phase(NamedTuple):
    best_j: float = 0.0
    """Above idle."""
    regret_j: float = 0.0
    is_over: bool = False


class BestClocks:
    """Finds the constant clocks (prefill, decode, idle) that suit the work of each window best.

    Best is the least energy over the window's duration W for the very steps that ran in it:

        E* = P0 W + min_f [E_p(f) - P0 T_p(f)] + min_f [E_d(f) - P0 T_d(f)]

    P0 is the least idle power in W; T and E are time in s and energy in J of the steps with prefill
    (p) and of the others (d) with clock f locked, under the power cap. Either clock must keep a
    bound: T(f) at most `1 + bound` of the time at default clocks, or, where the SLO bounds
    TTFT (p) or TPOT (d), that for the mean step; at least default clocks' time in any case.

    Changes of clock are free; batches and arrivals stay as they were. What exceeds W is taken from
    idle time later. Cost above idle is taken to fall and then rise with the clock, so that each
    search starts where the last one ended.
    """

    def __init__(
        self, gpu: GpuProfile, model: ModelProfile, slo: SloConfig, bound: float = 0.10
    ) -> None:
        self._gpu, self._model, self._slo, self._bound = gpu, model, slo, bound
        self._clocks = gpu.supported_sm_clocks_mhz
        idle_w = (idle_power_w(gpu.power, clock, model.spinning_activity) for clock in self._clocks)
        self._idle_w = model.tensor_parallel * min(idle_w)
        self._lines: dict[tuple[int, int], _Line] = {}
        self._by_activity = isinstance(gpu.power.decode, ActivityDecode)
        """Power of steps with prefill depends on the clock alone."""
        self._capped: dict[int, tuple[int, float]] = {}
        """Clock and power in W of steps with prefill, by the clock that is locked."""
        self._cap_left: dict[int, int] = {}
        """By the batch size of decode steps, 0 for steps with prefill."""
        self._prefill_at = self._decode_at = len(self._clocks) - 1

    def regret(self, done: WorkDone, duration_s: float, energy_j: float) -> WindowRegret:
        """Of a window so long that took so much energy: what it took less `E*`.

        It is the sum over prefill, decode and idle, where a phase that exceeded its bound has no
        less than 0.
        """
        prefill, decode = self._prefill(done), self._decode(done)
        idle_s = duration_s - done.busy_s
        idle_j = energy_j - done.prefill_j - done.decode_j
        return WindowRegret(
            best_energy_j=self._idle_w * duration_s + prefill.best_j + decode.best_j,
            regret_j=prefill.regret_j + decode.regret_j + idle_j - self._idle_w * idle_s,
            is_over_bound=prefill.is_over or decode.is_over,
        )

    def _prefill(self, done: WorkDone) -> _Phase:
        if not done.prefill:
            return _Phase()
        slo_s, steps = self._slo.ttft_s, sum(share for _, share in done.prefill)
        search = _Search(lambda clock: self.prefill_cost(done, clock), self._clocks)
        limit_s = search.limit_s(None if slo_s is None else steps * slo_s, self._bound)
        self._prefill_at = search.best(limit_s, self._prefill_at)
        return self._phase(search.cost(self._prefill_at), limit_s, done.prefill_s, done.prefill_j)

    def _decode(self, done: WorkDone) -> _Phase:
        if not done.decode:
            return _Phase()
        slo_s, steps = self._slo.tpot_s, sum(steps for steps, _ in done.decode.values())
        search = _Search(lambda clock: self.decode_cost(done, clock), self._clocks)
        limit_s = search.limit_s(None if slo_s is None else steps * slo_s, self._bound)
        self._decode_at = search.best(limit_s, self._decode_at)
        return self._phase(search.cost(self._decode_at), limit_s, done.decode_s, done.decode_j)

    def _phase(self, best: Cost, limit_s: float, spent_s: float, spent_j: float) -> _Phase:
        regret_j = spent_j - self._idle_w * spent_s - best.above_j
        is_over = spent_s > limit_s * (1.0 + ROUNDING)
        return _Phase(best.above_j, max(regret_j, 0.0) if is_over else regret_j, is_over)

    def prefill_cost(self, done: WorkDone, sm_clock_mhz: int) -> Cost:
        """Of the steps with prefill, with this clock locked: exact, step by step."""
        gpu, model = self._gpu, self._model
        time_s = energy_j = 0.0
        capped = self._capped.get(sm_clock_mhz)
        for work, share in done.prefill:
            if capped is None or not self._by_activity:
                in_step_w = functools.partial(busy_power_w, gpu, model, work)
                capped = self._capped[sm_clock_mhz] = self._under_cap(in_step_w, sm_clock_mhz, 0)
            clock, power_w = capped
            step_s = share * step_time_s(model, work, clock)
            time_s += step_s
            energy_j += power_w * step_s
        return self._cost(time_s, energy_j)

    def decode_cost(self, done: WorkDone, sm_clock_mhz: int) -> Cost:
        """Of the steps that only decode: exact, but that the power cap is that of the mean context
        of a batch size (it matters where power depends on the context)."""
        time_s = energy_j = 0.0
        for sequences, (steps, context_tokens) in done.decode.items():
            line = self._line(sequences, sm_clock_mhz)
            if line.may_exceed_cap:
                line = self._capped_line(sequences, round(context_tokens / steps), sm_clock_mhz)
            time_s += steps * line.base_s + context_tokens * line.per_token_s
            energy_j += steps * line.base_j + context_tokens * line.per_token_j
        return self._cost(time_s, energy_j)

    def _cost(self, time_s: float, gpu_j: float) -> Cost:
        return Cost(time_s, self._model.tensor_parallel * gpu_j - self._idle_w * time_s)

    def _under_cap(
        self, power_w: Callable[[int], float], target: int, kind: int
    ) -> tuple[int, float]:
        """The clock of `clock_under_cap` and its power in W, asking for few.

        What the cap left of the last step of this kind is tried first.
        """
        cap_w, last = self._gpu.power.cap_w, self._cap_left.get(kind, target)
        if last < target and (last_w := power_w(last)) <= cap_w:
            if power_w(last + self._gpu.sm_clock_step_mhz) > cap_w:
                return last, last_w
        elif last >= target and (target_w := power_w(target)) <= cap_w:
            return target, target_w
        clock = self._cap_left[kind] = clock_under_cap(self._gpu, power_w, target)
        return clock, power_w(clock)

    def _capped_line(self, sequences: int, context_tokens: int, sm_clock_mhz: int) -> _Line:
        def power_w(clock: int) -> float:
            return self._line(sequences, clock).curve.power_w(context_tokens)

        clock, _ = self._under_cap(power_w, sm_clock_mhz, sequences)
        return self._line(sequences, clock)

    def _line(self, sequences: int, sm_clock_mhz: int) -> _Line:
        line = self._lines.get((sequences, sm_clock_mhz))
        if line is None:
            curve = decode_curve(self._gpu, self._model, sequences, sm_clock_mhz)
            line = _Line(curve, self._gpu.power.cap_w)
            self._lines[sequences, sm_clock_mhz] = line
        return line


class _Line:
    """A `DecodeCurve`, made to be read often."""

    __slots__ = ("base_j", "base_s", "curve", "may_exceed_cap", "per_token_j", "per_token_s")

    def __init__(self, curve: DecodeCurve, cap_w: float) -> None:
        self.curve = curve
        _, self.base_s, self.per_token_s, self.base_j, self.per_token_j = curve
        # Power is monotone in the context, so it lies between that of none and that of all.
        self.may_exceed_cap = self.base_j > cap_w * self.base_s or (
            self.per_token_j > cap_w * self.per_token_s
        )


class _Search:
    """Looks for the cheapest clock within a bound, asking for each clock's cost once."""

    def __init__(self, cost: Callable[[int], Cost], clocks: tuple[int, ...]) -> None:
        self._cost, self._clocks = cost, clocks
        self._known: dict[int, Cost] = {}

    def cost(self, place: int) -> Cost:
        """Of the clock at this place."""
        if place not in self._known:
            self._known[place] = self._cost(self._clocks[place])
        return self._known[place]

    def limit_s(self, slo_s: float | None, bound: float) -> float:
        """The bound on the time: by the SLO, else by default clocks, which run at the highest."""
        default_s = self.cost(len(self._clocks) - 1).time_s
        return default_s * (1.0 + bound) if slo_s is None else max(slo_s, default_s)

    def best(self, limit_s: float, start: int) -> int:
        """The place of the cheapest clock that keeps the bound, downhill from `start`."""
        at, last = start, len(self._clocks) - 1
        while at < last and self.cost(at).time_s > limit_s:
            at += 1
        here = self.cost(at)
        # Clocks that the power cap makes alike cost the same: `<=` goes to the lowest of them.
        while at and (below := self.cost(at - 1)).above_j <= here.above_j:
            if below.time_s > limit_s:
                return at  # from here on cost rises
            at, here = at - 1, below
        while at < last and (above := self.cost(at + 1)).above_j < here.above_j:
            at, here = at + 1, above
        return at
