"""Waiting for what may hang, such as a reset by a driver that does not answer, but not for ever.

Standard library only: the clock guard is a small process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from agft_ray.errors import GpuTransientError

T = TypeVar("T")

DEADLINE_S = 2.0
"""Wall time that a reset is waited for; it takes milliseconds where the driver answers."""


class Job(Generic[T]):
    """Something being done on a thread of its own, which does not keep the interpreter alive."""

    def __init__(self, act: Callable[[], T], name: str) -> None:
        self._act, self._name = act, name
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def runs(self) -> bool:
        """It has begun and not ended."""
        return self._thread.is_alive()

    def result(self, timeout_s: float) -> T:
        """What it returned; what it raised is raised, and `GpuTransientError` if it still runs
        after that time: it goes on then, and what it does takes effect."""
        self._thread.join(max(timeout_s, 0.0))
        if self._thread.is_alive():
            raise GpuTransientError(
                f"{self._name} has not returned within {DEADLINE_S:g} s; nobody else gets the GPU "
                "before it does"
            )
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _run(self) -> None:
        try:
            self._value.append(self._act())
        except BaseException as error:
            self._error = error


def results(jobs: Iterable[Job[T]]) -> list[T | Exception]:
    """What each of them returned or raised, waiting `DEADLINE_S` for all of them together."""
    due_s = time.monotonic() + DEADLINE_S
    outcomes: list[T | Exception] = []
    for job in jobs:
        try:
            outcomes.append(job.result(due_s - time.monotonic()))
        except Exception as error:
            outcomes.append(error)
    return outcomes
