"""The engine in virtual time: as fast as the machine computes, and the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agft_ray.simulation.engine import Batch, BatchingEngine, StepDevice
from agft_ray.types import EngineSample, Request, RequestTimings


class VirtualEngine:
    """Drives a `BatchingEngine` on a device through simulated time, which only `run_until` moves.

    `on_finish` is called with the timings of every request that finishes.
    """

    def __init__(
        self,
        engine: BatchingEngine,
        device: StepDevice,
        on_finish: Callable[[RequestTimings], None] | None = None,
    ) -> None:
        self._engine = engine
        self._device = device
        self._on_finish = on_finish
        self._batch: Batch | None = None
        self._start_s = 0.0
        """When the step in progress, or else the next one at the earliest, begins."""

    @property
    def drained(self) -> bool:
        """Everything submitted has finished, and no step is in progress."""
        return self._engine.is_empty and self._batch is None

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests for their arrival times; raises `ValueError` as `BatchingEngine.add`."""
        for request in requests:
            self._engine.add(request)

    def run_until(self, t_s: float) -> None:
        """Process everything due up to `t_s`. A step that ends later stays in progress, so that
        clocks may be changed at `t_s` and re-time it."""
        while self._ensure_step(t_s):
            end_s = self._device.step_end_s()
            if end_s is not None and end_s > t_s:
                return
            self._finish_step()
        self._start_s = max(self._start_s, t_s)

    def sample(self, t_s: float) -> EngineSample:
        """The engine's statistics, stamped `t_s`."""
        return self._engine.sample(t_s)

    def _ensure_step(self, t_s: float) -> bool:
        """Begin a step if none is in progress; False if nothing arrives by `t_s`."""
        if self._batch is None:
            self._batch = self._engine.schedule(self._start_s) or self._first_batch(t_s)
            if self._batch is None:
                return False
            self._device.begin_step(self._start_s, self._batch.work)
        return True

    def _first_batch(self, t_s: float) -> Batch | None:
        """After an idle gap."""
        arrival_s = self._engine.next_arrival_s()
        if arrival_s is None or arrival_s > t_s:
            return None
        self._start_s = max(self._start_s, arrival_s)
        return self._engine.schedule(self._start_s)

    def _finish_step(self) -> None:
        assert self._batch is not None
        end_s = self._device.finish_step()
        events = self._engine.complete(self._batch, self._start_s, end_s)
        self._batch, self._start_s = None, end_s
        for event in events:
            if event.timings is not None and self._on_finish is not None:
                self._on_finish(event.timings)
