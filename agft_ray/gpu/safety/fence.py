"""A record's fence: in whose hands a GPU's clocks are. See the table in `lease`.

Each is greater than all before it, and at least the time since boot, so that a record that was
lost on the way starts no second count. Standard library only.
"""

from __future__ import annotations

from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.record import Paths, believed_record

NONE = 0
"""Of a record that is missing or damaged."""


def current(paths: Paths) -> int:
    """The fence of what lies there now."""
    record = believed_record(paths)
    return NONE if record is None else record.fence


def is_revoked(fence: int) -> bool:
    """Odd: the right was taken back. Even ones are an owner's."""
    return fence % 2 == 1


def owned_after(*fences: int) -> int:
    """An owner's next one."""
    fence = _after(fences)
    return fence + 1 if is_revoked(fence) else fence


def revoked_after(*fences: int) -> int:
    """The next one by which an owner's right is taken back."""
    fence = _after(fences)
    return fence if is_revoked(fence) else fence + 1


def _after(fences: tuple[int, ...]) -> int:
    return max(*fences, lease_record.boottime_ns() - 1) + 1
