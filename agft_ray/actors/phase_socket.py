"""What an engine does, from its replica's process to its tuner's thread: a few bytes a change.

Ray's calls take milliseconds and pushes come some times a second; a prompt is computed sooner.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import select
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from agft_ray.errors import AgftError
from agft_ray.gpu.safety.directory import make_directory
from agft_ray.types import Phase

log = logging.getLogger(__name__)

MAX_ADDRESS_BYTES = 107
"""Longer paths are no addresses of Unix sockets."""
_KINDS = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_READ_BYTES = 16
_WORD = struct.Struct("=Bd")


class Told(NamedTuple):
    """What a tuner is told."""

    phase: Phase
    since_s: float
    """On the machine's monotonic clock: what is repeated is no news."""


def phase_path(lease_directory: Path, replica: str) -> Path:
    """Where a replica's tuner listens: in a directory that nobody but us can write to."""
    return lease_directory / "phases" / hashlib.sha256(replica.encode()).hexdigest()[:16]


class PhaseSender:
    """The replica's end. It never blocks and never raises; what nobody takes is lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._address = ""

    def send(self, told: Told) -> bool:
        """Tell the tuner, if it listens; whether it was told."""
        try:
            if self._socket is None:
                self._address = _address(self._path)
                self._socket = socket.socket(socket.AF_UNIX, _KINDS)
            self._socket.sendto(_WORD.pack(*told), self._address)
        except OSError:
            return False
        return True


class Doorbell:
    """What the tuner's thread sleeps on: rung by other threads, or by a phase that has come."""

    def __init__(self) -> None:
        self._rung = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._rung, select.POLLIN)
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        self._was_tried = False
        self._told: Told | None = None

    def ring(self) -> None:
        """End the wait of now, or the next one. From any thread."""
        os.eventfd_write(self._rung, 1)

    def listen(self, path: Path) -> None:
        """Take phases from there, from the first call on; without them, should that fail, prompts
        have their clock."""
        if self._was_tried:
            return
        self._was_tried = True
        try:
            make_directory(str(path.parent.parent))
            make_directory(str(path.parent))
            path.unlink(missing_ok=True)  # of a tuner before us, which is gone
            self._socket = socket.socket(socket.AF_UNIX, _KINDS)
            self._socket.bind(_address(path))
            self._path = path
            self._poll.register(self._socket, select.POLLIN)
        except (OSError, AgftError) as error:
            log.warning("phases of the engine cannot be heard, one clock is kept: %s", error)

    def wait(self, timeout_s: float) -> tuple[bool, Told | None]:
        """Sleep until rung, a phase comes, or the time is over: whether it was rung, and the newest
        phase of those that have come, unless it is what was told before."""
        self._poll.poll(max(timeout_s, 0.0) * 1000)
        rung = False
        with contextlib.suppress(BlockingIOError):
            rung = os.eventfd_read(self._rung) > 0
        return rung, self._newest()

    def close(self) -> None:
        """Listen no more. The bell stays, for threads that ring it late."""
        if self._socket is not None:
            self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _newest(self) -> Told | None:
        before = self._told
        if self._socket is None:
            return None
        with contextlib.suppress(OSError):
            while True:
                self._told = _told(self._socket.recv(_READ_BYTES)) or self._told
        return None if self._told == before else self._told


def _told(word: bytes) -> Told | None:
    """None for anything that no replica says."""
    with contextlib.suppress(struct.error, ValueError):
        phase, since_s = _WORD.unpack(word)
        return Told(Phase(phase), since_s)
    return None


def _address(path: Path) -> str:
    """A path as a socket's address; a long one by way of its directory's descriptor, which stays
    open for as long as the process lives."""
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        return str(path)
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{descriptor}/{path.name}"
