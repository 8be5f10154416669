"""From settings to GPUs: which one a replica gets, and how a tuner opens it."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from agft_ray.clock import Clock
from agft_ray.config import Positive, StrictModel
from agft_ray.errors import ConfigError, GpuLostError
from agft_ray.gpu.base import Gpu
from agft_ray.gpu.simulated import SimulatedGpu
from agft_ray.simulation.device_file import DeviceFile
from agft_ray.simulation.profiles import load_gpu_profile


class SimulatedGpuConfig(StrictModel):
    """A simulated GPU for each replica."""

    kind: Literal["simulated"] = "simulated"
    profile: str = "rtx_a6000"
    """A bundled GPU profile's name, or the path of your own."""
    state_dir: str | None = None
    """Where the GPUs' state files lie (absolute); None: a folder in the temporary directory."""
    counter_update_s: Positive = 0.1
    """How often the energy counter is updated."""
    history: bool = False
    """Also write every change of clock and power to a CSV file beside the state file."""

    @field_validator("profile")
    @classmethod
    def _known(cls, profile: str) -> str:
        try:
            load_gpu_profile(profile)
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from None
        return profile

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, state_dir: str | None) -> str | None:
        if state_dir is not None and not Path(state_dir).is_absolute():
            raise ValueError(
                f"{state_dir!r} is not an absolute path; replicas have working directories of "
                "their own"
            )
        return state_dir

    def directory(self, application: str) -> Path:
        """The folder of one application's GPUs."""
        if self.state_dir is not None:
            return Path(self.state_dir)
        return Path(tempfile.gettempdir()) / f"agft_ray-{os.getuid()}" / application


MAX_GPUS = 1024


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Which GPU a tuner is to open; travels between processes."""

    state_path: str

    @property
    def reset_paths(self) -> list[str]:
        """What the guard is to reset."""
        return [self.state_path]


def open_gpu(spec: GpuSpec) -> tuple[Gpu, Clock]:
    """The GPU, and the clock its time is told by; raises `GpuLostError` if it is not there."""
    gpu = SimulatedGpu(Path(spec.state_path))
    return gpu, gpu.clock


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
    return GpuSpec(str(path))


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
