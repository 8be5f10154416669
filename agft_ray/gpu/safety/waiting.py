"""Waiting for pipes and signals, in the guards. Standard library only: they are small processes."""

from __future__ import annotations

import os
import select
import signal


def poller(*fds: int, events: int = select.POLLIN) -> select.poll:
    """A `select.poll` of these descriptors."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    return poll


def stop_signals() -> int:
    """A descriptor that becomes readable at the first signal to stop; none interrupts a reset."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)
    return readable
