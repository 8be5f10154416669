"""The files of a lease, read and written so that nothing found there can fool or hang us.

For each GPU `<uuid>.lock`, whose flock is the right to set clocks, `<uuid>.json`, the record of
who has it and how to undo what they set, and perhaps `<uuid>.barred`. Standard library only: the
clock guard is a small process.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import json
import os
import stat
import time
from typing import Any, NamedTuple

from agft_ray.errors import GpuArgumentError, GpuError, GpuPermissionError, GpuTransientError
from agft_ray.gpu.safety.directory import Path, refusal
from agft_ray.gpu.safety.target import Target, check_target, is_uuid

MAX_BYTES = 4096
MAX_BAR_S = 3600.0
CORRUPT_KEPT = 3

_FORMAT = "agft_ray lease 1"
_OPEN_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_OURS = (errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM, errno.EISDIR)


class DamagedRecordError(GpuError):
    """A record that is not to be believed: not ours, not a regular file, or not what we wrote."""


class Paths(NamedTuple):
    """One GPU's files."""

    uuid: str
    lock: str
    record: str
    bar: str

    @classmethod
    def of(cls, directory: Path, uuid: str) -> Paths:
        """Raises `GpuArgumentError` for what is no UUID, and would be no safe file name."""
        if not is_uuid(uuid):
            raise GpuArgumentError(f"GPU UUID {uuid!r:.80}: must be letters, digits and '-'")
        stem = os.path.join(os.path.abspath(directory), uuid)
        return cls(uuid, f"{stem}.lock", f"{stem}.json", f"{stem}.barred")


class Record(NamedTuple):
    """Who has the right to set a GPU's clocks, and how to undo what they set."""

    target: Target
    owner: str
    """Free text: which application, deployment and replica."""
    pid: int
    create_time: int
    """When the process began, in clock ticks since boot: tells it from a later one of its PID."""
    boot_id: str
    fence: int
    """Grows with every change of the right: see the table in `lease`."""
    guard_pid: int | None

    @property
    def is_of_this_boot(self) -> bool:
        """False if the machine was surely booted since: clocks are at default after that."""
        return self.boot_id in ("", now := boot_id()) or not now

    @property
    def owner_runs(self) -> bool:
        """Whether the owner is to be seen in this PID namespace."""
        return create_time(self.pid) == self.create_time


def open_lock(path: str, *, create: bool = True) -> int:
    """A descriptor of the lock file, which is never removed.

    Raises `GpuPermissionError` if it is not a regular file of ours, `GpuTransientError` if it
    cannot be opened now, `FileNotFoundError` if it is not there and not to be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | _OPEN_SAFELY | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _NOT_OURS:
            raise GpuPermissionError(refusal(path, os.lstat(path), "a regular file")) from None
        raise GpuTransientError(f"lease lock {path}: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise GpuPermissionError(refusal(path, found, "a regular file"))
    return fd


def read_record(paths: Paths) -> Record | None:
    """The record, or None if there is none.

    Raises `DamagedRecordError` for one that is not to be believed, `GpuTransientError` if it
    cannot be read now.
    """
    try:
        return _decode(_read(paths.record), paths.uuid)
    except FileNotFoundError:
        return None
    except OSError as error:
        kind = DamagedRecordError if error.errno in _NOT_OURS else GpuTransientError
        raise kind(f"lease record {paths.record}: {error.strerror}") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        GpuArgumentError,
    ) as error:
        raise DamagedRecordError(
            f"lease record {paths.record} is damaged: {error!s:.200}"
        ) from None


def believed_record(paths: Paths) -> Record | None:
    """The record, or None if there is none to be believed."""
    with contextlib.suppress(DamagedRecordError):
        return read_record(paths)
    return None


def write_record(paths: Paths, record: Record) -> None:
    """Replace the record in one atomic, durable step.

    Raises `GpuTransientError` if it cannot be written, and then the old one is still there.
    """
    fields = {"format": _FORMAT, **record._asdict()}
    _write(paths.record, _encode(fields | {"crc32": binascii.crc32(_encode(fields))}))


def remove_record(paths: Paths) -> None:
    """Remove the record; where that fails the GPU will be reset once more, so it is no error."""
    with contextlib.suppress(OSError):
        os.unlink(paths.record)
        _sync(os.path.dirname(paths.record))


def set_aside(paths: Paths) -> None:
    """Rename a damaged record, for audit; the newest few are kept.

    Raises `GpuTransientError` if it cannot be renamed.
    """
    directory, name = os.path.split(paths.record)
    try:
        os.rename(paths.record, f"{paths.record}.corrupt-{time.time_ns()}")
    except OSError as error:
        raise GpuTransientError(f"lease record {paths.record}: {error.strerror}") from None
    kept = sorted(each for each in os.listdir(directory) if each.startswith(f"{name}.corrupt-"))
    for each in kept[:-CORRUPT_KEPT]:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(directory, each))


def bar(paths: Paths, bar_s: float) -> None:
    """Let nobody acquire or renew for `bar_s` from now on, at most `MAX_BAR_S`.

    Raises `GpuArgumentError` for another time, `GpuTransientError` if it cannot be written.
    """
    if not 0 <= bar_s <= MAX_BAR_S:
        raise GpuArgumentError(f"bar_s must be from 0 to {MAX_BAR_S:g} s, got {bar_s!r}")
    until_ns = boottime_ns() + round(bar_s * 1e9)
    _write(paths.bar, _encode({"boot_id": boot_id(), "until_ns": until_ns}))


def barred_s(paths: Paths) -> float:
    """For how long nobody may acquire or renew; a bar that cannot be read bars nobody."""
    try:
        found = json.loads(_read(paths.bar))
        left_s = (found["until_ns"] - boottime_ns()) / 1e9
        counts = found["boot_id"] == boot_id() and 0 < left_s <= MAX_BAR_S
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0.0
    return left_s if counts else 0.0


def boottime_ns() -> int:
    """Nanoseconds since boot, suspension included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Identity of this boot, or "" where the kernel does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def create_time(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _decode(content: bytes, uuid: str) -> Record:
    fields = json.loads(content, parse_constant=_refuse_constant)
    crc32 = fields.pop("crc32", None)
    if fields.get("format") != _FORMAT or crc32 != binascii.crc32(_encode(fields)):
        raise ValueError("wrong format or checksum")
    record = Record(**{name: fields[name] for name in Record._fields})
    if check_target(record.target)["uuid"] != uuid:
        raise ValueError("it is of another GPU")
    numbers = (record.pid, record.create_time, record.fence, record.guard_pid or 0)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError("a number is out of range")
    if not all(
        isinstance(text, str) and text.isprintable() for text in (record.owner, record.boot_id)
    ):
        raise ValueError("owner or boot_id is not printable text")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _encode(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | _OPEN_SAFELY)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ValueError(f"it is {stat.filemode(found.st_mode)}, of uid {found.st_uid}")
        content = os.read(fd, MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


def _write(path: str, content: bytes) -> None:
    if len(content) > MAX_BYTES:
        raise GpuArgumentError(f"lease record {path}: more than {MAX_BYTES} bytes; shorten paths")
    temporary = f"{path}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        _sync(os.path.dirname(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise GpuTransientError(
            f"lease record {path} cannot be written: {error.strerror}; free space or make "
            "the file system writable, or set AGFT_RAY_LEASE_DIR"
        ) from None


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
