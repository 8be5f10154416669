"""Who has which GPU of a node, for people. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from agft_ray.gpu.safety import fence as lease_fence
from agft_ray.gpu.safety import lock as lease_lock
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.directory import Path, check_directory
from agft_ray.gpu.safety.record import Paths, Record, believed_record
from agft_ray.gpu.safety.target import is_uuid, nvml_target


class LeaseInfo(NamedTuple):
    """What a lease's files say, for people."""

    uuid: str
    owner: str
    pid: int | None
    held: bool
    """Whether the owner or its guard lives; if not, the clocks are due for a reset."""
    owner_runs: bool
    """Whether the owner is to be seen in this PID namespace."""
    guard_pid: int | None
    revoked: bool
    """The owner hung, or `force` took the right, and the owner has not renewed it yet."""
    damaged: bool
    barred_s: float


def leases(directory: Path) -> list[LeaseInfo]:
    """Every GPU that has a record. Raises `GpuPermissionError` for an untrusted directory."""
    return [_info(paths) for paths in recorded(directory)]


def recorded(directory: Path) -> Iterator[Paths]:
    """Every GPU that has a record, whatever it says."""
    if not check_directory(directory):
        return
    for name in sorted(os.listdir(directory)):
        uuid, suffix = os.path.splitext(name)
        if suffix == ".json" and is_uuid(uuid):
            yield Paths.of(directory, uuid)


def _info(paths: Paths) -> LeaseInfo:
    record = believed_record(paths)
    if record is None:
        record = Record(nvml_target(paths.uuid), "unknown", 0, -1, "", lease_fence.NONE, None)
    return LeaseInfo(
        uuid=paths.uuid,
        owner=record.owner,
        pid=record.pid or None,
        held=lease_lock.is_held(paths),
        owner_runs=record.owner_runs,
        guard_pid=record.guard_pid,
        revoked=lease_fence.is_revoked(record.fence),
        damaged=record.fence == lease_fence.NONE,
        barred_s=lease_record.barred_s(paths),
    )


def holder(paths: Paths) -> str:
    """Who holds the GPU, and the way out, as a sentence."""
    record = believed_record(paths)
    if record is None:
        return f"{paths.uuid}: another process is about to take or reset it; try again"
    who = f"{paths.uuid}: the right to set its clocks is held by PID {record.pid} ({record.owner})"
    if record.owner_runs:
        return f"{who}, which runs; end it, or use `agft-ray reset --force {paths.uuid}`"
    return (
        f"{who}, which does not run here: its guard (PID {record.guard_pid}) or another process is "
        "resetting the clocks, try again; or it runs in another container"
    )
