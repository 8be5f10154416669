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

    @property
    def is_steady(self) -> bool:
        """It does the same for every step of a series of decodes: it is told of the first only,
        and not of their ends."""
        ...

    def before_step(self, t_s: float, work: StepWork) -> None:
        """A step is about to begin."""
        ...

    def after_step(self, start_s: float, end_s: float) -> None:
        """It has ended."""
        ...

    def on_empty(self, t_s: float) -> None:
        """The engine has become empty."""
        ...


class VirtualEngine:
    """Drives a `BatchingEngine` on a device through simulated time, which only `run_until` moves.

    Between arrivals, completions, clock changes and the times asked for, decode steps are a series
    that is jumped over in closed form, which gives the same but for rounding. Where a hook wants
    to see each step, or the device cannot jump, the steps of a series run one by one but their
    tokens are only counted. With `jumps` false every token of every step is gone through.
    `on_finish` is called with the timings of every request that finishes.
    """

    def __init__(
        self,
        engine: BatchingEngine,
        device: StepDevice,
        on_finish: Callable[[RequestTimings], None] | None = None,
        *,
        hook: StepHook | None = None,
        jumps: bool = True,
    ) -> None:
        self._engine = engine
        self._device = device
        self._on_finish = on_finish
        self._hook = hook
        can_jump = jumps and (hook is None or hook.is_steady)
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
        while self._in_step or self._begin_step(t_s):
            end_s = self._device.step_end_s()
            if end_s is not None and end_s > t_s:
                return
            self._finish_step()
        self._start_s = max(self._start_s, t_s)

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
        if arrival_s is None or arrival_s > t_s:
            return None
        self._start_s = max(self._start_s, arrival_s)
        return self._engine.schedule(self._start_s)

    def _jump(self, device: SeriesDevice, t_s: float) -> bool:
        """Run all whole steps of decode series up to `t_s` and begin the step after them; False
        if what comes next is no step of a series."""
        while (series := self._engine.plan_decodes(self._start_s)) is not None:
            if self._hook is not None:
                self._hook.before_step(self._start_s, series.work)
            arrival_s = self._engine.next_arrival_s()
            if arrival_s is None:
                arrival_s = math.inf
            until_s = min(t_s, arrival_s)
            steps, end_s = device.run_series(self._start_s, series.work, series.steps, until_s)
            if steps:
                self._end_steps(self._engine.complete_decodes(steps, self._start_s, end_s), end_s)
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
        if self._hook is not None and self._engine.is_idle(end_s):
            self._hook.on_empty(end_s)
