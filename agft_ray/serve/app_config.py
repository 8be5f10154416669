"""The arguments of `agft_ray.serve:build_app`; importable without Ray."""

from __future__ import annotations

from pydantic import Field, model_validator

from agft_ray.config import Count, NonNegative, Positive, StrictModel
from agft_ray.errors import ConfigError
from agft_ray.gpu.registry import SimulatedGpuConfig
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
    gpu: SimulatedGpuConfig = Field(default_factory=SimulatedGpuConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    speed: Positive = 1.0
    """Simulated seconds per wall second."""
    stream_group_s: NonNegative = 0.05
    """Wall time over which streamed tokens are grouped into one chunk (the first never waits)."""
    seed: int = 0
    """Seeds the GPUs' noise and, where a request asks for no length, the lengths of answers."""
    tuner: TunerConfig = Field(default_factory=TunerConfig)
    """First settings of the tuners; a `user_config` in the config file takes their place."""

    @model_validator(mode="after")
    def _consistent(self) -> AppConfig:
        profile = load_gpu_profile(self.gpu.profile)
        try:
            self.engine.for_model(profile.model_profile(self.model))
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from None
        self.tuner.arms(profile.supported_sm_clocks_mhz)
        check_pushes(self.tuner, speed=self.speed)
        if self.tuner.holdout_replicas > self.num_replicas:
            raise ValueError(
                f"tuner.holdout_replicas ({self.tuner.holdout_replicas}) must not exceed "
                f"num_replicas ({self.num_replicas})"
            )
        return self
