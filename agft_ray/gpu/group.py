"""GPUs that serve one engine together and are locked, reset and read as one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence

from agft_ray.errors import GpuError, GpuNotSupportedError, LeaseLostError
from agft_ray.gpu.base import Gpu
from agft_ray.types import Actuator, EventReason, GpuSample


class GpuGroup:
    """A tensor-parallel group as one `Gpu`: its ranks run in lock step, so they share a clock.

    Claims, locks and resets all of them or none: where one fails, all are rolled back, those that
    were claimed or locked before included, and the first error is raised. Readings are summed
    (power, energy); the clock is the slowest one's.

    Raises `GpuNotSupportedError` if the GPUs differ in model or actuator or share no arm.
    """

    def __init__(self, members: Sequence[Gpu]) -> None:
        self._members = tuple(members)
        models = sorted({gpu.model for gpu in members})
        common = set.intersection(*(set(gpu.arms) for gpu in members))
        share_nothing = not common and any(gpu.arms for gpu in members)
        if len(models) > 1 or len({gpu.actuator for gpu in members}) > 1 or share_nothing:
            raise GpuNotSupportedError(
                f"GPUs {self.uuid} are {', '.join(models)}: only GPUs of one model with arms in "
                "common can be tuned together; give the replica equal ones"
            )
        self._arms = tuple(sorted(common))

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return ",".join(gpu.uuid for gpu in self._members)

    @property
    def model(self) -> str:
        """The product's name."""
        return self._members[0].model

    @property
    def actuator(self) -> Actuator:
        """What is set: SM clocks, or the power limit."""
        return self._members[0].actuator

    @property
    def arms(self) -> tuple[int, ...]:
        """What may be set, ascending."""
        return self._arms

    def claim(self) -> None:
        """Take the right to set clocks; see `Gpu.claim`."""
        lost: list[LeaseLostError] = []
        try:
            for gpu in self._members:
                try:
                    gpu.claim()
                except LeaseLostError as error:
                    lost.append(error)  # and renewed: not a reason to let go of the others
        except BaseException:
            _all(self._members, _reset_and_release)
            raise
        _raise_first(lost)

    def release(self) -> None:
        """Give the right to set clocks back; see `Gpu.release`."""
        _raise_first(_all(self._members, lambda gpu: gpu.release()))

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        try:
            for gpu in self._members:
                gpu.lock(setting)
        except GpuError:
            _all(self._members, lambda gpu: gpu.reset())
            raise

    def reset(self) -> None:
        """Back to default clocks; see `Gpu.reset`."""
        _raise_first(_all(self._members, lambda gpu: gpu.reset()))

    def read(self) -> GpuSample:
        """One reading; see `Gpu.read`."""
        return combine([gpu.read() for gpu in self._members])


def combine(samples: Sequence[GpuSample]) -> GpuSample:
    """Readings of several GPUs as that of one.

    The energy counters tick apart. Their sum belongs to the mean of their times: for GPUs that
    draw equal power P, sum(E_i(t_i)) = sum(E_i(t)) + P * sum(t_i - t), which is zero at the mean.
    """
    count = len(samples)
    locks = {sample.locked for sample in samples}
    reasons = functools.reduce(operator.or_, (s.event_reasons for s in samples))
    if not all(s.event_reasons & EventReason.GPU_IDLE for s in samples):
        reasons &= ~EventReason.GPU_IDLE
    temperatures = [s.temperature_c for s in samples if s.temperature_c is not None]
    return GpuSample(
        t_s=max(s.t_s for s in samples),
        power_w=sum(s.power_w for s in samples),
        energy_j=sum(s.energy_j for s in samples),
        energy_t_s=sum(s.energy_t_s for s in samples) / count,
        sm_clock_mhz=min(s.sm_clock_mhz for s in samples),
        locked=locks.pop() if len(locks) == 1 else None,
        event_reasons=reasons,
        temperature_c=max(temperatures, default=None),
        power_source=_worst((s.power_source for s in samples), "instant"),
        energy_source=_worst((s.energy_source for s in samples), "counter"),
        gpus=sum(s.gpus for s in samples),
    )


def _worst(sources: Iterable[str], best: str) -> str:
    return next((source for source in sources if source != best), best)


def _reset_and_release(gpu: Gpu) -> None:
    try:
        gpu.reset()
    finally:
        gpu.release()


def _all(gpus: Sequence[Gpu], act: Callable[[Gpu], None]) -> list[GpuError]:
    """Do it to every one, whatever becomes of the others; returns the errors."""
    errors = []
    for gpu in gpus:
        try:
            act(gpu)
        except GpuError as error:
            errors.append(error)
    return errors


def _raise_first(errors: Sequence[GpuError]) -> None:
    if errors:
        raise errors[0]
