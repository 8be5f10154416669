"""Which GPUs a replica's tuner works on, and how: the `gpu` block of a config file."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from agft_ray.config import Count, Positive, StrictModel
from agft_ray.errors import ConfigError
from agft_ray.simulation.profiles import load_gpu_profile


def absolute(path: str | None) -> str | None:
    """The path, refused with a `ValueError` unless it is absolute."""
    if path is not None and not Path(path).is_absolute():
        raise ValueError(
            f"{path!r} is not an absolute path; replicas have working directories of their own"
        )
    return path


def known_profile(profile: str) -> str:
    """The GPU profile's name or path, refused with a `ValueError` if it cannot be loaded."""
    try:
        load_gpu_profile(profile)
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from None
    return profile


class SimulatedGpuConfig(StrictModel):
    """A simulated GPU for each replica."""

    kind: Literal["simulated"] = "simulated"
    profile: str = "rtx_a6000"
    """A bundled GPU profile's name, or the path of your own."""
    state_dir: str | None = None
    """Where the GPUs' state files lie (absolute); None: a folder in the temporary directory."""
    counter_update_s: Positive = 0.1
    """How often the energy counter is updated."""
    noise: bool = False
    """Step times and the energy counter vary as the profile's section `noise` says."""
    history: bool = False
    """Also write every change of clock and power to a CSV file beside the state file."""

    @field_validator("profile")
    @classmethod
    def _known(cls, profile: str) -> str:
        return known_profile(profile)

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, state_dir: str | None) -> str | None:
        return absolute(state_dir)

    def directory(self, application: str) -> Path:
        """The folder of one application's GPUs."""
        if self.state_dir is not None:
            return Path(self.state_dir)
        return Path(tempfile.gettempdir()) / f"agft_ray-{os.getuid()}" / application


class NvmlGpuConfig(StrictModel):
    """The replica's own NVIDIA GPUs, read and set through NVML.

    `control` needs root, or CAP_SYS_ADMIN in the container; `observe` needs nothing.
    """

    kind: Literal["nvml"] = "nvml"
    uuids: tuple[str, ...] | None = None
    """UUIDs of the GPUs to tune; None: those that Ray has given the replica."""
    actuator: Literal["sm_clock", "power_limit"] = "sm_clock"
    """What to set. `power_limit` is for GPUs whose clocks cannot be locked; a limit does not bind
    in decode, so it saves less."""
    restore_sm_clocks_mhz: tuple[Count, Count] | None = None
    """The range (lowest, highest) that an administrator has locked, to return to; None: none. It
    has to be said, because NVML cannot be asked."""
    lease_dir: str | None = None
    """Where this node's leases lie (absolute); None: `AGFT_RAY_LEASE_DIR`, or a folder of the
    user's own. Containers that share GPUs must share it."""

    @field_validator("uuids", mode="before")
    @classmethod
    def _listed(cls, uuids: object) -> object:
        return tuple(uuids) if isinstance(uuids, list) else uuids

    @field_validator("uuids")
    @classmethod
    def _whole_gpus(cls, uuids: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for uuid in uuids or ():
            if not re.fullmatch(r"GPU-[0-9A-Za-z-]{1,60}", uuid):
                raise ValueError(
                    f"{uuid!r} is not the UUID of a whole GPU; take it from `nvidia-smi -L` or "
                    "`agft-ray doctor`: GPU-..."
                )
        if uuids is not None and (not uuids or len(set(uuids)) < len(uuids)):
            raise ValueError(f"{list(uuids)} is empty or names a GPU twice; leave it out for Ray's")
        return uuids

    @field_validator("restore_sm_clocks_mhz", mode="before")
    @classmethod
    def _pair(cls, clocks: object) -> object:
        return tuple(clocks) if isinstance(clocks, list) else clocks

    @field_validator("restore_sm_clocks_mhz")
    @classmethod
    def _ordered(cls, clocks: tuple[int, int] | None) -> tuple[int, int] | None:
        if clocks is not None and clocks[0] > clocks[1]:
            raise ValueError(f"{list(clocks)} must be [lowest, highest]; swap them")
        return clocks

    @field_validator("lease_dir")
    @classmethod
    def _absolute(cls, lease_dir: str | None) -> str | None:
        return absolute(lease_dir)


class ZeusdGpuConfig(NvmlGpuConfig):
    """As `nvml`, with clocks set by the Zeus daemon, so that the replica needs no privilege."""

    kind: Literal["zeusd"] = "zeusd"  # type: ignore[assignment]
    socket_path: str = "/run/zeusd/zeusd.sock"
    """The daemon's Unix socket."""
    token_path: str | None = None
    """A file with the daemon's token, where it asks for one."""

    @field_validator("socket_path", "token_path")
    @classmethod
    def _absolute_paths(cls, path: str | None) -> str | None:
        return absolute(path)


GpuConfig = Annotated[
    SimulatedGpuConfig | NvmlGpuConfig | ZeusdGpuConfig, Field(discriminator="kind")
]
