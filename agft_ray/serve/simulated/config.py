"""The arguments of `agft_ray.serve:build_app`; importable without Ray."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from agft_ray.config import Count, NonNegative, Positive, StrictModel
from agft_ray.errors import ConfigError
from agft_ray.gpu.config import GpuConfig, SimulatedGpuConfig, known_profile
from agft_ray.settings import TunerConfig, check_pushes
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile


class AppConfig(StrictModel):
    """Arguments of a simulated application. Changing them replaces the replicas.

    What is to change on live replicas (mode, policy, SLOs, holdouts) goes into the deployment's
    `user_config`, which has the fields of `TunerConfig`.
    """

    model: str = "llama-3.1-8b"
    """An engine model of the GPU profile; also the name under which it is served."""
    num_replicas: Count = 3
    """Replicas, each with an engine, a GPU and a tuner; holdouts among them."""
    gpu: GpuConfig = Field(default_factory=SimulatedGpuConfig)
    """What the tuners set and read. With `kind: nvml` or `zeusd` this is a rehearsal: the clocks
    are those of real GPUs, the engines are simulated at the default clocks of `engine_profile`."""
    engine_profile: str = "rtx_a6000"
    """The GPU profile that simulated engines follow where `gpu` is a real one."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    speed: Positive = 1.0
    """Simulated seconds per wall second."""
    stream_group_s: NonNegative = 0.05
    """Wall time over which streamed tokens are grouped into one chunk (the first never waits)."""
    seed: int = 0
    """Seeds the GPUs' noise and, where a request asks for no length, the lengths of answers."""
    tuner: TunerConfig = Field(default_factory=TunerConfig)
    """First settings of the tuners; a `user_config` in the config file takes their place."""

    @field_validator("gpu", mode="before")
    @classmethod
    def _simulated_unless_said(cls, gpu: object) -> object:
        return {"kind": "simulated"} | gpu if isinstance(gpu, dict) else gpu

    @field_validator("engine_profile")
    @classmethod
    def _known_profile(cls, profile: str) -> str:
        return known_profile(profile)

    @model_validator(mode="after")
    def _consistent(self) -> AppConfig:
        profile = load_gpu_profile(self.profile)
        try:
            self.engine.for_model(profile.model_profile(self.model))
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from None
        if isinstance(self.gpu, SimulatedGpuConfig):
            self.tuner.arms(profile.supported_sm_clocks_mhz)
        elif self.speed != 1.0:
            raise ValueError(f"speed ({self.speed:g}) must be 1 with a real GPU; leave it out")
        check_pushes(self.tuner, speed=self.speed)
        if self.tuner.holdout_replicas > self.num_replicas:
            raise ValueError(
                f"tuner.holdout_replicas ({self.tuner.holdout_replicas}) must not exceed "
                f"num_replicas ({self.num_replicas})"
            )
        return self

    @property
    def profile(self) -> str:
        """The GPU profile that the simulated engines follow."""
        return self.gpu.profile if isinstance(self.gpu, SimulatedGpuConfig) else self.engine_profile
