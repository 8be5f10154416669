"""The right to set one GPU's clocks: one holder at a time, and none that nobody can undo.

The right is the flock on `<uuid>.lock`. It lies on an open file description that the owner shares
with its guard process, so the kernel ends it when both are gone, and no crash, reused PID or PID
namespace can fool it. Beside it lies a record of how to undo what the owner sets: a record whose
lock is free was left by a dead owner. Its fence, which grows with each change, tells an owner that
hung that the right was taken back:

    fence   what it means               becomes   by
    even    the owner's: it may set     even      `renew`, with a new guard
            clocks while this is the    odd       `revoke`: the guard of a hung owner, `force`
            fence it wrote              none      `release`
    odd     revoked: the owner's        even      `renew`, unless the GPU is barred
            `check` fails, and somebody odd       `revoke`, once more
            resets or has reset         none      `release`
    none    no record, or none to be    even      `acquire`; `renew`, if the owner lives
            believed: `check` fails
    any     the lock is free: its       even      `acquire`, after a reset
            owner died                  none      a reset, by `sweep` or the guard

`renew` and `revoke` may cross, so the later write wins: an odd fence comes to light at the next
`check`, and after an even one the bar of `force` is looked for again.

An owner may be stopped between `Lease.check` and the write that follows, for as long as it takes
the guard to revoke and reset. So it checks after each write as well, and resets if the lease was
lost meanwhile.

Standard library only: the clock guard is a small process.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence

from agft_ray.errors import (
    GpuArgumentError,
    GpuLostError,
    LeaseHeldError,
    LeaseLostError,
)
from agft_ray.gpu.safety import deadline
from agft_ray.gpu.safety import fence as lease_fence
from agft_ray.gpu.safety import lock as lease_lock
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.deadline import Job
from agft_ray.gpu.safety.directory import Path, make_directory
from agft_ray.gpu.safety.directory import default_directory as default_directory
from agft_ray.gpu.safety.info import LeaseInfo as LeaseInfo
from agft_ray.gpu.safety.info import holder, recorded
from agft_ray.gpu.safety.info import leases as leases
from agft_ray.gpu.safety.record import DamagedRecordError, Paths, Record, believed_record
from agft_ray.gpu.safety.restore import restore
from agft_ray.gpu.safety.target import Outcome, Target, check_target, nvml_target

PATIENCE_S = 0.05
"""How long a lock is tried for: somebody who only looks may have it for a moment."""
OWNER_LENGTH = 200

Restore = Callable[[Target], None]


class Lease:
    """The right to set one GPU's clocks, until `release` or the death of owner and guard."""

    def __init__(self, paths: Paths, fd: int, target: Target, owner: str) -> None:
        self.fd = fd
        """The lock's descriptor, for the guard to inherit; -1 once given back."""
        self.fence = lease_fence.NONE
        """The one we may set clocks under; that of the record, unless the lease is lost."""
        self._paths, self._target, self._owner = paths, target, owner
        self._guard_pid: int | None = None

    @classmethod
    def acquire(
        cls,
        directory: Path,
        uuid: str,
        make_target: Callable[[], Target],
        *,
        owner: str,
        restore: Restore = restore,
    ) -> Lease:
        """Take the right; what a dead owner left locked is reset first.

        Args:
            directory: of the node's leases; made if it is missing.
            uuid: the GPU's.
            make_target: how to undo what will be set, asked once all is reset (but before, if
                what the dead owner left says nothing).
            owner: for people who ask who holds the GPU: application, deployment, replica.
            restore: resets by a target.

        Raises `LeaseHeldError` naming the holder, or if the GPU is barred; `GpuPermissionError`
        if directory or lock file may not be trusted; `GpuTransientError` if no record can be
        written; what `restore` and `make_target` raise. No lock is held after an error, and what
        could not be reset still has its record. After a reset that hangs, `GpuTransientError`, the
        lock falls when it returns.
        """
        if not (owner.isprintable() and len(owner) <= OWNER_LENGTH):
            raise GpuArgumentError(
                f"lease owner {owner!r:.80}: must be printable, of at most {OWNER_LENGTH} letters"
            )
        make_directory(directory)
        paths = Paths.of(directory, uuid)
        _refuse_if_barred(paths)
        with contextlib.ExitStack() as on_error:
            fd = lease_lock.lock(paths, PATIENCE_S)
            if fd is None:
                raise LeaseHeldError(holder(paths))
            on_error.callback(lease_lock.close, fd)
            target = check_target(_clear(paths, fd, make_target, restore))
            lease = cls(paths, fd, target, owner)
            on_error.pop_all()
        try:
            lease.renew()
        except BaseException:
            lease.release()
            raise
        return lease

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return self._paths.uuid

    @property
    def record_path(self) -> str:
        """Where its record lies."""
        return self._paths.record

    def check(self) -> None:
        """Raises `LeaseLostError` if the right was taken back (or given), else does nothing."""
        if self.is_lost():
            raise LeaseLostError(
                f"{self.uuid}: the right to set its clocks was taken back while this process "
                "hung, or by `agft-ray reset --force`; renew the lease before setting clocks"
            )

    def is_lost(self) -> bool:
        """Whether `check` would raise `LeaseLostError`."""
        return self.fd < 0 or lease_fence.current(self._paths) != self.fence

    def renew(self, *, guard_pid: int | None = None) -> None:
        """Write the record anew, after `LeaseLostError` or with a new guard; the lock is held yet.

        Raises `LeaseHeldError` while the GPU is barred, or if the lock file was removed under us,
        `GpuTransientError` if the record cannot be written; the lease is lost then.
        """
        self._guard_pid = guard_pid or self._guard_pid
        self._refuse_if_replaced()
        _refuse_if_barred(self._paths)
        fence = lease_fence.owned_after(self.fence, lease_fence.current(self._paths))
        lease_record.write_record(self._paths, self._record(fence))
        # `force` bars first and revokes then: if it revoked before our write, the bar is there.
        _refuse_if_barred(self._paths)
        self.fence = fence  # not before: until here, the lease is to count as lost

    def _record(self, fence: int) -> Record:
        pid = os.getpid()
        return Record(
            target=self._target,
            owner=self._owner,
            pid=pid,
            create_time=lease_record.create_time(pid) or 0,
            boot_id=lease_record.boot_id(),
            fence=fence,
            guard_pid=self._guard_pid,
        )

    def release(self) -> None:
        """Give the right back, with the clocks reset and the guard released. Safe to repeat."""
        if self.fd >= 0 and self._is_in_place():
            lease_record.remove_record(self._paths)
        self.abandon()

    def abandon(self) -> None:
        """Let go without the clocks reset: the record stays, for whoever can reset them."""
        if self.fd >= 0:
            lease_lock.close(self.fd)
            self.fd = -1

    def is_anothers(self) -> bool:
        """Whether another process has the right, by a lock file that replaced ours."""
        return not self._is_in_place() and lease_lock.is_held(self._paths)

    def _is_in_place(self) -> bool:
        return lease_lock.is_in_place(self._paths, self.fd)

    def _refuse_if_replaced(self) -> None:
        if not self._is_in_place():
            raise LeaseHeldError(
                f"{self.uuid}: its lock file {self._paths.lock} was removed under this process, "
                "so that another may have the right; acquire it anew"
            )


