"""Wall time: the same tokens as in virtual time, absolute deadlines, aborts and failures."""

import asyncio
import contextlib
import time

import pytest

from agft_ray.clock import WallClock
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.simulation.wall_engine import WallEngine
from agft_ray.workloads.requests import Request

SPEED = 50.0
STEP_S = 0.5  # 10 ms of wall time


class ConstantDevice:
    """Every step takes STEP_S; a step can be stretched while it runs, or fail at its end."""

    def __init__(self):
        self.t_s, self.end_s, self.starts = 0.0, None, []
        self.error, self.stretch_s = None, 0.0

    def begin_step(self, t_s, work):
        self.t_s = max(t_s, self.t_s)
        self.starts.append(self.t_s)
        self.end_s = self.t_s + STEP_S
        return self.end_s

    def step_end_s(self):
        self.end_s, self.stretch_s = self.end_s + self.stretch_s, 0.0
        return self.end_s

    def finish_step(self):
        if self.error is not None:
            raise self.error
        self.t_s, self.end_s = self.end_s, None
        return self.t_s


def make_batching():
    return BatchingEngine(EngineConfig(kv_blocks=1000), lambda tokens, offset: 0.0)


@contextlib.asynccontextmanager
async def serving(device=None, on_wake=None, phases=None):
    clock = WallClock(speed=SPEED, origin_s=time.monotonic())
    engine = WallEngine(
        make_batching(), device or ConstantDevice(), clock, on_wake=on_wake, phases=phases
    )
    running = asyncio.create_task(engine.run())
    try:
        yield engine, clock, running
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            await running


async def until_true(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def collect(engine, request):
    return [event async for events in engine.submit(request) for event in events]


FIRST_S = 10.0  # leaves 0.2 s of wall time to get everything started
REQUESTS = [
    Request("a", FIRST_S, 3000, 8),
    Request("b", FIRST_S + 1.25, 10, 1),
    Request("c", FIRST_S + 1.6, 100, 12),
    Request("d", FIRST_S + 12.0, 100, 2),
]


def test_wall_and_virtual_time_give_the_same():
    async def in_wall_time():
        async with serving() as (engine, _, _):
            return await asyncio.gather(*(collect(engine, request) for request in REQUESTS))

    streams = asyncio.run(in_wall_time())
    finished = []
    virtual = VirtualEngine(make_batching(), ConstantDevice(), finished.append)
    virtual.submit(REQUESTS)
    virtual.run_until(100.0)
    expected = {timings.request_id: timings for timings in finished}
    for request, events in zip(REQUESTS, streams, strict=True):
        assert [event.index for event in events] == list(range(request.output_tokens))
        assert [event.timings is None for event in events[:-1]] == [True] * (len(events) - 1)
        # Arrivals are known beforehand here, so the simulated times are equal, late or not.
        assert events[-1].timings == expected[request.request_id]


def test_deadlines_are_absolute_although_the_loop_is_blocked():
    device = ConstantDevice()

    async def scenario():
        async with serving(device) as (engine, clock, _):
            stream = engine.submit(Request("a", FIRST_S, 10, 20))
            await anext(stream)
            time.sleep(0.06)  # six steps' time, with the event loop blocked
            rest = [event async for events in stream for event in events]
            return rest, clock.now_s(), engine.lateness()

    rest, end_s, lateness = asyncio.run(scenario())
    assert [event.t_s for event in rest] == [FIRST_S + STEP_S * n for n in range(2, 21)]
    assert device.starts == [FIRST_S + STEP_S * n for n in range(20)]
    assert end_s >= FIRST_S + 20 * STEP_S
    assert lateness["steps"] == 20
    assert lateness["late_steps"] >= 1
    assert 0.045 < lateness["max_lateness_s"] <= lateness["lateness_sum_s"]


def test_a_step_retimed_by_a_clock_change_is_waited_for():
    device = ConstantDevice()
    device.stretch_s = 2.0

    async def scenario():
        async with serving(device) as (engine, clock, _):
            events = await collect(engine, Request("a", FIRST_S, 10, 1))
            return events, clock.now_s()

    events, end_s = asyncio.run(scenario())
    assert events[-1].timings.e2e_s == pytest.approx(STEP_S + 2.0)
    assert end_s >= FIRST_S + STEP_S + 2.0


def test_closing_or_cancelling_the_stream_aborts_the_request():
    async def scenario():
        async with serving() as (engine, _, _):
            closed = engine.submit(Request("closed", 0.0, 10, 1000))
            await anext(closed)
            cancelled = asyncio.create_task(collect(engine, Request("cancelled", 0.0, 10, 1000)))
            await until_true(lambda: engine.sample().running == 2)
            await closed.aclose()
            cancelled.cancel()
            await asyncio.wait([cancelled])
            sample = engine.sample()
            # The ids and the engine are free for others.
            again = await collect(engine, Request("closed", 0.0, 10, 2))
            return sample, again

    sample, again = asyncio.run(scenario())
    assert sample.is_idle
    assert sample.kv_cache_usage == 0.0
    assert len(again) == 2


def test_tokens_not_taken_are_handed_over_together():
    async def scenario():
        async with serving() as (engine, _, _):
            stream = engine.submit(Request("a", 0.0, 10, 6))
            first = await anext(stream)
            await until_true(lambda: engine.sample().is_idle)
            return [first, *[events async for events in stream]]

    batches = asyncio.run(scenario())
    assert [event.index for events in batches for event in events] == list(range(6))
    assert len(batches) == 2


def test_on_wake_is_called_when_the_engine_gets_its_first_work():
    wakes = []

    async def scenario():
        async with serving(on_wake=lambda: wakes.append(1)) as (engine, _, _):
            await asyncio.gather(
                collect(engine, Request("a", 0.0, 10, 3)), collect(engine, Request("b", 0.0, 10, 3))
            )
            assert len(wakes) == 1
            await collect(engine, Request("c", 0.0, 10, 1))

    asyncio.run(scenario())
    assert len(wakes) == 2


def test_a_failure_of_the_device_reaches_every_client():
    device = ConstantDevice()
    device.error = RuntimeError("the GPU is gone")

    async def scenario():
        async with serving(device) as (engine, _, running):
            clients = [collect(engine, Request(name, 0.0, 10, 5)) for name in "ab"]
            results = await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), 5)
            with pytest.raises(RuntimeError, match="the GPU is gone"):
                await running
            with pytest.raises(RuntimeError, match="the GPU is gone"):
                await collect(engine, Request("later", 0.0, 10, 5))
            return results, engine.sample()

    results, sample = asyncio.run(scenario())
    assert [str(result) for result in results] == ["the GPU is gone"] * 2
    assert sample.is_idle


