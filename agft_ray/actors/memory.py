"""What a replica's policy has learned, kept in a file beside the GPU's lease: a tuner that Ray
restarts goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agft_ray.errors import AgftError
from agft_ray.files import replacing
from agft_ray.gpu.safety.directory import make_directory
from agft_ray.policy.experience import PriorKey

log = logging.getLogger(__name__)

FORMAT = 1
MAX_BYTES = 8_000_000
"""A larger file is none of ours; `agft` with 130 clocks has 0.5 MB."""
MAX_FILES = 64
"""Of replicas that were killed, and never come back to take theirs away."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A policy's state, what it belongs to, and how many windows it has seen."""

    key: PriorKey
    windows: int
    policy: dict[str, Any]
    """What `Policy.snapshot` gave."""


class Memory:
    """One replica's file: replaced as a whole, checksummed, and read with suspicion.

    Only the replica that wrote it takes it up again. Another replica on the same GPU must not: what
    the first one learned is in the fleet's experience already, and would count twice.

    No method raises. What cannot be written or read is logged, the former once.
    """

    def __init__(self, lease_directory: Path, replica: str) -> None:
        self._replica = replica
        name = hashlib.sha256(replica.encode()).hexdigest()[:32]
        self._path = lease_directory / "learned" / f"{name}.json"
        self._writing = threading.Lock()
        self._has_failed = False

    def save(self, learned: Learned) -> bool:
        """Replace the file; False if that was not possible, or is being done already.

        May take as long as the disk does: not to be called where that matters.
        """
        if not self._writing.acquire(blocking=False):
            return False
        try:
            text = self._text(learned)
            make_directory(str(self._path.parent))
            with replacing(self._path) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            self._prune()
        except (OSError, ValueError, TypeError, AgftError) as error:
            if not self._has_failed:
                log.warning("what was learned cannot be kept in %s: %s", self._path, error)
            self._has_failed = True
            return False
        finally:
            self._writing.release()
        self._has_failed = False
        return True

    def load(self, key: PriorKey) -> Learned | None:
        """What was learned under this key, or None."""
        try:
            return self._checked(self._read(), key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("what was learned before is not taken up: %s: %s", self._path, error)
            return None

    def forget(self) -> None:
        """Remove the file: the replica ends, and nobody else may have it."""
        with self._writing:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", self._path, error)

    def _text(self, learned: Learned) -> str:
        values = {"format": FORMAT, "replica": self._replica, **asdict(learned)}
        body = json.dumps(values, allow_nan=False)
        if len(body) > MAX_BYTES:
            raise ValueError(f"the policy's state has {len(body):,} bytes, over {MAX_BYTES:,}")
        return f"{_checksum(body)}\n{body}"

    def _read(self) -> str:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, encoding="utf-8") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise ValueError("is not a file of ours")
            if found.st_size > MAX_BYTES + 100:
                raise ValueError(f"has {found.st_size:,} bytes, over {MAX_BYTES:,}")
            return file.read()

    def _checked(self, text: str, key: PriorKey) -> Learned | None:
        checksum, _, body = text.partition("\n")
        if checksum != _checksum(body):
            raise ValueError("the checksum does not fit: the file is damaged")
        values = json.loads(body)
        if values["format"] != FORMAT or values["replica"] != self._replica:
            raise ValueError(f"is of format {values['format']!r}, replica {values['replica']!r}")
        if PriorKey(**values["key"]) != key:
            log.info("%s was learned under another key, and is left", self._path)
            return None
        return Learned(key, int(values["windows"]), dict(values["policy"]))

    def _prune(self) -> None:
        files = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_FILES]:
            path.unlink(missing_ok=True)


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
