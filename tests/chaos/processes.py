"""Processes of others, seen through /proc and pidfds."""

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    pid: int
    create_time: int
    """Tells it from a later process of the same PID."""

    @property
    def runs(self):
        """False also for a zombie: it holds nothing any more."""
        state, create_time = stat(self.pid)
        return create_time == self.create_time and state not in "ZX"


class Watch(threading.Thread):
    """Notes when a process ends, on the monotonic clock, whatever the test does meanwhile."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.ended_s = None
        self._pidfd = os.pidfd_open(pid)
        self.start()

    def run(self):
        select.select([self._pidfd], [], [])
        self.ended_s = time.monotonic()
        os.close(self._pidfd)


def stat(pid):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", -1
    return fields[0], int(fields[19])


def wait_until(condition, timeout_s, what, poll_s=0.02):
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"after {timeout_s} s still not: {what}"
        time.sleep(poll_s)
    return value


def is_guard(pid):
    with contextlib.suppress(OSError):
        return b"agft_ray.gpu.safety.guard" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