def sweep(
    directory: Path, *, restore: Restore = restore, uuids: Sequence[str] | None = None
) -> list[Outcome]:
    """Reset what dead owners left locked (of all GPUs, or of `uuids`), and remove their records.

    Returns what was done for each, or the exception, after which the record is still there. A
    GPU whose lock is held is left alone. They are reset side by side, and one that hangs is waited
    for no longer than `deadline.DEADLINE_S`; its lock is held until it returns, so that a late
    reset meets no new owner. Raises `GpuPermissionError` for an untrusted directory.
    """
    swept = [paths for paths in recorded(directory) if uuids is None or paths.uuid in uuids]
    jobs = [
        Job(functools.partial(_sweep_one, each, restore), f"reset of {each.uuid}") for each in swept
    ]
    outcomes = deadline.results(jobs)
    found = zip(swept, outcomes, strict=True)
    return [(paths.uuid, outcome) for paths, outcome in found if outcome is not None]


def force(directory: Path, uuid: str, *, bar_s: float = 60.0, restore: Restore = restore) -> None:
    """Reset a GPU even with a living owner, whose lease is lost, and bar it for `bar_s` seconds.

    Where no record says how, it is tried by NVML. Raises what `restore` does, `GpuTransientError`
    if it hangs or if bar or record cannot be written, `GpuPermissionError` for an untrusted
    directory.
    """
    make_directory(directory)
    paths = Paths.of(directory, uuid)
    lease_record.bar(paths, bar_s)
    target = revoke(paths) or nvml_target(uuid)
    Job(lambda: undo(target, restore), f"reset of {uuid}").result(deadline.DEADLINE_S)
    _sweep_one(paths, lambda target: None)  # a dead owner's record: its clocks are reset by now


