"""Independent jobs over this machine's cores, with progress: same results on any number."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[float], None]
"""Called by a job with how far it is, in its own measure (simulated seconds)."""
OnProgress = Callable[[int, float], None]
"""Called with a job's number and how far it is."""
POLL_S = 0.2
MIN_BOARD = 256
"""Jobs that workers can report on without being started anew."""


class StoppedError(Exception):
    """Raised inside a job whose results nobody waits for any more."""


class Pool(Protocol):
    """Runs `work(job, report)` for every job and yields (number, result) as they are done."""

    def __call__(
        self, work: Callable[[T, Report], R], jobs: Sequence[T], on_progress: OnProgress
    ) -> Iterator[tuple[int, R]]: ...


def one_by_one(
    work: Callable[[T, Report], R], jobs: Sequence[T], on_progress: OnProgress
) -> Iterator[tuple[int, R]]:
    """A pool without processes: each job here, in order."""
    for number, job in enumerate(jobs):

        def report(done: float, number: int = number) -> None:
            on_progress(number, done)

        yield number, work(job, report)


class Processes:
    """A pool of up to `count` worker processes (`spawn`), which stay for the next call.

    Leaving the iteration early stops the jobs under way at their next report, and the workers.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor: ProcessPoolExecutor | None = None
        self._board: Any = ()

    def __call__(
        self, work: Callable[[T, Report], R], jobs: Sequence[T], on_progress: OnProgress
    ) -> Iterator[tuple[int, R]]:
        executor, board = self._started(len(jobs))
        is_done = False
        try:
            futures: dict[Future[R], int] = {
                executor.submit(_work, work, job, number): number for number, job in enumerate(jobs)
            }
            pending = set(futures)
            while pending:
                done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
                for number in range(len(jobs)):
                    on_progress(number, board[number])
                for future in sorted(done, key=lambda each: futures[each]):
                    yield futures[future], future.result()
            is_done = True
        finally:
            if not is_done:
                self._stop()

    def _started(self, jobs: int) -> tuple[ProcessPoolExecutor, Any]:
        """Workers, and a board with room for so many jobs."""
        if self._executor is None or len(self._board) <= jobs:
            self._stop()
            context = multiprocessing.get_context("spawn")
            # The last entry tells the workers to stop.
            self._board = context.RawArray("d", max(jobs, MIN_BOARD) + 1)
            self._executor = ProcessPoolExecutor(
                self.count, context, initializer=_hang_up, initargs=(self._board,)
            )
        self._board[:jobs] = [0.0] * jobs
        return self._executor, self._board

    def _stop(self) -> None:
        if self._executor is not None:
            self._board[-1] = 1.0
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


_board: Any = None


def _hang_up(board: Any) -> None:
    """In a worker: where it reports. Ctrl-C is the parent's to answer: it stops the workers."""
    global _board
    _board = board
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(work: Callable[[T, Report], R], job: T, number: int) -> R:
    def report(done: float) -> None:
        if _board[-1]:
            raise StoppedError
        _board[number] = done

    return work(job, report)


def process_count(jobs: int | None) -> int:
    """So many, None for one a core."""
    return jobs or len(os.sched_getaffinity(0))


def local_pool(jobs: int | None) -> Pool:
    """`process_count` worker processes; one job at a time needs none."""
    count = process_count(jobs)
    return one_by_one if count == 1 else Processes(count)
