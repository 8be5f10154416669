"""The clock guard: a small process that resets the clocks when their owner is gone.

Ray kills a worker and its direct children with SIGKILL and runs no clean-up. So the guard is
re-parented by a double fork, in a session of its own, and waits for the end of a pipe whose other
end only the owner holds: the kernel closes it however the owner dies.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Sequence

from agft_ray.errors import GpuError
from agft_ray.simulation import device_file

_RELEASE = b"r"


class Guard:
    """The owner's handle on its guard process; the clocks are safe for as long as it runs."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe: int | None = pipe
        # A forked child that kept the pipe open would keep the guard from seeing our death.
        os.register_at_fork(after_in_child=self._close)

    @classmethod
    def start(cls, paths: Sequence[str | os.PathLike[str]]) -> Guard:
        """Start a guard for the simulated GPUs in these state files, and wait until it is ready.

        Raises `GpuError` with the process's own words if it does not start.
        """
        import subprocess

        targets = [os.path.abspath(path) for path in paths]
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        waiting, pipe = os.pipe2(os.O_CLOEXEC)
        try:
            starter = subprocess.run(
                [sys.executable, "-m", "agft_ray.gpu.guard", *targets],
                stdin=waiting,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**os.environ, "PYTHONPATH": root},
                start_new_session=True,
            )
        finally:
            os.close(waiting)
        words = starter.stdout.decode(errors="replace").strip()
        if starter.returncode or not words.isdigit():
            os.close(pipe)
            raise GpuError(f"the clock guard did not start: {words[-500:] or 'it said nothing'}")
        return cls(int(words), pipe)

    @property
    def is_alive(self) -> bool:
        """Whether the guard still watches; False after `release` or if it was killed."""
        if self._pipe is None:
            return False
        poll = select.poll()
        poll.register(self._pipe, 0)
        return not poll.poll(0)

    def release(self) -> None:
        """Let the guard go without a reset: for after an explicit one. Safe to repeat."""
        if self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._pipe, _RELEASE)
            self._close()

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


def reset_clocks(target: str) -> None:
    """Return one guarded GPU to default clocks: the one place that knows what a target is."""
    device_file.request_reset(target)


def main(targets: Sequence[str]) -> None:
    """Run as the guard, with the pipe as standard input: `python -m agft_ray.gpu.guard FILE...`.

    Ends after a reset at the end of the pipe or on SIGTERM, SIGINT or SIGHUP, and without one when
    released.
    """
    if os.fork():
        os._exit(0)
    stop = _stop_signals()
    print(os.getpid(), flush=True)
    _silence()
    ready, _, _ = select.select([0, stop], [], [])
    if stop not in ready and os.read(0, 1) == _RELEASE:
        return
    for target in targets:
        with contextlib.suppress(GpuError):
            reset_clocks(target)


def _stop_signals() -> int:
    """A descriptor that becomes readable at the first signal to stop; none interrupts a reset."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)
    return readable


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


if __name__ == "__main__":
    main(sys.argv[1:])
