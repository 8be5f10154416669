"""What is known of the clocks, and of the right to set them: frozen states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from agft_ray.types import Arm


class Obstacle(StrEnum):
    """What keeps us from setting clocks, in one word."""

    NONE = ""
    HELD = "held"
    """Another process has the right to, at the moment."""
    REFUSED = "refused"
    """The GPU does not let us, until new settings come."""
    YIELDED = "yielded"
    """Somebody else sets them, until new settings come."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether clocks are ours to set, and if not, why."""

    obstacle: Obstacle = Obstacle.NONE
    reason: str = ""

    @property
    def is_withdrawn(self) -> bool:
        """Not to be tried again before new settings come."""
        return self.obstacle in (Obstacle.REFUSED, Obstacle.YIELDED)


@dataclass(frozen=True, slots=True)
class Hold:
    """What we know of the clocks.

                    locked  ours  due
    AS_FOUND                no    yes   whatever others left
    AT_DEFAULT              no    no    after our reset
    after(arm)      arm     yes   no    after our lock
    .attempted()    same    yes   same  a lock that is being set, or failed on the way
    .doubted()      same    same  yes   a lock not in force, a reset that failed
    .given_up()             same  yes   withdrawn; still ours if the reset failed
    .seen_at(arm)   arm     same  same  a lock that is not the one we set
    """

    locked: Arm = None
    ours: bool = False
    """Clocks are locked by us, or may be: we are to reset them."""
    due: bool = False
    """The next arm is to be set even if it is the one locked, and the first one is none."""

    @staticmethod
    def after(arm: Arm) -> Hold:
        """What is held once a clock was set, or reset."""
        return AT_DEFAULT if arm is None else Hold(arm, ours=True)

    def attempted(self) -> Hold:
        """A call that may lock is under way: whatever becomes of it, a reset is owed."""
        return replace(self, ours=True)

    def doubted(self) -> Hold:
        """The lock may not be in force: it is to be set again."""
        return replace(self, due=True)

    def given_up(self) -> Hold:
        """Withdrawn: still ours where its reset has failed."""
        return replace(self, locked=None, due=True)

    def seen_at(self, arm: Arm) -> Hold:
        """The same, with another clock in force."""
        return replace(self, locked=arm)


AS_FOUND = Hold(due=True)
AT_DEFAULT = Hold()


def is_lower(arm: Arm, than: Arm) -> bool:
    """Default clocks are above all others."""
    return arm is not None and (than is None or arm < than)