def test_stopping_the_engine_fails_its_clients():
    async def scenario():
        async with serving() as (engine, _, running):
            client = asyncio.create_task(collect(engine, Request("a", 0.0, 10, 1000)))
            await until_true(lambda: engine.sample().running == 1)
            running.cancel()
            with pytest.raises(RuntimeError, match="the engine stopped"):
                await asyncio.wait_for(client, 5)

    asyncio.run(scenario())


def test_a_request_that_can_never_be_served_is_refused_at_once():
    async def scenario():
        async with serving() as (engine, _, _):
            with pytest.raises(ValueError, match="max_model_len"):
                engine.submit(Request("a", 0.0, 8192, 1))

    asyncio.run(scenario())


class Told:
    """What a listener is told."""

    def __init__(self):
        self.events = []

    def on_arrival(self):
        self.events.append("arrival")

    def on_step(self, pending_prompts):
        self.events.append(pending_prompts)

    def on_empty(self):
        self.events.append("empty")


def test_a_listener_is_told_of_arrivals_steps_and_emptiness():
    told = Told()
    asyncio.run(_serve_two(told))
    steps = told.events[told.events.index(0) + 1 :]
    assert steps.count("arrival") == 1
    after = steps[steps.index("arrival") + 1 :]
    assert after[0] == 1, "the step that ran when it came has left it pending"
    assert 0 in after
    assert after[-1] == "empty"


async def _serve_two(told):
    async with serving(phases=told) as (engine, clock, _):
        await asyncio.sleep(0.01)
        first = asyncio.create_task(_drain(engine.submit(Request("a", clock.now_s(), 10, 6))))
        while 0 not in told.events:
            await asyncio.sleep(0.001)
        assert told.events == ["empty", "arrival", 0]
        second = asyncio.create_task(_drain(engine.submit(Request("b", clock.now_s(), 10, 2))))
        await asyncio.gather(first, second)
        await asyncio.sleep(0.02)


async def _drain(events):
    async for _ in events:
        pass
