"""Which replica gets a request: as Ray Serve chooses, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, Protocol

RouterName = Literal["power_of_two", "round_robin"]


class Router(Protocol):
    """Chooses among `replicas` numbered from 0, in two parts: which of them come into question
    does not depend on how busy they are, so that it can be known beforehand."""

    def candidates(self) -> tuple[int, ...]:
        """The replicas of which the one with the `fewest` requests gets the next; as few as
        possible."""
        ...


def fewest(candidates: tuple[int, ...], ongoing: Callable[[int], int]) -> int:
    """The replica with the fewest requests not answered yet, as `ongoing` says; the first of
    several. Asks nothing where there is no choice."""
    return candidates[0] if len(candidates) == 1 else min(candidates, key=ongoing)


class PowerOfTwo:
    """Of two replicas picked at random, the one with fewer ongoing requests: as Ray Serve does."""

    def __init__(self, replicas: int, seed: int) -> None:
        self._replicas = range(replicas)
        self._random = random.Random(f"{seed}:power_of_two")

    def candidates(self) -> tuple[int, ...]:
        """Two, or the only one."""
        if len(self._replicas) == 1:
            return (0,)
        one, other = self._random.sample(self._replicas, 2)
        return one, other


class RoundRobin:
    """One after the other."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._next = 0

    def candidates(self) -> tuple[int, ...]:
        """Each in turn."""
        chosen, self._next = self._next, (self._next + 1) % self._replicas
        return (chosen,)


def build_router(name: RouterName, replicas: int, seed: int) -> Router:
    """A router by name."""
    return PowerOfTwo(replicas, seed) if name == "power_of_two" else RoundRobin(replicas)
