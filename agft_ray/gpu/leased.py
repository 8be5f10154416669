"""A node's GPUs under leases: the only way in which this package sets clocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from agft_ray.errors import GpuError, LeaseLostError
from agft_ray.gpu.base import Gpu
from agft_ray.gpu.group import GpuGroup
from agft_ray.gpu.safety.guard import Guard
from agft_ray.gpu.safety.lease import Lease, sweep
from agft_ray.types import Actuator, GpuSample

log = logging.getLogger(__name__)


class LeasableGpu(Gpu, Protocol):
    """A single GPU that can say how it is brought back to default clocks."""

    def target(self) -> dict[str, object]:
        """See `gpu.safety.restore.restore`."""
        ...


class LeasedGpu:
    """One or several GPUs of this node, which are set only while we hold the lease of each.

    `claim` takes the leases, all or none, and starts the guard process that resets the clocks
    should this process die or hang: whoever drives the loop calls `beat` at least every second,
    and no longer beats for a loop that hangs. A lease that was taken back meanwhile is noticed
    before and after every write (a process may be stopped in between); what was written under a
    lost lease is undone at once.

    Args:
        gpus: they are locked, reset and read as one.
        directory: where the node's leases lie.
        owner: who we are, for people who ask who holds a GPU.
    """

    def __init__(self, gpus: Sequence[LeasableGpu], *, directory: Path | str, owner: str) -> None:
        self._parts = tuple(gpus)
        self._gpu: Gpu = gpus[0] if len(gpus) == 1 else GpuGroup(gpus)
        self._directory, self._owner = directory, owner
        self._leases: list[Lease] = []
        self._guard: Guard | None = None
        self._is_due = self._reset_failed = False  # a reset: since we locked, and in vain

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return self._gpu.uuid

    @property
    def model(self) -> str:
        """The product's name."""
        return self._gpu.model

    @property
    def actuator(self) -> Actuator:
        """What is set: SM clocks, or the power limit."""
        return self._gpu.actuator

    @property
    def arms(self) -> tuple[int, ...]:
        """What may be set, ascending."""
        return self._gpu.arms

    @property
    def guard_pid(self) -> int | None:
        """The guard's process, while there are leases to guard."""
        return None if self._guard is None else self._guard.pid

    def read(self) -> GpuSample:
        """One reading; see `Gpu.read`."""
        return self._gpu.read()

    def claim(self) -> None:
        """See `Gpu.claim`. Raises `LeaseLostError` once when leases had to be renewed."""
        if self._leases:
            self._renew_lost()
        else:
            self._acquire()
        if self._guard is None or not self._guard.is_alive:
            self._guard = Guard.start(self._leases)

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        self._check()
        self._is_due = True
        self._gpu.lock(setting)
        try:
            self._check()
        except LeaseLostError:
            self._gpu.reset()
            raise

    def reset(self) -> None:
        """See `Gpu.reset`; without leases the GPUs may be another owner's, and are not touched."""
        if self._leases:
            self._reset_failed = True
            self._gpu.reset()
            self._is_due = self._reset_failed = False

    def release(self) -> None:
        """Give the leases back. Where what we locked could not be reset, the guard inherits them
        and tries on; their records stay until it is done, for whoever else can reset."""
        for lease in self._leases if self._is_stuck else ():
            lease.abandon()
        if self._guard is not None:
            if self._is_stuck:
                self._guard.leave()
            else:
                self._guard.release()
            self._guard = None
        for lease in self._leases:
            lease.release()
        self._leases.clear()
        self._is_due = self._reset_failed = False

    def sweep(self) -> None:
        """Reset the clocks of every GPU of this node whose owner died without it; what fails is
        logged, as `claim` raises it where it concerns us."""
        try:
            for uuid, outcome in sweep(self._directory):
                log.warning("left locked by a dead process: %s: %s", uuid, outcome)
        except GpuError as error:
            log.warning("%s", error)

    def beat(self) -> None:
        """Tell the guard that the loop is in charge; not while a reset is due and has failed, so
        that the guard tries as well. Never blocks."""
        if self._guard is not None and not self._is_stuck:
            self._guard.beat()

    @property
    def _is_stuck(self) -> bool:
        return self._is_due and self._reset_failed

    def _acquire(self) -> None:
        try:
            for gpu in self._parts:
                lease = Lease.acquire(
                    self._directory, gpu.uuid, _claimed_target(gpu), owner=self._owner
                )
                self._leases.append(lease)
        except BaseException:
            self.release()
            raise

    def _renew_lost(self) -> None:
        lost = [lease for lease in self._leases if lease.is_lost()]
        if not lost:
            return
        try:
            for lease in lost:
                lease.renew()
        except BaseException:
            self._let_go()
            raise
        self.reset()
        raise LeaseLostError(
            f"the lease of {self.uuid} was taken back, and the clocks were reset: this process "
            "hung, or an operator forced it; the lease is renewed"
        )

    def _let_go(self) -> None:
        """Reset what we locked and is ours yet, and release: whoever took a lease back may not
        have been able to reset."""
        for gpu, lease in zip(self._parts, self._leases, strict=True):
            if self._is_due and not lease.is_anothers():
                try:
                    gpu.reset()
                except GpuError:
                    self._reset_failed = True
                    log.exception("clocks of %s could not be reset", gpu.uuid)
        self.release()

    def _check(self) -> None:
        if not self._leases:
            raise LeaseLostError(f"clocks of {self.uuid} cannot be set without a lease")
        for lease in self._leases:
            lease.check()


def _claimed_target(gpu: LeasableGpu) -> Callable[[], dict[str, object]]:
    """Not before: a power limit that a dead owner left is put back first, for us to find."""

    def make_target() -> dict[str, object]:
        gpu.claim()
        return gpu.target()

    return make_target
