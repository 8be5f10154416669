"""Which replica gets a request: as Ray Serve chooses, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, Protocol

RouterName = Literal["power_of_two", "round_robin"]


class Router(Protocol):
    """Chooses among `replicas` numbered from 0. `ongoing(replica)` says how many requests one has
    not answered yet, and is asked about as few as possible."""

    def choose(self, ongoing: Callable[[int], int]) -> int:
        """The replica that gets the next request, given how many each has under way."""
        ...


class PowerOfTwo:
    """Of two replicas picked at random, the one with fewer ongoing requests: as Ray Serve does."""

    def __init__(self, replicas: int, seed: int) -> None:
        self._replicas = range(replicas)
        self._random = random.Random(f"{seed}:power_of_two")

    def choose(self, ongoing: Callable[[int], int]) -> int:
        """The first pick where both have as many."""
        if len(self._replicas) == 1:
            return 0
        return min(self._random.sample(self._replicas, 2), key=ongoing)


class RoundRobin:
    """One after the other."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._next = 0

    def choose(self, ongoing: Callable[[int], int]) -> int:
        """Each in turn."""
        chosen, self._next = self._next, (self._next + 1) % self._replicas
        return chosen


def build_router(name: RouterName, replicas: int, seed: int) -> Router:
    """A router by name."""
    return PowerOfTwo(replicas, seed) if name == "power_of_two" else RoundRobin(replicas)
