"""One process's share of a fleet: it simulates some replicas, and settles with the other processes
who gets a request."""

from __future__ import annotations

import heapq
import os
import select
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

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

_COUNT = struct.Struct("<QQ")
_READ_BYTES = 2**16


class Link:
    """To and from another worker: of which arrival, how many requests its candidate has."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # which closes the descriptor when it goes
        self._received = b""

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def send(self, number: int, count: int) -> None:
        """Tell it at once: the other may wait for it."""
        os.write(self.fileno(), _COUNT.pack(number, count))

    def receive(self) -> Iterator[tuple[int, int]]:
        """All that has come; waits for it if need be."""
        more = os.read(self.fileno(), _READ_BYTES)
        if not more:
            raise EOFError
        self._received += more
        whole = len(self._received) // _COUNT.size * _COUNT.size
        yield from _COUNT.iter_unpack(self._received[:whole])
        self._received = self._received[whole:]


class Share:
    """The replicas of worker `number` of as many as there are `links` and one: every so-manieth.

    `links` lead to the other workers, by number. Of a request whose candidates are on two workers
    each tells the other how many its own has under way, and both come to the same choice. Each
    replica goes its own way through the arrivals that it is a candidate of, and stands still only
    until the other candidate has come to the same one: of all arrivals that are open, the first
    one's candidates can always go on.
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
        self._ahead: dict[int, deque[Arrival]] = {index: deque() for index in self._ours}
        """What each of ours still has to go through."""
        self._counts: dict[int, dict[int, int]] = {}
        """Of open arrivals: how many requests the candidates that have come to them have."""
        self._shared: dict[int, tuple[int, ...]] = {}
        """Candidates of the arrivals that await another worker's count."""
        self._ready: list[tuple[int, int]] = []
        """A heap of the next arrivals of our replicas that can go on, and which these are."""
        self.rejected = 0

    def _listener(self, name: str) -> Callable[..., None]:
        return lambda *told: self.events.append((self._now, name, told))

    def take(self, arrivals: Sequence[Arrival]) -> None:
        """Let time pass until each request arrives, and take those that are for our replicas."""
        for arrival in arrivals:
            number, _, candidates = arrival
            ours = [index for index in candidates if index in self._ours]
            for index in ours:
                self._ahead[index].append(arrival)
            if len(ours) < len(candidates):
                self._shared[number] = candidates
        for index in self._ours:
            self._make_ready(index)
        while self._ready or self._shared:
            self._receive()
            if self._ready:
                self._go_on(heapq.heappop(self._ready)[1])

    def _make_ready(self, index: int) -> None:
        if ahead := self._ahead[index]:
            heapq.heappush(self._ready, (ahead[0][0], index))

    def _receive(self) -> None:
        """What the others have told, without waiting if there is something else to do."""
        links = self._links.values() if self._shared else ()
        for link in select.select(links, (), (), 0 if self._ready or not links else None)[0]:
            for number, count in link.receive():
                candidates = self._shared.pop(number)
                counts = self._counts.setdefault(number, {})
                (other,) = (index for index in candidates if index not in self._ours)
                if counts:  # ours stands still for it
                    self._make_ready(*counts)
                counts[other] = count

    def _go_on(self, index: int) -> None:
        """Bring a replica to its next arrival, and beyond if all candidates have come to it."""
        number, request, candidates = self._ahead[index][0]
        counts = self._counts.setdefault(number, {})
        if index not in counts:
            self._now = number, candidates.index(index)
            self._ours[index].advance_to(request.arrival_s)
            counts[index] = self._ours[index].ongoing
            for other in candidates:
                if other not in self._ours:
                    self._links[other % self._workers].send(number, counts[index])
        if len(counts) == len(candidates):
            del self._counts[number]
            self._give(number, request, fewest(candidates, counts.__getitem__))
            for candidate in candidates:
                if candidate in self._ours:
                    self._ahead[candidate].popleft()
                    self._make_ready(candidate)

    def _give(self, number: int, request: Request, chosen: int) -> None:
        if chosen not in self._ours:
            return
        self._now = number, _SUBMITTING
        try:
            self._ours[chosen].submit(request)
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
