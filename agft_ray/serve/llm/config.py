"""Settings of tuned `ray.serve.llm` applications; importable without Ray and vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, field_validator

from agft_ray.config import StrictModel, parse
from agft_ray.errors import ConfigError
from agft_ray.gpu.config import GpuConfig, NvmlGpuConfig
from agft_ray.settings import TunerConfig, check_pushes

ENERGY_KEY = "energy"
"""Where an `LLMConfig` has our settings: in its `experimental_configs`."""
NO_SERVER_CLS = (
    "server_cls: this builder names its servers itself, as Ray's does, and would pass it over; "
    "leave it out"
)
"""The problem of an `LLMConfig` for data-parallel engines, or for prefill and decode apart."""


class EnergyConfig(StrictModel):
    """The `energy` block of an `LLMConfig`: what its replicas' tuners work on, and how."""

    gpu: GpuConfig = Field(default_factory=NvmlGpuConfig)
    """The GPUs to tune: those that Ray has given the replica, unless `uuids` names some."""
    tuner: TunerConfig = Field(default_factory=TunerConfig)
    """First settings of the tuners; a `user_config` of the deployment takes their place."""

    @field_validator("gpu", mode="before")
    @classmethod
    def _nvml_unless_said(cls, gpu: object) -> object:
        return {"kind": "nvml"} | gpu if isinstance(gpu, dict) else gpu


class LlmAppConfig(StrictModel):
    """Arguments of `agft_ray.serve:build_openai_app`: those of `ray.serve.llm:build_openai_app`,
    whose other fields Ray checks, and `energy`."""

    llm_configs: list[Any] = Field(min_length=1)
    """As for Ray: mappings, names of YAML files, or `LLMConfig` objects."""
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    """For every `LLMConfig` that has no `experimental_configs.energy` of its own."""
    ingress_cls_config: Any = None
    ingress_deployment_config: dict[str, Any] | None = None


class LlmDpAppConfig(StrictModel):
    """Arguments of `agft_ray.serve:build_dp_openai_app` (one data-parallel engine)."""

    llm_config: Any
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    ingress_cls_config: Any = None
    ingress_deployment_config: dict[str, Any] | None = None


class LlmPdAppConfig(StrictModel):
    """Arguments of `agft_ray.serve:build_pd_openai_app` (prefill and decode apart)."""

    prefill_config: Any
    decode_config: Any
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    """For both roles, unless their configs have blocks of their own."""
    ingress_cls_config: Any = None
    ingress_deployment_config: dict[str, Any] | None = None


def check_llm_config(
    experimental_configs: Mapping[str, Any], deployment_config: Mapping[str, Any]
) -> EnergyConfig:
    """The energy settings of an `LLMConfig`, given two of its fields.

    Raises `ConfigError` with every problem of the `energy` block and of a `user_config`.
    """
    problems: list[str] = []
    energy = EnergyConfig()
    block = experimental_configs.get(ENERGY_KEY, {})
    user_config = deployment_config.get("user_config")
    try:
        energy = parse(EnergyConfig, block, source=ENERGY_KEY)
        _check_pushes(energy.tuner, "tuner.window_s")
    except ConfigError as error:
        problems += [
            f"experimental_configs.{problem}"
            for problem in with_way_out(f"{ENERGY_KEY}.{problem}" for problem in error.problems)
        ]
    try:
        if user_config is not None:
            check_user_config(user_config)
    except ConfigError as error:
        problems += [f"deployment_config.user_config.{problem}" for problem in error.problems]
    if problems:
        raise ConfigError("LLMConfig", problems)
    return energy


def check_user_config(user_config: object) -> TunerConfig:
    """A `user_config` of a deployment; raises `ConfigError` with every problem of it."""
    config = parse(TunerConfig, user_config, source="user_config")
    _check_pushes(config, "window_s")
    return config


def with_way_out(problems: Iterable[str]) -> list[str]:
    """Problems of `energy` blocks, with the right place of what is often put in a wrong one."""
    return [problem + _way_out(problem) for problem in problems]


def _way_out(problem: str) -> str:
    field, _, rule = problem.partition(": ")
    block, _, name = field.rpartition(".")
    if block != ENERGY_KEY or rule != "unknown setting":
        return ""
    if name in TunerConfig.model_fields:
        return f" here; it belongs under {ENERGY_KEY}.tuner"
    if name in NvmlGpuConfig.model_fields:
        return f" here; it belongs under {ENERGY_KEY}.gpu"
    return ""


def _check_pushes(config: TunerConfig, field: str) -> None:
    try:
        check_pushes(config, speed=1.0)
    except ValueError as error:
        raise ConfigError(ENERGY_KEY, [f"{field}: {error}"]) from None
