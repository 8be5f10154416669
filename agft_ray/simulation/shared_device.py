"""A device that lives in a file: what engine and tuner processes on one host share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from agft_ray.clock import WallClock
from agft_ray.simulation.device import Device
from agft_ray.simulation.device_file import DeviceFile, now_s
from agft_ray.simulation.physics import StepWork
from agft_ray.simulation.profiles import load_gpu_profile

STALL_GRACE_WALL_S = 5.0
"""How late an engine may be, in wall seconds, before the GPU counts as abandoned by it."""

_HISTORY_HEADER = "t0_s,t1_s,sm_clock_mhz,power_w,prefill_tokens,decode_sequences,context_tokens\n"


class SharedDevice:
    """The engine's side of a simulated GPU, over the `DeviceFile` at `path`.

    Raises `GpuLostError` if the file is missing or damaged, now or in any later call.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = DeviceFile(path)
        self.path = self._file.path
        with self._file.transaction() as state:
            self.uuid: str = state["uuid"]
            self.clock = WallClock(speed=state["speed"], origin_s=state["origin_s"])
            self.profile = load_gpu_profile(state["profile"])
            self.model = self.profile.model_profile(state["model"])
            self._history_path: str | None = state["history_path"]
            self._device = Device(
                self.profile,
                self.model,
                counter_update_s=state["counter_update_s"],
                noise=state["noise"],
                stall_grace_s=STALL_GRACE_WALL_S * self.clock.speed,
                history=None if self._history_path is None else self._record,
            )
        self._segments: list[str] = []

    @contextlib.contextmanager
    def transaction(self) -> Iterator[tuple[Device, float]]:
        """The device and the simulated time now, for as long as nobody else can touch it."""
        with self._file.transaction() as state:
            self._segments.clear()
            self._device.from_state(state)
            yield self._device, now_s(state)
            state.update(self._device.to_state())
            self._append_history()

    def now_s(self) -> float:
        """Simulated seconds since the file was made."""
        return self.clock.now_s()

    def begin_step(self, t_s: float, work: StepWork) -> float:
        """See `Device.begin_step`."""
        with self.transaction() as (device, _):
            return device.begin_step(t_s, work)

    def step_end_s(self) -> float | None:
        """See `Device.step_end_s`."""
        with self.transaction() as (device, _):
            return device.step_end_s()

    def finish_step(self) -> float:
        """See `Device.finish_step`."""
        with self.transaction() as (device, _):
            return device.finish_step()

    def _record(
        self, t0_s: float, t1_s: float, sm_clock_mhz: int, power_w: float, work: StepWork | None
    ) -> None:
        w = work or StepWork()
        self._segments.append(
            f"{t0_s!r},{t1_s!r},{sm_clock_mhz},{power_w!r},"
            f"{w.prefill_tokens},{w.decode_sequences},{w.context_tokens}\n"
        )

    def _append_history(self) -> None:
        if self._history_path is None or not self._segments:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._history_path, flags, 0o600)
        try:
            header = "" if os.fstat(fd).st_size else _HISTORY_HEADER
            os.write(fd, (header + "".join(self._segments)).encode())
        finally:
            os.close(fd)
