"""The one thread through which a process calls NVML, because such a call may hang."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

from agft_ray.errors import GpuTransientError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class _Call(NamedTuple):
    name: str
    started_s: float
    """On `time.monotonic`."""
    due_s: float


class NvmlThread:
    """Runs one function at a time; who waits for it waits no longer than a deadline.

    A call that hangs cannot be ended: it keeps the thread, and further calls are refused at once
    until it returns by itself; what it returns then is thrown away, its effects are not. The
    thread is a daemon, so that it does not keep the interpreter from exiting; it is started when
    first needed, and anew in a forked child.
    """

    def __init__(self) -> None:
        self._running: _Call | None
        self._start_afresh()
        os.register_at_fork(after_in_child=self._start_afresh)

    def call(
        self, function: Callable[[*Ts], T], *args: *Ts, deadline_s: float, name: str = ""
    ) -> T:
        """`function(*args)`, run on the thread; what it raises is raised here.

        Calls that come while another one runs wait for their turn, within their deadlines.
        Raises `GpuTransientError` if the result is not there after `deadline_s` wall seconds, and
        at once while an earlier call is past its deadline. `name` is what to call it in errors,
        by default the function's own.
        """
        asked_s = time.monotonic()
        name = name or getattr(function, "__name__", repr(function))
        self._refuse_if_stuck(name, asked_s)
        if not self._turn.acquire(timeout=deadline_s):
            raise GpuTransientError(f"{name} did not get its turn at NVML within {deadline_s:g} s")
        self._running = _Call(name, time.monotonic(), asked_s + deadline_s)
        result: Future[T] = Future()
        self._submit((result, function, args))
        with contextlib.suppress(TimeoutError):
            result.exception(timeout=max(asked_s + deadline_s - time.monotonic(), 0.0))
        if not result.done():
            raise GpuTransientError(f"{name} did not return from NVML within {deadline_s:g} s")
        return result.result()

    def _refuse_if_stuck(self, name: str, now_s: float) -> None:
        running = self._running
        if running is not None and now_s > running.due_s:
            raise GpuTransientError(
                f"{name} was not tried: NVML has been stuck in {running.name} for "
                f"{now_s - running.started_s:.1f} s"
            )

    def _start_afresh(self) -> None:
        self._turn = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._running = None
        self._thread: threading.Thread | None = None

    def _submit(self, job: _Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="nvml", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            result, function, args = self._jobs.get()
            value, error = _outcome(function, args)
            self._running = None
            self._turn.release()
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)


def _outcome(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, BaseException | None]:
    try:
        return function(*args), None
    except BaseException as error:
        return None, error
