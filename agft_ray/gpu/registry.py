"""From settings to GPUs: which ones a replica gets, and how a tuner opens them."""

from __future__ import annotations

import fcntl
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from agft_ray.clock import Clock, WallClock
from agft_ray.errors import ConfigError, GpuLostError
from agft_ray.gpu.config import NvmlGpuConfig, SimulatedGpuConfig, ZeusdGpuConfig
from agft_ray.gpu.leased import LeasableGpu, LeasedGpu
from agft_ray.gpu.safety.lease import default_directory
from agft_ray.gpu.simulated import SimulatedGpu
from agft_ray.gpu.zeusd.backend import ZeusdClient, ZeusdWriter
from agft_ray.simulation.device_file import DeviceFile
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.types import Actuator

MAX_GPUS = 1024


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Which GPUs of one node a tuner is to open, and how; travels between processes.

    `devices` are NVML UUIDs; a simulated GPU's is the path of its state file.
    """

    config: SimulatedGpuConfig | NvmlGpuConfig | ZeusdGpuConfig
    devices: tuple[str, ...]

    @property
    def clock(self) -> Clock:
        """The clock that the GPU's time is told by, and its engine's as well."""
        if isinstance(self.config, SimulatedGpuConfig):
            return SimulatedGpu(self.devices[0]).clock
        return WallClock()

    @property
    def lease_directory(self) -> Path:
        """Where the leases of these GPUs lie."""
        if isinstance(self.config, SimulatedGpuConfig):
            return Path(self.devices[0]).parent / "leases"
        return Path(self.config.lease_dir or default_directory())

    @property
    def known_arms(self) -> tuple[int, ...] | None:
        """What can be locked, where that is known without asking a real GPU."""
        if isinstance(self.config, SimulatedGpuConfig):
            return SimulatedGpu(self.devices[0]).arms
        return None


def open_gpu(spec: GpuSpec, *, owner: str) -> LeasedGpu:
    """The node's GPUs of one replica as one; nothing is set or leased yet.

    `owner` is who to name as the holder of the leases. Raises `GpuUnavailableError` if a GPU
    is not to be seen, and other `GpuError`s as NVML or the daemon answer.
    """
    if isinstance(spec.config, SimulatedGpuConfig):
        gpu = SimulatedGpu(Path(spec.devices[0]))
        return LeasedGpu([gpu], directory=spec.lease_directory, owner=owner)
    gpus = [_open_nvml(uuid, spec.config) for uuid in spec.devices]
    return LeasedGpu(gpus, directory=spec.lease_directory, owner=owner)


def _open_nvml(uuid: str, config: NvmlGpuConfig) -> LeasableGpu:
    from agft_ray.gpu.nvml.backend import NvmlGpu, list_devices

    writer = None
    if isinstance(config, ZeusdGpuConfig):
        client = ZeusdClient(config.socket_path, config.token_path or "")
        writer = ZeusdWriter.for_device(client, uuid, list_devices())
    return NvmlGpu(
        uuid,
        clock=WallClock(),
        writer=writer,
        actuator=Actuator(config.actuator),
        restore_sm_clocks_mhz=config.restore_sm_clocks_mhz,
    )


def claim_simulated_gpu(
    config: SimulatedGpuConfig, *, application: str, model: str, speed: float = 1.0, seed: int = 0
) -> GpuSpec:
    """The application's first simulated GPU that no living process has claimed; made if need be.

    Like the GPUs of a node, they outlive those who use them: the replacement of a killed replica
    finds its GPU, with the energy counter where it was. The claim ends with this process.

    Args:
        config: what to simulate.
        application: applications have GPUs of their own, unless they share a `state_dir`.
        model: the engine model that runs on it, one of the GPU profile's.
        speed: simulated seconds per wall second.
        seed: seeds the noise; the GPU's number is added to it.

    Raises `GpuLostError` if the directory cannot be used, `ConfigError` for an unknown model.
    """
    load_gpu_profile(config.profile).model_profile(model)
    directory = config.directory(application)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        index = _claim_first_free(directory)
    except OSError as error:
        raise GpuLostError(f"simulated GPUs in {directory}: {error.strerror}") from None
    path = directory / f"gpu-{index}.json"
    create = functools.partial(
        DeviceFile.create,
        path,
        uuid=f"GPU-simulated-{index}",
        profile=config.profile,
        model=model,
        speed=speed,
        seed=seed + index,
        counter_update_s=config.counter_update_s,
        noise=config.noise,
        history_path=directory / f"gpu-{index}.history.csv" if config.history else None,
    )
    try:
        create()
    except ConfigError as error:
        if any(problem.startswith("path:") for problem in error.problems):
            raise
        # Left by an application with other arguments; the claim says that nobody uses it.
        path.unlink()
        create()
    return GpuSpec(config, (str(path),))


def _claim_first_free(directory: Path) -> int:
    """Lock the first free GPU's lock file, for as long as this process lives."""
    for index in range(MAX_GPUS):
        fd = os.open(directory / f"gpu-{index}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
        else:
            return index
    raise GpuLostError(f"all {MAX_GPUS} simulated GPUs in {directory} are in use")
