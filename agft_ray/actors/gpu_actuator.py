"""The tuner's hand on another node, for engines whose GPUs are on several."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ray.exceptions import RayError

from agft_ray.actors.background import background_actor
from agft_ray.clock import Clock
from agft_ray.errors import GpuError, GpuTransientError
from agft_ray.gpu.registry import GpuSpec, open_gpu
from agft_ray.types import Actuator, GpuSample

CALL_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0


class GpuActuator:
    """One node's GPUs, under leases and a guard of their own, for a tuner on another node.

    The guard is shown life with each reading, which the tuner's loop takes several times a
    second: when the tuner dies or hangs, or the network parts them, this node's clocks are reset.
    """

    def __init__(self, spec: GpuSpec, owner: str) -> None:
        self._gpu = open_gpu(spec, owner=owner)

    def describe(self) -> tuple[str, str, Actuator, tuple[int, ...]]:
        """UUIDs, model, actuator and arms."""
        return self._gpu.uuid, self._gpu.model, self._gpu.actuator, self._gpu.arms

    def read(self) -> GpuSample:
        """One reading; see `Gpu.read`."""
        self._gpu.beat()
        return self._gpu.read()

    def claim(self) -> None:
        """Take the right to set clocks; see `Gpu.claim`."""
        self._gpu.claim()

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        self._gpu.lock(setting)

    def reset(self) -> None:
        """Back to default clocks; see `Gpu.reset`."""
        self._gpu.reset()

    def release(self) -> None:
        """Give the right to set clocks back; see `Gpu.release`."""
        self._gpu.release()


class RemoteGpu:
    """Another node's GPUs as a `Gpu`. Every call has a deadline; belongs to the loop's thread.

    What the other node raises is raised here; an actuator that is gone or does not answer is a
    `GpuTransientError`, because Ray starts it anew.
    """

    def __init__(self, node_id: str, spec: GpuSpec, clock: Clock, owner: str) -> None:
        self._node_id, self._clock = node_id, clock
        actuator = background_actor(GpuActuator, node_id=node_id, max_restarts=-1)
        self._actuator: Any = actuator.remote(spec, owner)
        described = self._call("describe", timeout_s=START_TIMEOUT_S)
        self.uuid, self.model, self.actuator, self.arms = described
        self._round_trip_s = float("inf")
        self._offset_s = 0.0

    def claim(self) -> None:
        """Take the right to set clocks; see `Gpu.claim`."""
        self._call("claim")

    def lock(self, setting: int) -> None:
        """Set a clock or limit; see `Gpu.lock`."""
        self._call("lock", setting)

    def reset(self) -> None:
        """Back to default clocks; see `Gpu.reset`."""
        self._call("reset")

    def release(self) -> None:
        """Give the right to set clocks back; see `Gpu.release`."""
        self._call("release")

    def read(self) -> GpuSample:
        """A reading, its times moved to this node's clock.

        The difference of the clocks is taken from the quickest round trip so far, as NTP does; it
        stays the same from reading to reading, so that the energy counter's times do.
        """
        asked_s, asked_wall_s = self._clock.now_s(), time.monotonic()
        sample: GpuSample = self._call("read")
        round_trip_s = time.monotonic() - asked_wall_s
        if round_trip_s < self._round_trip_s:
            self._round_trip_s = round_trip_s
            self._offset_s = (asked_s + self._clock.now_s()) / 2 - sample.t_s
        return dataclasses.replace(
            sample,
            t_s=sample.t_s + self._offset_s,
            energy_t_s=sample.energy_t_s + self._offset_s,
        )

    def _call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            # Through a future: `ray.get` in an actor with an event loop warns about blocking it.
            return getattr(self._actuator, method).remote(*args).future().result(timeout_s)
        except TimeoutError:
            problem = f"did not answer within {timeout_s:g} s"
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, GpuError):
                raise type(cause)(f"node {self._node_id}: {cause}") from None
            problem = f"is away: {error}"
        raise GpuTransientError(f"the GPUs on node {self._node_id}: {method} {problem}")
