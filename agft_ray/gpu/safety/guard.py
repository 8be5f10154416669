"""The clock guard: a small process that resets the clocks when their owner is gone, or hangs.

Ray kills a worker and its direct children with SIGKILL and runs no clean-up. So the guard is
re-parented by a double fork, in a session of its own, and waits for the end of a pipe whose other
end only the owner holds: the kernel closes it however the owner dies. Into it the owner writes
beats; when they stay out, the guard takes the right back (see `gpu.lease`) and resets as well. It
shares the locks of the leases, so nobody else gets a GPU before it is done.

`python -m agft_ray.gpu.safety.guard --node` serves the node: see `node_guard`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from agft_ray.errors import GpuError, GpuNotSupportedError, GpuPermissionError
from agft_ray.gpu.safety import deadline, restore
from agft_ray.gpu.safety import lock as lease_lock
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.deadline import Job
from agft_ray.gpu.safety.lease import Lease, revoke, undo
from agft_ray.gpu.safety.record import Paths
from agft_ray.gpu.safety.waiting import poller, stop_signals

BEAT_S = 0.25
"""The least time between two beats."""
RETRY_S = 10.0
"""How long a reset that fails is tried again before it is left to the node or the next owner."""

_BEAT, _RELEASE, _LEAVE = b"b", b"r", b"l"
_USAGE = """usage: python -m agft_ray.gpu.safety.guard --node [--lease-dir DIR] [--interval-s S]
(the guard of one owner is started by that owner: agft_ray.gpu.safety.guard.Guard.start)"""


_open_guards: set[Guard] = set()


def _close_in_child() -> None:
    """A forked child that kept a pipe open would keep the guard from seeing our death."""
    for guard in tuple(_open_guards):
        guard._close()


os.register_at_fork(after_in_child=_close_in_child)


class Guard:
    """The owner's handle on its guard process; the clocks are safe for as long as it runs."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe: int | None = pipe
        self._using = threading.Lock()  # a pipe closed by one thread may be another's new file
        self._next_beat_s = 0.0
        os.set_blocking(pipe, False)
        _open_guards.add(self)

    @classmethod
    def start(cls, leases: Sequence[Lease], *, heartbeat_s: float = 5.0) -> Guard:
        """Start a guard for these leases, and wait until it is ready.

        It resets when this process is gone, or has not called `beat` for `heartbeat_s` (from now
        on), and again every `heartbeat_s` until it does.

        Raises `GpuError` with the process's own words if it does not start, what `Lease.renew`
        does if a lease is lost for good.
        """
        guard = cls(*_spawn(leases, heartbeat_s))
        try:
            for lease in leases:
                lease.renew(guard_pid=guard.pid)
        except BaseException:
            guard.release()
            raise
        return guard

    @property
    def is_alive(self) -> bool:
        """Whether the guard still watches; False after `release` or if it was killed."""
        with self._using:
            return self._pipe is not None and not _reader_is_gone(self._pipe, 0.0)

    def beat(self) -> None:
        """Say that the loop is in charge. Never blocks or raises, and may be called often."""
        now_s = time.monotonic()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + BEAT_S
            self._write(_BEAT)

    def release(self) -> None:
        """Let the guard go without a reset: for after an explicit one. Safe to repeat.

        Waits up to a second for its end, so that a lease released next is free at once.
        """
        self._write(_RELEASE)
        with self._using:
            if self._pipe is not None:
                _reader_is_gone(self._pipe, 1.0)
                self._close()

    def leave(self) -> None:
        """Leave a reset that failed to the guard: it tries on while this process lives, and for a
        while after, then gives the lock back. For after the lease was abandoned; this handle is
        then of no more use."""
        self._write(_LEAVE)

    def _write(self, message: bytes) -> None:
        with self._using, contextlib.suppress(OSError):
            if self._pipe is not None:
                os.write(self._pipe, message)

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
            _open_guards.discard(self)


class _Guarded:
    """One GPU in the guard process, with the lock that is held until it is reset."""

    def __init__(self, argument: str) -> None:
        fd, _, path = argument.partition(":")
        self.fd = int(fd)
        directory, name = os.path.split(path)
        self.paths = Paths.of(directory, name.removesuffix(".json"))
        record = lease_record.read_record(self.paths)
        if record is None:
            raise GpuError(f"no lease record {path}")
        self._target = record.target
        self._job: Job[bool] | None = None
        self.is_refused = False
        """We may not reset it, so trying again is in vain; whoever finds the record may."""
        restore.prepare(record.target["backend"])

    def revoke(self) -> None:
        """Make the owner notice, should it live; it may not be possible, the reset comes anyway.

        The owner may call `Lease.renew` at the same moment. If our record comes last, its lease
        stays lost: it checks after each write to the GPU and resets. If its own does, the lease
        is renewed, and our reset still follows: clocks are at default, or as set after by right.
        """
        with contextlib.suppress(GpuError):
            revoke(self.paths)

    def begin_reset(self) -> Job[bool]:
        """Reset on a thread of its own, or go on waiting for one that hangs."""
        if self._job is None or not self._job.runs:
            self._job = Job(self._reset, f"reset of {self.paths.uuid}")
        return self._job

    def _reset(self) -> bool:
        """Whether it worked, or was not needed; a record that is gone or damaged is no excuse."""
        try:
            if not lease_lock.is_in_place(self.paths, self.fd) and lease_lock.is_held(self.paths):
                return True  # another owner's, by a lock file that replaced ours
            record = lease_record.believed_record(self.paths)
            self._target = self._target if record is None else record.target
            undo(self._target)
        except (GpuPermissionError, GpuNotSupportedError):
            self.is_refused = True
            return False
        except Exception:  # whatever it is, it must not keep the other GPUs from their reset
            return False
        return True


