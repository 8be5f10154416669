"""The engine in wall time: an asyncio driver that keeps to absolute simulated deadlines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from agft_ray.clock import Clock
from agft_ray.simulation.batch import StepListener
from agft_ray.simulation.engine import Batch, BatchingEngine, StepDevice, TokenEvent
from agft_ray.types import EngineSample
from agft_ray.workloads.requests import Request


@dataclass(slots=True)
class _Stream:
    """Tokens on their way to one client."""

    events: list[TokenEvent] = field(default_factory=list)
    error: Exception | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.ready.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ready.set()

    async def take(self) -> list[TokenEvent]:
        """What was pushed since the last call, at least one event; then raises the error given."""
        await self.ready.wait()
        if self.error is None:
            self.ready.clear()
        elif not self.events:
            raise self.error
        taken, self.events = self.events, []
        return taken


class WallEngine:
    """Drives a `BatchingEngine` on a device in step with `clock`.

    A step begins exactly where the one before ended, in simulated time, even when the event loop
    runs late, so that the mean speed holds; what arrives after that moment waits for the next
    step. `on_wake` is called when the engine goes from empty to busy, `phases` is told of arrivals
    and steps. Everything belongs to the event loop that awaits `run`.
    """

    def __init__(
        self,
        engine: BatchingEngine,
        device: StepDevice,
        clock: Clock,
        *,
        on_wake: Callable[[], None] | None = None,
        phases: StepListener | None = None,
    ) -> None:
        self._engine = engine
        self._device = device
        self._clock = clock
        self._on_wake, self._phases = on_wake, phases
        self._submitted = asyncio.Event()
        self._streams: dict[str, _Stream] = {}
        self._stopped: Exception | None = None
        self._steps = self._late_steps = 0
        self._lateness_sum_s = self._max_lateness_s = 0.0

    async def run(self) -> None:
        """Serve until cancelled. When it ends, for whatever reason, waiting requests fail."""
        try:
            await self._drive()
        except BaseException as error:
            cause = error if isinstance(error, Exception) else RuntimeError("the engine stopped")
            self._stopped = cause
            for stream in self._streams.values():
                stream.fail(cause)
            raise

    def submit(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        """The request's tokens as they are due, those of several steps together if taken late.

        The request enters the engine when the first tokens are asked for; closing or cancelling
        the iterator aborts it. Raises `ValueError` at once if it can never be served, then the
        engine's own error if that has failed.
        """
        self._engine.check(request)
        return self._stream(request)

    def sample(self) -> EngineSample:
        """The engine's statistics now."""
        return self._engine.sample(self._clock.now_s())

    def lateness(self) -> dict[str, float]:
        """How late steps complete, in wall seconds after they were due, since the start.

        Counters `steps`, `late_steps` (more than their own duration behind) and `lateness_sum_s`,
        and `max_lateness_s`.
        """
        return {
            "steps": self._steps,
            "late_steps": self._late_steps,
            "lateness_sum_s": self._lateness_sum_s,
            "max_lateness_s": self._max_lateness_s,
        }

    async def _stream(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        if self._stopped is not None:
            raise self._stopped
        was_empty = self._engine.is_empty
        self._engine.add(request)
        stream = self._streams[request.request_id] = _Stream()
        try:
            self._submitted.set()
            if self._phases is not None:
                self._phases.on_arrival()
            if was_empty and self._on_wake is not None:
                self._on_wake()
            while True:
                events = await stream.take()
                yield events
                if events[-1].timings is not None:
                    return
        finally:
            if self._streams.get(request.request_id) is stream:
                del self._streams[request.request_id]
                self._engine.abort(request.request_id)

    async def _drive(self) -> None:
        t_s = self._clock.now_s()
        while True:
            batch = self._engine.schedule(t_s)
            if batch is None:
                if self._phases is not None and self._engine.is_idle(self._clock.now_s()):
                    self._phases.on_empty()
                t_s = max(t_s, await self._next_arrival_s())
            else:
                t_s = await self._step(t_s, batch)

    async def _next_arrival_s(self) -> float:
        """Wait until a request has arrived; returns when it did."""
        while True:
            self._submitted.clear()
            arrival_s = self._engine.next_arrival_s()
            wait_s = None if arrival_s is None else self._wall_s_until(arrival_s)
            if arrival_s is not None and wait_s is not None and wait_s <= 0:
                return arrival_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._submitted.wait()

    async def _step(self, start_s: float, batch: Batch) -> float:
        """Run one step; returns its end."""
        await self._sleep_to_end(self._device.begin_step(start_s, batch.work))
        end_s = self._device.finish_step()
        self._record_lateness(start_s, end_s)
        for event in self._engine.complete(batch, start_s, end_s):
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.push(event)
        if self._phases is not None and not self._engine.is_empty:
            self._phases.on_step(self._engine.pending_prompts(self._clock.now_s()))
        return end_s

    async def _sleep_to_end(self, predicted_s: float) -> None:
        end_s: float | None = predicted_s
        while end_s is not None:
            wait_s = self._wall_s_until(end_s)
            await asyncio.sleep(max(wait_s, 0.0))
            if wait_s <= 0:
                return
            end_s = self._device.step_end_s()

    def _record_lateness(self, start_s: float, end_s: float) -> None:
        late_s = max(-self._wall_s_until(end_s), 0.0)
        self._steps += 1
        self._late_steps += late_s * self._clock.speed > end_s - start_s
        self._lateness_sum_s += late_s
        self._max_lateness_s = max(self._max_lateness_s, late_s)

    def _wall_s_until(self, t_s: float) -> float:
        return (t_s - self._clock.now_s()) / self._clock.speed
