"""A lease's lock in this process: taken, looked at, and let go in forked children.

Standard library only: the clock guard is a small process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

from agft_ray.errors import GpuError, GpuTransientError
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.record import Paths

_open_fds: set[int] = set()


def _close_in_child() -> None:
    """A forked child shares the lock, and would keep it after its parent's death."""
    for fd in _open_fds:
        os.close(fd)
    _open_fds.clear()


os.register_at_fork(after_in_child=_close_in_child)


def lock(paths: Paths, patience_s: float) -> int | None:
    """The lock's descriptor once it is ours, None if it is held for longer than that."""
    fd = lease_record.open_lock(paths.lock)
    _open_fds.add(fd)
    deadline_s = time.monotonic() + patience_s
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            if time.monotonic() >= deadline_s:
                break
            time.sleep(0.005)
    except OSError as error:
        close(fd)
        raise GpuTransientError(f"lease lock {paths.lock}: {error.strerror}") from None
    close(fd)
    return None


def close(fd: int) -> None:
    """Let a lock's descriptor go; not in a forked child, where it is closed, or another file's."""
    if fd in _open_fds:
        _open_fds.discard(fd)
        os.close(fd)


def share(fd: int) -> int:
    """Another descriptor of the same lock, which falls when both are closed."""
    shared = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    _open_fds.add(shared)
    return shared


def is_in_place(paths: Paths, fd: int) -> bool:
    """Whether that lock still counts: its file was not removed or replaced."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.lstat(paths.lock))
    return False


def is_held(paths: Paths) -> bool:
    """Whether somebody has the lock. Looking takes it for a moment, shared."""
    try:
        fd = lease_record.open_lock(paths.lock, create=False)
    except (GpuError, OSError):
        return False
    _open_fds.add(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        close(fd)
    return False
