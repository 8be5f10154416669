"""Open-loop replay of a workload against an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from agft_ray.errors import AgftError, ConfigError
from agft_ray.replay.endpoint import Endpoint, Exchange, described, open_session
from agft_ray.replay.result import ReplayResult, RequestRow, ServerStatus
from agft_ray.workloads.requests import Request

SETTLE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replay is."""

    sent: int
    done: int
    """Answered in full, failed or interrupted."""
    failed: int
    elapsed_s: float
    """Simulated seconds since the start."""
    elapsed_wall_s: float
    status: ServerStatus | None
    """The newest status of the server, if it has any."""


async def replay(
    requests: Iterable[Request],
    *,
    url: str,
    model: str | None = None,
    speed: float | None = None,
    duration_s: float | None = None,
    timeout_s: float = 600.0,
    on_progress: Callable[[Progress], None] | None = None,
    poll_s: float = 1.0,
) -> ReplayResult:
    """Send every request at its arrival time, whatever became of the earlier ones.

    `requests` is read lazily and must be in order of arrival, arrival times counting from the
    start of the replay in simulated seconds. `speed` is simulated seconds per wall second (None:
    what the server's `/agft/status` says, else 1), `model` is by default the first of `/v1/models`.
    Requests that arrive after `duration_s` (simulated) are not sent. `timeout_s` (per request) and
    `poll_s` (between looks at the status) are wall seconds; `on_progress` is called every `poll_s`.

    A request that fails is a row with its error. Cancellation, which is what `asyncio.run` makes
    of Ctrl-C, ends the replay: the result says `interrupted` and holds what there is. Raises the
    process's soft limit of open files to the hard one, since each request may need a connection.

    Raises `ConfigError` for an invalid parameter, and `AgftError` without aiohttp or if the server
    must be asked for the speed or the model and does not answer.
    """
    _check(speed=speed, duration_s=duration_s, timeout_s=timeout_s, poll_s=poll_s)
    async with open_session() as session:
        server = Endpoint(session, url.rstrip("/").removesuffix("/v1"))
        first = await server.first_status(required=speed is None or model is None)
        run = _Replay(
            server=server,
            model=model or await server.first_model(),
            speed=speed or (first.speed if first else 1.0),
            duration_s=float("inf") if duration_s is None else duration_s,
            timeout_s=timeout_s,
            on_progress=on_progress or (lambda progress: None),
            poll_s=poll_s,
            timeline=[first] if first else [],
        )
        return await run.run(requests)


def _check(**settings: float | None) -> None:
    problems = [
        f"{name}: must be greater than 0, got {value!r}; leave it out for the default"
        for name, value in settings.items()
        if value is not None and not value > 0
    ]
    if problems:
        raise ConfigError("replay", problems)


@dataclass(slots=True)
class _Replay:
    """One replay under way. All moments are on `time.monotonic`."""

    server: Endpoint
    model: str
    speed: float
    duration_s: float
    timeout_s: float
    on_progress: Callable[[Progress], None]
    poll_s: float
    timeline: list[ServerStatus]
    start_wall_s: float = 0.0
    wall_s: float = 0.0
    sent: int = 0
    failed: int = 0
    missed_polls: int = 0
    settled: bool = True
    rows: list[RequestRow] = field(default_factory=list)
    in_flight: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, requests: Iterable[Request]) -> ReplayResult:
        started_s = self.timeline[0].now_s if self.timeline else 0.0
        self.start_wall_s = time.monotonic()
        poller = asyncio.create_task(self._poll_forever())
        try:
            completed = await _completes(self._send_all(requests))
        finally:
            poller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await poller
        completed &= await _completes(self._settle(patient=completed))
        self._report()
        return ReplayResult(
            rows=tuple(sorted(self.rows, key=lambda row: row.arrival_s)),
            timeline=tuple(self.timeline),
            started_s=started_s,
            ended_s=started_s + self.wall_s * self.speed,
            wall_s=self.wall_s,
            speed=self.speed,
            model=self.model,
            interrupted=not completed,
            settled=self.settled,
            missed_polls=self.missed_polls,
        )

    async def _send_all(self, requests: Iterable[Request]) -> None:
        """Send what arrives, wait for the answers; if it ends early, cancel those still due."""
        try:
            await self._dispatch(requests)
            if self.in_flight:
                await asyncio.wait(self.in_flight)
        finally:
            for task in self.in_flight:
                task.cancel()
            await asyncio.gather(*self.in_flight, return_exceptions=True)
            self.wall_s = time.monotonic() - self.start_wall_s

    async def _dispatch(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.arrival_s > self.duration_s:
                return
            due_wall_s = self.start_wall_s + request.arrival_s / self.speed
            await asyncio.sleep(max(0.0, due_wall_s - time.monotonic()))
            task = asyncio.create_task(self._send(request, due_wall_s))
            self.in_flight.add(task)
            task.add_done_callback(self.in_flight.discard)

    async def _send(self, request: Request, due_wall_s: float) -> None:
        self.sent += 1
        exchange = Exchange(request, self.speed, due_wall_s, time.monotonic())
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._exchange_with_retry(exchange)
        except TimeoutError:
            exchange.status = f"timeout after {self.timeout_s:g} s"
        except Exception as error:
            exchange.status = described(error)
        finally:
            row = exchange.row()
            self.rows.append(row)
            self.failed += row.is_failed

    async def _exchange_with_retry(self, exchange: Exchange) -> None:
        """Once more if the connection was closed as we sent into it: the keep-alive race.

        Once the head of an answer has come, aiohttp reports a loss as `ClientPayloadError`.
        """
        import aiohttp

        try:
            await self.server.complete(exchange, self.model)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            exchange.retries += 1
            await self.server.complete(exchange, self.model)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self.poll_s)
            await self._poll()
            self._report()

    async def _poll(self) -> ServerStatus | None:
        """Add the present status to the time line; a server without one is not asked again."""
        if not self.timeline:
            return None
        with contextlib.suppress(AgftError):
            status = await self.server.status()
            if status is not None:
                self.timeline.append(status)
                return status
        self.missed_polls += 1
        return None

    async def _settle(self, *, patient: bool) -> None:
        """Poll until the fleet is at rest and two successive polls agree in generated tokens."""
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S * patient
        before: dict[str, int] | None = None
        while self.timeline:
            status = await self._poll()
            self.settled = status is not None and status.is_at_rest
            tokens = status.generation_tokens if status and self.settled else None
            if (tokens is not None and tokens == before) or time.monotonic() >= deadline_s:
                return
            before = tokens
            await asyncio.sleep(self.poll_s)

    def _report(self) -> None:
        elapsed_wall_s = time.monotonic() - self.start_wall_s
        self.on_progress(
            Progress(
                sent=self.sent,
                done=len(self.rows),
                failed=self.failed,
                elapsed_s=elapsed_wall_s * self.speed,
                elapsed_wall_s=elapsed_wall_s,
                status=self.timeline[-1] if self.timeline else None,
            )
        )


async def _completes(work: Coroutine[Any, Any, None]) -> bool:
    """Whether it ran to its end; False if this task was cancelled meanwhile."""
    try:
        await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        return False
    return True
