"""What a replica and its tuner tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agft_ray.gpu.registry import GpuSpec
from agft_ray.settings import TunerConfig
from agft_ray.types import EngineSample


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What distinguishes engines whose experience must not be mixed."""

    model: str
    tensor_parallel: int = 1
    role: str = "mixed"
    quantization: str = "none"


@dataclass(frozen=True, slots=True)
class TunerSpec:
    """What a tuner actor is made of; it is handed over again when Ray restarts the actor.

    So its settings are not among it: they change, and come with the replica's first pushes.
    """

    application: str
    deployment: str
    replica: str
    gpu: GpuSpec
    """The GPUs on the replica's own node."""
    engine: EngineIdentity
    elsewhere: tuple[tuple[str, GpuSpec], ...] = ()
    """Node ids and GPUs of an engine that spans nodes: read and set from here as well."""

    problem: str = ""
    """Why there are no GPUs to open, where that is so; the tuner has nothing to do but say so."""

    @property
    def owner(self) -> str:
        """Who the node's leases are held by, for people."""
        return f"{self.application}#{self.deployment} replica {self.replica}"


@dataclass(frozen=True, slots=True)
class EnginePush:
    """What a replica tells its tuner some times a second.

    `sample` is None while the engine's statistics cannot be had; `figures` are further facts for
    the status page; `config` comes along until the tuner has answered with its version.
    """

    sample: EngineSample | None
    rank: int | None
    figures: dict[str, Any]
    config: TunerConfig | None
    config_version: int


@dataclass(frozen=True, slots=True)
class TunerReply:
    """What a replica learns in return.

    `role` is 'tuned' or 'holdout', `config_version` that of the newest settings that have come, -1
    if none have, `config_error` why they were refused, `gpu_works` whether this tuner has opened
    the GPU, `gpu_lost` how the GPU was lost, or "".
    """

    role: str
    config_version: int
    config_error: str = ""
    gpu_works: bool = False
    gpu_lost: str = ""
