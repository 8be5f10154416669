"""One file per simulated GPU, shared by the processes that use it: engine, tuner and guard.

It is readable JSON, one value a line. Standard library only: the clock guard is a small process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from agft_ray.errors import ConfigError, GpuLostError, GpuPermissionError

Path = str | os.PathLike[str]

SIZE = 4096
"""Bytes of the file: one page, because a write within a page is not cut short by SIGKILL."""

RESET_DELAY_S = 0.025
"""From `request_reset` to default clocks: the median delay of a clock change."""

_FORMAT = "agft_ray simulated GPU 1"

# Line breaks as separators: `indent` would make the encoder ten times slower.
_JSON = json.JSONEncoder(separators=(",\n ", ": "))


class DeviceFile:
    """A simulated GPU's description and state, as a JSON object in a locked file."""

    def __init__(self, path: Path) -> None:
        self.path = os.path.abspath(path)

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        uuid: str,
        profile: str,
        model: str,
        speed: float = 1.0,
        seed: int = 0,
        counter_update_s: float = 0.1,
        noise: bool = False,
        history_path: Path | None = None,
    ) -> DeviceFile:
        """Make the file (mode 0600), or keep one that describes the same GPU.

        `speed` is simulated seconds per wall second; simulated time begins now. With
        `history_path`, spans of constant power are appended there as CSV. A file left from before
        the last boot is replaced. Raises `ConfigError` if the path holds anything else.
        """
        description = {
            "format": _FORMAT,
            "boot_id": _boot_id(),
            "uuid": uuid,
            "profile": profile,
            "model": model,
            "speed": speed,
            "seed": seed,
            "counter_update_s": counter_update_s,
            "noise": noise,
            "history_path": None if history_path is None else os.path.abspath(history_path),
        }
        device_file = cls(path)
        if not device_file._place(description, replace=False):
            device_file._keep_or_replace(description)
        return device_file

    @contextlib.contextmanager
    def transaction(self) -> Iterator[dict[str, Any]]:
        """The state, under an exclusive lock; written back unless the body raises.

        A kill at any moment leaves a readable file and no lock. Raises `GpuLostError` if the file
        is missing, a symbolic link or damaged, `GpuPermissionError` if it is not ours.
        """
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            state = self._decode(os.pread(fd, SIZE, 0))
            yield state
            os.pwrite(fd, _encode(state), 0)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except PermissionError:
            raise GpuPermissionError(
                f"simulated GPU {self.path}: not readable and writable for this user"
            ) from None
        except OSError as error:
            raise GpuLostError(f"simulated GPU {self.path} is gone: {error.strerror}") from None

    def _decode(self, content: bytes) -> dict[str, Any]:
        try:
            state = json.loads(content)
        except ValueError:
            state = None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise GpuLostError(f"simulated GPU {self.path} is gone: the file holds something else")
        return state

    def _place(self, description: dict[str, Any], *, replace: bool) -> bool:
        """Put a new file at the path in one atomic step; False if there is one already."""
        state = description | {
            "origin_s": time.monotonic(),
            "locked_sm_clock_mhz": None,
            "pending_clock_changes": [],
            "clock_calls": 0,
        }
        temporary = f"{self.path}.{os.getpid()}.{time.monotonic_ns()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, _encode(state), 0)
            if replace:
                os.replace(temporary, self.path)
                return True
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self.path)
                return True
            return False
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _keep_or_replace(self, description: dict[str, Any]) -> None:
        try:
            with self.transaction() as state:
                differing = [key for key in description if state.get(key) != description[key]]
                found = [state.get(key) for key in differing]
        except (GpuLostError, GpuPermissionError) as error:
            raise ConfigError(
                f"simulated GPU {self.path}", [f"path: taken, give another one ({error})"]
            ) from None
        if "boot_id" in differing:
            self._place(description, replace=True)
        elif differing:
            problems = [
                f"{key}: {description[key]!r} asked, {value!r} in the file; "
                "give another path, or remove the file if nothing uses it"
                for key, value in zip(differing, found, strict=True)
            ]
            raise ConfigError(f"simulated GPU {self.path}", problems)


def now_s(state: dict[str, Any]) -> float:
    """Simulated time now, in seconds since the file was made."""
    return float((time.monotonic() - state["origin_s"]) * state["speed"])


def request_reset(path: Path) -> None:
    """Return the GPU at `path` to default clocks, without any of the simulator's code.

    Raises what `DeviceFile.transaction` does.
    """
    with DeviceFile(path).transaction() as state:
        called_s = max(now_s(state), state.get("t_s", 0.0))
        due = [change for change in state["pending_clock_changes"] if change[0] <= called_s]
        if not due or due[-1][1] is not None:  # else it is there already: the file has an end
            due.append([called_s + RESET_DELAY_S, None])
        state["pending_clock_changes"] = due
        state["locked_sm_clock_mhz"] = None
        state["clock_calls"] += 1


def _encode(state: dict[str, Any]) -> bytes:
    content = _JSON.encode(state).encode()
    if len(content) >= SIZE:
        raise ConfigError("simulated GPU", [f"its description exceeds {SIZE} bytes: shorten paths"])
    return content.ljust(SIZE - 1) + b"\n"


def _boot_id() -> str:
    """Identity of this boot: the monotonic clock that time is counted from starts anew with it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
