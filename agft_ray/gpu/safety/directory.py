"""Where a node's leases lie: a directory that nobody but us can change. Standard library only."""

from __future__ import annotations

import contextlib
import os
import stat

from agft_ray.errors import GpuPermissionError

Path = str | os.PathLike[str]


def default_directory() -> str:
    """AGFT_RAY_LEASE_DIR, or /run/agft_ray for root, or a user's own runtime directory."""
    if path := os.environ.get("AGFT_RAY_LEASE_DIR"):
        return os.path.abspath(path)
    if os.geteuid() == 0:
        return "/run/agft_ray"
    if path := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(path, "agft_ray")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"agft_ray-{os.geteuid()}", "leases")


def make_directory(path: Path) -> None:
    """Make the directory (0700), and its parent if need be; then `check_directory`."""
    path = os.path.abspath(path)
    try:
        for each in (os.path.dirname(path), path):
            with contextlib.suppress(FileExistsError):
                os.mkdir(each, 0o700)
    except OSError as error:
        raise GpuPermissionError(
            f"lease directory {path} cannot be made: {error.strerror}; set AGFT_RAY_LEASE_DIR to "
            "one that all owners of this node's GPUs share"
        ) from None
    check_directory(path)


def check_directory(path: Path) -> bool:
    """Whether the directory is there.

    Raises `GpuPermissionError`, naming owner and mode, if anybody but us could change what is in
    it, or put another one in its place.
    """
    path = os.path.abspath(path)
    try:
        found, parent = os.lstat(path), os.stat(os.path.dirname(path))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise GpuPermissionError(f"lease directory {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise GpuPermissionError(refusal(path, found, "a directory with mode 0700"))
    writable = parent.st_mode & 0o022 and not parent.st_mode & stat.S_ISVTX
    if parent.st_uid not in (0, os.geteuid()) or writable:
        raise GpuPermissionError(
            refusal(os.path.dirname(path), parent, "the parent, not writable by others")
        )
    return True


def refusal(path: str, found: os.stat_result, wanted: str) -> str:
    """Why a file of the leases is not trusted, naming its owner and mode, and the way out."""
    return (
        f"lease files: {path} must be {wanted}, of uid {os.geteuid()}; it is "
        f"{stat.filemode(found.st_mode)}, of uid {found.st_uid}; correct or remove it, or set "
        "AGFT_RAY_LEASE_DIR"
    )