def _spawn(leases: Sequence[Lease], heartbeat_s: float) -> tuple[int, int]:
    """Start the guard process: its PID, and the writing end of its pipe."""
    import subprocess

    arguments = ["--owner", str(heartbeat_s), *(f"{one.fd}:{one.record_path}" for one in leases)]
    root = os.path.abspath(__file__)
    for _ in __spec__.name.split("."):
        root = os.path.dirname(root)
    waiting, pipe = os.pipe2(os.O_CLOEXEC)
    try:
        # -S: nothing of a site-packages is needed, and looking at them costs memory
        starter = subprocess.run(
            [sys.executable, "-S", "-P", "-m", "agft_ray.gpu.safety.guard", *arguments],
            stdin=waiting,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**os.environ, "PYTHONPATH": root},
            start_new_session=True,
            pass_fds=[one.fd for one in leases],
        )
    finally:
        os.close(waiting)
    words = starter.stdout.decode(errors="replace").strip()
    if starter.returncode or not words.isdigit():
        os.close(pipe)
        raise GpuError(f"the clock guard did not start: {words[-500:] or 'it said nothing'}")
    return int(words), pipe


def _reader_is_gone(pipe: int, timeout_s: float) -> bool:
    return bool(poller(pipe, events=0).poll(timeout_s * 1000))


def _guard(arguments: Sequence[str]) -> NoReturn:
    """Run as an owner's guard: heartbeat_s, then `FD:RECORD` for each lease; the pipe is stdin."""
    heartbeat_s = float(arguments[0])
    guarded = [_Guarded(argument) for argument in arguments[1:]]
    if os.fork():
        os._exit(0)
    stop = stop_signals()
    print(os.getpid(), flush=True)
    _silence()
    _spare_from_oom()
    if (end := _watch(guarded, heartbeat_s, stop)) == "left":
        while not _reset_all(guarded, owner_is_gone=True) and not poller(0, stop).poll(0):
            pass
    elif end != "released":
        _reset_all(guarded, owner_is_gone=end == "dead")
    for each in guarded:  # before the pipe, whose end the owner waits for
        os.close(each.fd)
    os._exit(0)


def _watch(guarded: Sequence[_Guarded], heartbeat_s: float, stop: int) -> str:
    """Until the owner is "dead", has "released" us or "left" us what it could not reset, or we are
    "stopped"; reset while it hangs.

    Hanging is two halves of `heartbeat_s` without a beat: should the whole machine be paused,
    only one of them passes unnoticed.
    """
    poll, halves = poller(0, stop), 0
    while True:
        ready = {fd for fd, _ in poll.poll(heartbeat_s * 500)}
        if stop in ready:
            return "stopped"
        if ready:
            message, halves = os.read(0, 65536), 0
            if not message or _RELEASE in message:
                return "released" if message else "dead"
            if _LEAVE in message:
                return "left"
            continue
        halves = (halves + 1) % 2
        if halves == 0:
            for each in guarded:
                each.revoke()
            _reset_once(guarded)


def _reset_once(guarded: Sequence[_Guarded]) -> list[_Guarded]:
    """Try to reset all, side by side, so that one that hangs keeps no other; returns those done."""
    outcomes = deadline.results([each.begin_reset() for each in guarded])
    return [each for each, outcome in zip(guarded, outcomes, strict=True) if outcome is True]


def _reset_all(guarded: Sequence[_Guarded], *, owner_is_gone: bool) -> bool:
    """Reset, for `RETRY_S` if need be; whether there is nothing left to try.

    What could not be reset keeps its record, for the node-level guard and the next owner. That of
    an owner that may live stays, revoked: it may lock again before it notices that nobody guards
    it. A dead one's needs no revoking, whose way to the disk would delay the reset.
    """
    for each in () if owner_is_gone else guarded:
        each.revoke()
    pending, delay_s, due_s = list(guarded), 0.1, time.monotonic() + RETRY_S
    while True:
        done = _reset_once(pending)
        for each in done if owner_is_gone else ():
            lease_record.remove_record(each.paths)
        pending = [each for each in pending if each not in done and not each.is_refused]
        if not pending or time.monotonic() + delay_s > due_s:
            return not pending
        time.sleep(delay_s)
        delay_s *= 2


def _spare_from_oom() -> None:
    """Ray has the kernel kill its workers first when memory is short, and children inherit that:
    the guard must not be killed along with its owner."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) > 0:
            file.seek(0)
            file.write("0")


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)


def main(arguments: Sequence[str]) -> int:
    """Run as the guard of an owner or of the node; see `Guard.start` and the usage."""
    if arguments and arguments[0] == "--owner":
        _guard(arguments[1:])
    if not arguments:
        print(_USAGE, file=sys.stderr)
        return 2
    from agft_ray.gpu.safety import node_guard

    return node_guard.run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
