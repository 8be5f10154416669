"""A fleet over several processes: the same as in one, as long as replicas share no experience."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from agft_ray.virtual.replica import FleetSetup, Listeners, ReplicaTotals
from agft_ray.virtual.routers import build_router
from agft_ray.virtual.worker import Arrival, serve
from agft_ray.workloads.requests import Request

ROUND_REQUESTS = 2048
"""Requests handed out before the workers are waited for, and what happened is told."""


class Workers:
    """A fleet's replicas, spread over freshly started processes; to be closed.

    They go in rounds: each is handed its part, then all answers are waited for, so that no two
    processes ever wait for the other to read.
    """

    def __init__(
        self, count: int, setup: FleetSetup, listeners: Listeners, wanted: Sequence[str]
    ) -> None:
        self.rejected = 0
        self._setup, self._listeners = setup, listeners
        self._router = build_router(setup.router, setup.replicas, setup.seed)
        self._count = min(count, setup.replicas)
        context = multiprocessing.get_context("spawn")
        links = _links(context, self._count)
        self._orders: list[Connection] = []
        self._processes = []
        for number in range(self._count):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(there, setup, number, links[number], wanted), daemon=True
            )
            process.start()
            there.close()
            self._orders.append(here)
            self._processes.append(process)
        for link in itertools.chain.from_iterable(each.values() for each in links):
            link.close()

    def run(self, requests: Iterable[Request], on_progress: Callable[[float], None]) -> float:
        """Simulate until every request is answered; the time then, on the grid."""
        now_s, is_under_way = 0.0, False
        for arrivals in _rounds(self._routed(requests)):
            parts = [(self._part(arrivals, number),) for number in range(self._count)]
            if is_under_way:  # only now: the next round was made ready meanwhile
                self._finish()
                on_progress(now_s)
            now_s, is_under_way = arrivals[-1][1].arrival_s, True
            self._start("take", parts)
        if is_under_way:
            self._finish()
        grid_s = self._setup.grid_s
        windows = math.ceil(max(self._setup.duration_s, now_s) / grid_s)
        while not all(self._round("advance_to", windows * grid_s)):
            windows += 1
        on_progress(windows * grid_s)
        return windows * grid_s

    def totals(self) -> list[ReplicaTotals]:
        """End the run; what came of each replica."""
        found: dict[int, ReplicaTotals] = {}
        for part in self._round("close"):
            found |= part
        return [found[index] for index in range(self._setup.replicas)]

    def cpu_s(self) -> list[float]:
        """CPU seconds that each process has used."""
        return self._round("cpu_s")

    def close(self) -> None:
        """End the processes, wherever they are."""
        for connection in self._orders:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def _routed(self, requests: Iterable[Request]) -> Iterator[Arrival]:
        for number, request in enumerate(requests):
            yield number, request, self._router.candidates()

    def _part(self, arrivals: Sequence[Arrival], number: int) -> list[Arrival]:
        """Those that concern the replicas of one worker."""
        count = self._count
        return [each for each in arrivals if any(i % count == number for i in each[2])]

    def _round(self, name: str, *arguments: Any) -> list[Any]:
        """Have every worker do the same; what they answer."""
        self._start(name, [arguments] * self._count)
        return self._finish()

    def _start(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        for connection, given in zip(self._orders, arguments, strict=True):
            connection.send((name, *given))

    def _finish(self) -> list[Any]:
        """What all workers answer; tells what happened meanwhile, as one process would."""
        results, told, rejected = zip(*(_answer(each) for each in self._orders), strict=True)
        self.rejected = sum(rejected)
        events = itertools.chain.from_iterable(told)
        for _, listener, what in sorted(events, key=lambda event: event[0]):
            getattr(self._listeners, listener)(*what)
        return list(results)


def _links(context: Any, count: int) -> list[dict[int, Connection]]:
    """For each worker its connections to the others, by number."""
    links: list[dict[int, Connection]] = [{} for _ in range(count)]
    for one, other in itertools.combinations(range(count), 2):
        links[one][other], links[other][one] = context.Pipe()
    return links


def _rounds(arrivals: Iterator[Arrival]) -> Iterator[list[Arrival]]:
    while batch := list(itertools.islice(arrivals, ROUND_REQUESTS)):
        yield batch


def _answer(orders: Connection) -> tuple[Any, Any, int]:
    """Raises what the worker has raised."""
    try:
        result, told, rejected = orders.recv()
    except EOFError:
        raise RuntimeError("a worker process of the simulation ended unexpectedly") from None
    if isinstance(result, Exception):
        raise result
    return result, told, rejected
