"""One process's share of a fleet: it simulates some replicas, and settles with the other processes
who gets a request."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from agft_ray.clock import ManualClock
from agft_ray.virtual.replica import FleetSetup, Listeners, ReplicaTotals, VirtualReplica
from agft_ray.virtual.routers import fewest
from agft_ray.virtual.sharing import ExperienceSharing
from agft_ray.workloads.requests import Request

Arrival = tuple[int, Request, tuple[int, ...]]
"""A request's number, itself, and the replicas one of which gets it."""
Event = tuple[tuple[int, int], str, tuple[Any, ...]]
"""When one process would come to it (during which arrival, at which of its replicas), one of
`Listeners`' names, and what it is told."""
_SUBMITTING = sys.maxsize
"""After all its candidates have been brought to an arrival's time."""

_COUNT_BYTES = 4
_READ_BYTES = 2**16


class Link:
    """Counts to and from another worker, in the order of the arrivals that they are about."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # which closes the descriptor when it goes
        self._received = b""
        self.open: deque[Open] = deque()
        """Arrivals of which the other's count is not known yet, first come first."""

    def send(self, count: int) -> None:
        """Tell it at once: the other may wait for it."""
        os.write(self._connection.fileno(), count.to_bytes(_COUNT_BYTES))

    def receive(self) -> int:
        """The next count; waits for it if need be."""
        while len(self._received) < _COUNT_BYTES:
            more = os.read(self._connection.fileno(), _READ_BYTES)
            if not more:
                raise EOFError
            self._received += more
        count, self._received = self._received[:_COUNT_BYTES], self._received[_COUNT_BYTES:]
        return int.from_bytes(count)


class Open(NamedTuple):
    """A request that goes to one of our replicas or to another worker's, by how many each has."""

    arrival: Arrival
    ours: int
    ongoing: int
    """What ours had under way."""
    link: Link


class Share:
    """The replicas of worker `number` of as many as there are `links` and one: every so-manieth.

    `links` lead to the other workers, by number. Of a request whose candidates are on two workers
    each tells the other how many its own has under way, and both come to the same choice. Until
    the other's count is there only that replica stands still. All workers must be handed their
    arrivals in the same order: of those that are open somewhere, the first one's counts are under
    way, so that nobody waits for ever.
    """

    def __init__(
        self,
        setup: FleetSetup,
        number: int,
        links: Mapping[int, Connection],
        wanted: Sequence[str],
    ) -> None:
        self._links = {other: Link(connection) for other, connection in links.items()}
        self._workers = len(links) + 1
        self.events: list[Event] = []
        self._now = 0, 0
        """The next events'."""
        listeners = Listeners(**{name: self._listener(name) for name in wanted})
        # All of them, though only ours are moved: who is held out is settled among all.
        replicas = [VirtualReplica(setup, index, listeners) for index in range(setup.replicas)]
        ExperienceSharing(setup, replicas, ManualClock()).exchange()
        self._ours = {r.index: r for r in replicas if r.index % self._workers == number}
        self._open: dict[int, Open] = {}
        """By our replica."""
        self.rejected = 0

    def _listener(self, name: str) -> Callable[..., None]:
        return lambda *told: self.events.append((self._now, name, told))

    def take(self, arrivals: Sequence[Arrival]) -> None:
        """Let time pass until each request arrives, and take those that are for our replicas."""
        for arrival in arrivals:
            number, request, candidates = arrival
            ours = [index for index in candidates if index in self._ours]
            for index in ours:
                self._settle(index)
                self._now = number, candidates.index(index)
                self._ours[index].advance_to(request.arrival_s)
            if len(ours) == len(candidates):
                self._submit(fewest(candidates, self._ongoing), arrival)
            else:
                self._ask(arrival, ours[0])
        for index in self._ours:
            self._settle(index)

    def _ask(self, arrival: Arrival, ours: int) -> None:
        (other,) = (index for index in arrival[2] if index != ours)
        link, count = self._links[other % self._workers], self._ongoing(ours)
        link.send(count)
        self._open[ours] = Open(arrival, ours, count, link)
        link.open.append(self._open[ours])

    def _settle(self, index: int) -> None:
        """Give the replica the request that it may still get, if it is to."""
        if index not in self._open:
            return
        link = self._open[index].link
        while index in self._open:
            arrival, ours, count, _ = link.open.popleft()
            counts = dict.fromkeys(arrival[2], link.receive()) | {ours: count}
            del self._open[ours]
            if fewest(arrival[2], counts.__getitem__) == ours:
                self._submit(ours, arrival)

    def _ongoing(self, index: int) -> int:
        return self._ours[index].ongoing

    def _submit(self, index: int, arrival: Arrival) -> None:
        self._now = arrival[0], _SUBMITTING
        try:
            self._ours[index].submit(arrival[1])
        except ValueError:
            self.rejected += 1

    def advance_to(self, t_s: float) -> bool:
        """Let time pass; whether everything is answered."""
        for index, replica in self._ours.items():
            self._now = 0, index
            replica.advance_to(t_s)
        return all(replica.drained for replica in self._ours.values())

    def close(self) -> dict[int, ReplicaTotals]:
        """End the tuners; what came of each replica."""
        totals = {index: replica.totals() for index, replica in self._ours.items()}
        for replica in self._ours.values():
            replica.close()
        return totals

    def cpu_s(self) -> float:
        """CPU seconds that this process has used."""
        return time.process_time()

    def told(self) -> list[Event]:
        """What happened since the last call."""
        events, self.events = self.events, []
        return events


def serve(
    orders: Connection,
    setup: FleetSetup,
    number: int,
    links: Mapping[int, Connection],
    wanted: Sequence[str],
) -> None:
    """Do what comes in over `orders` until it is closed: a method of `Share` and its arguments.
    Each is answered with what came of it and what happened, or with the exception it raised.
    Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        share = Share(setup, number, links, wanted)
        while True:
            name, *arguments = orders.recv()
            result = getattr(share, name)(*arguments)
            orders.send((result, share.told(), share.rejected))
    except EOFError:
        return
    except Exception as error:
        orders.send((error, [], 0))
