"""Fetching one file: into a temporary file, verified, then renamed; never half of it."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from agft_ray.errors import DownloadError, TraceError
from agft_ray.workloads.public_traces import PublicTrace
from agft_ray.workloads.traces import open_trace

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 30.0
"""Of each network operation, not of the whole."""

OnBytes = Callable[[int, int | None], None]
"""Told how many bytes there are, and how many there will be if the server said so."""


def download(trace: PublicTrace, url: str, directory: Path, on_bytes: OnBytes) -> str:
    """Fetch `trace` from `url` into `directory`; returns the SHA-256 of what is there now.

    The file appears under its name only when it is complete and verified: the checksum is right,
    or, where none is known, it reads as a trace. Raises `DownloadError` and leaves nothing
    otherwise. A file of that name is replaced.
    """
    part = directory / f".{trace.name}.{os.getpid()}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            sha256 = _fetch(url, part, trace.max_bytes, on_bytes)
            _verify(trace, url, part, sha256)
            part.replace(directory / trace.name)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadError(f"{trace.name}: cannot be written to {directory}: {error}") from None
    return sha256


def sha256_of(path: Path) -> str:
    """Raises `DownloadError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DownloadError(f"{path}: cannot be read: {error.strerror}") from None


def _fetch(url: str, part: Path, max_bytes: int, on_bytes: OnBytes) -> str:
    digest, received = hashlib.sha256(), 0
    with part.open("wb") as file, _open(url) as response:
        total = response.length
        _refuse_large(url, total or 0, max_bytes)
        while chunk := _read(url, response):
            received += len(chunk)
            _refuse_large(url, received, max_bytes)
            digest.update(chunk)
            file.write(chunk)
            on_bytes(received, total)
    if total is not None and received != total:
        raise DownloadError(f"{url}: was cut off after {received:,} of {total:,} bytes; try again")
    return digest.hexdigest()


def _open(url: str) -> http.client.HTTPResponse:
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(
            f"{url}: HTTP {error.code} {error.reason}; the file may have moved: --base-url names "
            "another place to get it from"
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DownloadError(
            f"{url}: cannot be reached ({reason}); is there a network? --base-url names a mirror"
        ) from None
    return response


def _read(url: str, response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: was cut off ({error!r:.200}); try again") from None


def _refuse_large(url: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise DownloadError(
            f"{url}: has more than the {max_bytes:,} bytes that this file may have; "
            "something else is there"
        )


def _verify(trace: PublicTrace, url: str, part: Path, sha256: str) -> None:
    if trace.sha256 is None:
        try:
            next(open_trace(part))
        except TraceError as error:
            reason = str(error).replace(str(part), trace.name)
            raise DownloadError(f"{url}: is no trace: {reason}") from None
    elif sha256 != trace.sha256:
        raise DownloadError(
            f"{url}: has SHA-256 {sha256}, not {trace.sha256}: it is another file; removed"
        )
