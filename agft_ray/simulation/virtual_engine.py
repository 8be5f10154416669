"""The engine in virtual time: as fast as the machine computes, and the same on every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from agft_ray.simulation.batch import Batch, SeriesDevice, StepDevice
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.physics import StepWork
from agft_ray.types import EngineSample
from agft_ray.workloads.requests import Request, RequestTimings


class StepHook(Protocol):
    """Is told of every step, so that clocks may be changed before it."""

    def before_step(self, t_s: float, work: StepWork) -> None:
        """A step is about to begin."""
        ...

    def after_step(self, start_s: float, end_s: float) -> None:
        """It has ended."""
        ...

    def on_empty(self, t_s: float) -> None:
        """The engine has become empty."""
        ...


class PhaseListener(Protocol):
    """Is told what the engine does, and acts on it a while later. Arrivals it is told of by whoever
    submits."""

    def on_step(self, t_s: float, pending_prompts: int) -> None:
        """A step has ended, or a series of decode steps; so many prompts have no token yet."""
        ...

    def on_empty(self, t_s: float) -> None:
        """Nothing runs and nothing waits."""
        ...

    @property
    def due_s(self) -> float:
        """When it wants to act; infinite if it does not."""
        ...

    def act(self, t_s: float) -> None:
        """It is due: clocks may be changed now."""
        ...


class VirtualEngine:
    """Drives a `BatchingEngine` on a device through simulated time, which only `run_until` moves.

    Between arrivals, completions, clock changes and the times asked for, decode steps are a series
    that is jumped over in closed form, which gives the same but for rounding. Where a hook wants
    to see each step, or the device cannot jump, the steps of a series run one by one but their
    tokens are only counted. With `jumps` false every token of every step is gone through. Nothing
    changes within a series for a `phases` listener: it is told of its end, and acts when it is due.
    `on_finish` is called with the timings of every request that finishes.
    """

    def __init__(
        self,
        engine: BatchingEngine,
        device: StepDevice,
        on_finish: Callable[[RequestTimings], None] | None = None,
        *,
        hook: StepHook | None = None,
        phases: PhaseListener | None = None,
        jumps: bool = True,
    ) -> None:
        self._engine = engine
        self._device = device
        self._on_finish = on_finish
        self._hook, self._phases = hook, phases
        can_jump = jumps and hook is None
        self._series_device = device if can_jump and isinstance(device, SeriesDevice) else None
        self._counts = jumps
        self._batch: Batch | None = None
        self._decoding = False
        """The step in progress is one of a series, and there is no batch for it."""
        self._start_s = 0.0
        """When the step in progress, or else the next one at the earliest, begins."""

    @property
    def drained(self) -> bool:
        """Everything submitted has finished, and no step is in progress."""
        return self._engine.is_empty and not self._in_step

    @property
    def _in_step(self) -> bool:
        return self._decoding or self._batch is not None

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests for their arrival times; raises `ValueError` as `BatchingEngine.add`."""
        for request in requests:
            self._engine.add(request)

    def run_until(self, t_s: float) -> None:
        """Process everything due up to `t_s`. A step that ends later stays in progress, so that
        clocks may be changed at `t_s` and re-time it."""
        while True:
            goes_on = self._in_step or self._begin_step(t_s)
            limit_s = self._limit_s(t_s)
            end_s = self._device.step_end_s() if goes_on else None
            if goes_on and (end_s is None or end_s <= limit_s):
                self._finish_step()
            elif self._phases is not None and limit_s < t_s:
                self._phases.act(limit_s)
            else:
                break
        if not self._in_step:
            self._start_s = max(self._start_s, t_s)

    def _limit_s(self, t_s: float) -> float:
        """Up to when nothing but the engine changes clocks."""
        return t_s if self._phases is None else min(t_s, self._phases.due_s)

    def sample(self, t_s: float) -> EngineSample:
        """The engine's statistics, stamped `t_s`."""
        return self._engine.sample(t_s)

    def _begin_step(self, t_s: float) -> bool:
        """Begin a step, or jump to its like in a series; False if nothing arrives by `t_s`."""
        if self._series_device is not None:
            if self._jump(self._series_device, t_s):
                return True
        elif self._counts and self._begin_decode():
            return True
        self._batch = self._engine.schedule(self._start_s) or self._first_batch(t_s)
        if self._batch is None:
            return False
        if self._hook is not None:
            self._hook.before_step(self._start_s, self._batch.work)
        self._device.begin_step(self._start_s, self._batch.work)
        return True

    def _first_batch(self, t_s: float) -> Batch | None:
        """After an idle gap."""
        arrival_s = self._engine.next_arrival_s()
        if arrival_s is None or arrival_s > self._limit_s(t_s):
            return None
        self._start_s = max(self._start_s, arrival_s)
        return self._engine.schedule(self._start_s)

    def _jump(self, device: SeriesDevice, t_s: float) -> bool:
        """Run all whole steps of decode series up to `t_s` and begin the step after them; False
        if what comes next is no step of a series."""
        while (series := self._engine.plan_decodes(self._start_s)) is not None:
            arrival_s = self._engine.next_arrival_s()
            if arrival_s is None:
                arrival_s = math.inf
            until_s = min(self._limit_s(t_s), arrival_s)
            steps, end_s = device.run_series(self._start_s, series.work, series.steps, until_s)
            if steps:
                finished = self._engine.complete_decodes(steps, self._start_s, end_s)
                self._end_steps(finished, end_s)
            if steps < series.steps and self._start_s < arrival_s:
                self._engine.begin_decode()
                self._decoding = True
                device.begin_step(self._start_s, series.after(steps).work)
                return True
        return False

    def _begin_decode(self) -> bool:
        """Begin the next step of a decode series; False if what comes next is none of one."""
        series = self._engine.plan_decodes(self._start_s)
        if series is None:
            return False
        self._engine.begin_decode()  # first: a hook finds the step's KV blocks taken
        self._decoding = True
        if self._hook is not None:
            self._hook.before_step(self._start_s, series.work)
        self._device.begin_step(self._start_s, series.work)
        return True

    def _finish_step(self) -> None:
        start_s, end_s = self._start_s, self._device.finish_step()
        if self._hook is not None:
            self._hook.after_step(start_s, end_s)
        if self._batch is None:
            finished = self._engine.complete_decodes(1, start_s, end_s)
        else:
            events = self._engine.complete(self._batch, start_s, end_s)
            finished = [event.timings for event in events if event.timings is not None]
        self._batch, self._decoding = None, False
        self._end_steps(finished, end_s)

    def _end_steps(self, finished: list[RequestTimings], end_s: float) -> None:
        self._start_s = end_s
        if self._on_finish is not None:
            for timings in finished:
                self._on_finish(timings)
        is_idle = self._engine.is_idle(end_s)
        if self._hook is not None and is_idle:
            self._hook.on_empty(end_s)
        if self._phases is None:
            return
        if is_idle:
            self._phases.on_empty(end_s)
        else:
            self._phases.on_step(end_s, self._engine.pending_prompts(end_s))
