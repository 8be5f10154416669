"""A simulated GPU in time: clock changes, steps and energy; no I/O, no wall clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from agft_ray.simulation.decode_series import DecodeCurves, Series
from agft_ray.simulation.device_state import DeviceState
from agft_ray.simulation.noise import Noise, change_delay_s, standard_normal
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    effective_sm_clock_mhz,
    idle_power_w,
    step_time_s,
)
from agft_ray.simulation.profiles import ActivityDecode, GpuProfile, ModelProfile, NoiseProfile
from agft_ray.simulation.work_done import WorkDone
from agft_ray.types import EventReason, GpuSample

History = Callable[[float, float, int, float, StepWork | None], None]
"""Called with (start s, end s, SM clock in MHz, power in W, the step or None when idle)."""

_POWER_NOISE = 0
"""A stream of random numbers; `simulation.noise` has others."""


class _Point(NamedTuple):
    sm_clock_mhz: int
    power_w: float
    """Of all GPUs of the group."""
    step_s: float
    """How long the whole step would take here; infinite when idle."""


class Device:
    """One GPU running one LLM engine's steps; integrates its energy exactly, segment by segment.

    The GPUs of a tensor-parallel group are one device: their power and energy added up, one clock.

    Every method takes the time in seconds. The device never moves past the end of a running step
    by itself: an engine that is late in wall time begins its next step exactly there. Only when
    asked for a time more than `stall_grace_s` past it is the engine taken for dead, and the GPU
    has idled since the step's end. `history` is called for each span of constant power; `done`,
    unlike it, leaves series of decode steps in closed form, and adds up what was run. With `noise`,
    step times and counter vary as the profile's section `noise` says.
    """

    def __init__(
        self,
        profile: GpuProfile,
        model: ModelProfile,
        *,
        seed: int = 0,
        counter_update_s: float | None = None,
        noise: bool = False,
        stall_grace_s: float = 2.0,
        history: History | None = None,
        done: WorkDone | None = None,
    ) -> None:
        self.profile = profile
        self._model = model
        self._counter_update_s = counter_update_s or profile.noise.counter_update_s
        self._noise = Noise(profile.noise if noise else NoiseProfile(), seed)
        self._stall_grace_s = stall_grace_s
        self._history = history
        self._done = done
        self._state = DeviceState(seed)
        self._busy: _Point | None = None
        self._end_s: float | None = None
        self._capped: dict[tuple[int, int], tuple[int, float]] = {}
        self._idle: dict[int, _Point] = {}
        self._curves = DecodeCurves(profile, model)

    @property
    def t_s(self) -> float:
        """The time up to which energy is integrated."""
        return self._state.t_s

    @property
    def energy_j(self) -> float:
        """Energy from time 0 to `t_s`, exact and current, unlike a reading's counter."""
        return self._state.energy_j

    @property
    def sm_clock_mhz_s(self) -> float:
        """Integral of the effective SM clock from time 0 to `t_s`."""
        return self._state.sm_clock_mhz_s

    @property
    def locked(self) -> int | None:
        """The clock last asked for, or None at default clocks."""
        return self._state.locked_sm_clock_mhz

    @property
    def step_sm_clock_mhz(self) -> int | None:
        """The effective SM clock of the running step, or of the one before as it ended."""
        return None if self._busy is None else self._busy.sm_clock_mhz

    def to_state(self) -> dict[str, Any]:
        """Everything that changes, as JSON-able values."""
        return self._state.to_values()

    def from_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `to_state` gave; missing entries are as at the start."""
        self._state = DeviceState.of(state)
        self._noise = self._noise.for_seed(self._state.seed)
        self._busy = self._end_s = None

    def lock(self, t_s: float, sm_clock_mhz: int) -> None:
        """Lock the SM clock, as NVML does: in force only after a delay (log-normal, seeded).

        Takes the nearest supported clock at or below; a later call replaces one not yet in force.
        Raises `GpuArgumentError` for a clock outside the supported range.
        """
        self._change_clock(t_s, self.profile.supported_at_or_below(sm_clock_mhz))

    def reset(self, t_s: float) -> None:
        """Return to the default governor, after the same delay."""
        self._change_clock(t_s, None)

    def begin_step(self, t_s: float, work: StepWork) -> float:
        """Start a step at `t_s`, or now if the device is past that; returns its predicted end.

        A step that was never finished ends here: the engine that began it is gone.
        """
        end_s = self.step_end_s()
        if end_s is not None and end_s <= t_s:
            self.finish_step()
        self._integrate(t_s)
        s = self._state
        s.work, s.progress, s.progress_t_s = work, 0.0, s.t_s
        s.step_factor, s.steps = self._noise.factor(s.steps), s.steps + 1
        self._busy = None
        self._end_s = self._predicted_end_s()
        return self._end_s

    def step_end_s(self) -> float | None:
        """When the running step ends, with all clock changes known now; None if none runs."""
        if self._end_s is None and self._state.work is not None:
            self._end_s = self._predicted_end_s()
        return self._end_s

    def finish_step(self) -> float:
        """Move to the end of the running step and return it; the device is idle from there.

        With no step running, the time the device is at.
        """
        end_s = self.step_end_s()
        if end_s is not None:
            self._integrate(end_s)
            s = self._state
            s.work, s.idle_since_s = None, s.t_s
            self._end_s = None
        return self._state.t_s

    def run_series(
        self, t_s: float, work: StepWork, max_steps: int, until_s: float
    ) -> tuple[int, float]:
        """Decode steps in closed form, as if begun and finished one by one; see `SeriesDevice`.

        No step may be running. None is run here if a `history` wants to see each.
        """
        assert self._state.work is None, "finish the step before a series"
        self._integrate(t_s)
        s = self._state
        if self._history is not None:
            return 0, s.t_s
        if s.pending_clock_changes:
            until_s = min(until_s, s.pending_clock_changes[0][0])
        target = self._busy_target_mhz(s.active_lock_mhz)
        series = self._curves.series(work, target, max_steps).noisy(self._noise, s.steps)
        steps = series.durations_s.count_within(until_s - s.t_s, series.steps)
        if steps:
            self._accumulate_series(work, series, steps)
        return steps, s.t_s

    def advance(self, t_s: float) -> None:
        """Integrate to `t_s`, or to the end of the running step (see the class)."""
        end_s = self.step_end_s()
        if end_s is not None and t_s > end_s + self._stall_grace_s:
            self.finish_step()
            end_s = None
        self._integrate(t_s if end_s is None else min(t_s, end_s))

    def read(self, t_s: float) -> GpuSample:
        """Advance to `t_s` and read the GPU.

        Power carries noise that depends on seed and time alone; the energy counter is as of its
        last update, and exact without `noise`.
        """
        self.advance(t_s)
        s, point = self._state, self._point()
        noise = self.profile.power_noise * standard_normal(s.seed, _POWER_NOISE, t_s)
        temperature = self.profile.temperature
        gpu_w = point.power_w / self._model.tensor_parallel
        return GpuSample(
            t_s=max(t_s, s.t_s),
            power_w=point.power_w * (1.0 + noise),
            energy_j=s.counter_energy_j,
            energy_t_s=s.counter_t_s,
            sm_clock_mhz=point.sm_clock_mhz,
            locked=s.locked_sm_clock_mhz,
            event_reasons=self._event_reasons(point),
            temperature_c=temperature.zero_power_c + temperature.rise_c_per_w * gpu_w,
            gpus=self._model.tensor_parallel,
        )

    def _event_reasons(self, point: _Point) -> EventReason:
        if self._state.work is None:
            return EventReason.GPU_IDLE
        capped = point.sm_clock_mhz < self._busy_target_mhz(self._state.active_lock_mhz)
        return EventReason.SW_POWER_CAP if capped else EventReason.NONE

    def _change_clock(self, t_s: float, clock: int | None) -> None:
        self.advance(t_s)
        s = self._state
        s.clock_calls += 1
        called_s = max(t_s, s.t_s)
        # Changes already due are kept: the device may be waiting at the end of a step before them.
        s.pending_clock_changes = [p for p in s.pending_clock_changes if p[0] <= called_s]
        s.pending_clock_changes.append((called_s + self._delay_s(), clock))
        s.locked_sm_clock_mhz = clock
        self._end_s = None

    def _delay_s(self) -> float:
        s = self._state
        return change_delay_s(self.profile.clock_change, s.seed, s.clock_calls)

    def _integrate(self, until_s: float) -> None:
        s = self._state
        while True:
            while s.pending_clock_changes and s.pending_clock_changes[0][0] <= s.t_s:
                self._apply_clock(s.pending_clock_changes.pop(0)[1])
            if s.t_s >= until_s:
                return
            self._accumulate(min(until_s, self._next_change_s()), self._point())

    def _apply_clock(self, clock: int | None) -> None:
        s = self._state
        if s.work is not None:
            s.progress += (s.t_s - s.progress_t_s) / self._point().step_s
            s.progress_t_s = s.t_s
        s.active_lock_mhz = clock
        self._busy = None

    def _next_change_s(self) -> float:
        s = self._state
        change_s = s.pending_clock_changes[0][0] if s.pending_clock_changes else math.inf
        drop_s = s.idle_since_s + self.profile.governor.idle_delay_s
        if s.work is None and s.active_lock_mhz is None and s.t_s < drop_s:
            return min(change_s, drop_s)
        return change_s

    def _accumulate(self, end_s: float, point: _Point) -> None:
        s = self._state
        update_s = math.floor(end_s / self._counter_update_s) * self._counter_update_s
        if update_s > s.counter_t_s:
            s.counter_t_s = min(update_s, end_s)
            energy_j = s.energy_j + point.power_w * (s.counter_t_s - s.t_s)
            period_j = point.power_w * self._counter_update_s
            s.counter_energy_j = self._noise.counter_j(s, energy_j, period_j)
        if self._history is not None:
            self._history(s.t_s, end_s, point.sm_clock_mhz, point.power_w, s.work)
        span_s = end_s - s.t_s
        energy_j = point.power_w * span_s
        if self._done is not None and s.work is not None:
            share = span_s / point.step_s
            self._done.add(s.work, share, share * s.work.context_tokens, span_s, energy_j)
        s.energy_j += energy_j
        s.sm_clock_mhz_s += point.sm_clock_mhz * span_s
        s.t_s = end_s

    def _accumulate_series(self, first: StepWork, series: Series, steps: int) -> None:
        s, span_s = self._state, series.durations_s.total(steps)
        end_s = s.t_s + span_s
        update_s = math.floor(end_s / self._counter_update_s) * self._counter_update_s
        if update_s > s.counter_t_s:
            s.counter_t_s = min(update_s, end_s)
            energy_j = s.energy_j + series.energy_j(s.counter_t_s - s.t_s, steps)
            power_w = series.energies_j.first / series.durations_s.first
            period_j = power_w * self._counter_update_s
            s.counter_energy_j = self._noise.counter_j(s, energy_j, period_j)
        energy_j = series.energies_j.total(steps)
        if self._done is not None:
            grown = first.decode_sequences * (steps * (steps - 1) / 2)
            context_tokens = steps * first.context_tokens + grown
            self._done.add(first, steps, context_tokens, span_s, energy_j)
        s.energy_j += energy_j
        s.sm_clock_mhz_s += series.sm_clock_mhz * span_s
        s.steps += steps
        s.t_s = s.idle_since_s = end_s
        self._busy = None

    def _predicted_end_s(self) -> float:
        s = self._state
        assert s.work is not None
        t_s, left, step_s = s.progress_t_s, 1.0 - s.progress, self._point().step_s
        for change_s, clock in s.pending_clock_changes:
            if t_s + left * step_s <= change_s:
                break
            left -= (change_s - t_s) / step_s
            t_s, step_s = change_s, self._busy_point(s.work, clock).step_s
        return t_s + left * step_s

    def _point(self) -> _Point:
        s = self._state
        if s.work is None:
            return self._idle_point(self._idle_clock_mhz())
        if self._busy is None:
            self._busy = self._busy_point(s.work, s.active_lock_mhz)
        return self._busy

    def _idle_clock_mhz(self) -> int:
        s, governor = self._state, self.profile.governor
        if s.active_lock_mhz is not None:
            return s.active_lock_mhz
        waiting = s.t_s < s.idle_since_s + governor.idle_delay_s
        return self.profile.max_sm_clock_mhz if waiting else governor.idle_sm_clock_mhz

    def _idle_point(self, clock: int) -> _Point:
        if clock not in self._idle:
            gpu_w = idle_power_w(self.profile.power, clock, self._model.spinning_activity)
            power_w = gpu_w * self._model.tensor_parallel
            self._idle[clock] = _Point(clock, power_w, math.inf)
        return self._idle[clock]

    def _busy_target_mhz(self, lock: int | None) -> int:
        return self.profile.max_sm_clock_mhz if lock is None else lock

    def _busy_point(self, work: StepWork, lock: int | None) -> _Point:
        target = self._busy_target_mhz(lock)
        if not isinstance(self.profile.power.decode, ActivityDecode):
            clock, power_w = self._under_cap(work, target)
        else:
            # By activity, power depends on nothing else.
            key = (-1 if work.prefill_tokens else work.decode_sequences, target)
            if key not in self._capped:
                self._capped[key] = self._under_cap(work, target)
            clock, power_w = self._capped[key]
        step_s = self._state.step_factor * step_time_s(self._model, work, clock)
        return _Point(clock, power_w, step_s)

    def _under_cap(self, work: StepWork, target: int) -> tuple[int, float]:
        clock = effective_sm_clock_mhz(self.profile, self._model, work, target)
        power_w = busy_power_w(self.profile, self._model, work, clock)
        return clock, power_w * self._model.tensor_parallel