def revoke(paths: Paths) -> Target | None:
    """Take the right back from the record's owner; returns the record's target, if it has one."""
    record = believed_record(paths)
    if record is None:
        return None
    fence = lease_fence.revoked_after(record.fence)
    lease_record.write_record(paths, record._replace(fence=fence))
    return record.target


def undo(target: Target, restore: Restore = restore) -> None:
    """`restore`, where a GPU that is gone needs none."""
    with contextlib.suppress(GpuLostError):
        restore(target)


def _clear(paths: Paths, fd: int, make_target: Callable[[], Target], restore: Restore) -> Target:
    """Undo what a dead owner left; the lock `fd` is ours."""
    try:
        record = lease_record.read_record(paths)
    except DamagedRecordError:
        target = make_target()
        _undo_under(fd, target, restore)
        lease_record.set_aside(paths)
        return target
    if record is not None and record.is_of_this_boot:
        _undo_under(fd, record.target, restore)
    return make_target()


def _undo_under(fd: int, target: Target, restore: Restore) -> None:
    """`undo`, waited for no longer than a deadline; the lock is held until it returns."""
    shared = lease_lock.share(fd)

    def undo_and_close() -> None:
        try:
            undo(target, restore)
        finally:
            lease_lock.close(shared)

    Job(undo_and_close, f"reset of {target['uuid']}").result(deadline.DEADLINE_S)


def _sweep_one(paths: Paths, restore: Restore) -> str | None:
    fd = lease_lock.lock(paths, 0.0)
    if fd is None:
        return None
    try:
        return _undo_left(paths, restore)
    finally:
        lease_lock.close(fd)


def _undo_left(paths: Paths, restore: Restore) -> str | None:
    try:
        record = lease_record.read_record(paths)
    except DamagedRecordError as error:
        undo(nvml_target(paths.uuid), restore)
        lease_record.set_aside(paths)
        return f"reset by its UUID, and set aside: {error}"
    if record is None:
        return None
    if record.is_of_this_boot:
        undo(record.target, restore)
    lease_record.remove_record(paths)
    left = f"what PID {record.pid} ({record.owner}) left"
    return f"reset {left}" if record.is_of_this_boot else f"{left} ended with the last boot"


def _refuse_if_barred(paths: Paths) -> None:
    left_s = lease_record.barred_s(paths)
    if left_s:
        raise LeaseHeldError(
            f"{paths.uuid}: barred for another {left_s:.0f} s by `agft-ray reset --force`; wait, "
            f"or remove {paths.bar}"
        )
