"""Tuned `ray.serve.llm`: its servers with a tuner beside each replica, and its builders with those.

In an existing config, two lines do it: `server_cls: agft_ray.serve.llm:TunedLLMServer`, and an
`energy` block under `experimental_configs` (see `EnergyConfig`).
"""

# No `from __future__ import annotations` here: Ray Serve looks at the builders' annotations.

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import llm as ray_llm
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import DPServer, LLMServer, PDDecodeServer, PDPrefillServer

from agft_ray.config import parse, problems_of
from agft_ray.errors import ConfigError
from agft_ray.gpu.config import NvmlGpuConfig, SimulatedGpuConfig
from agft_ray.gpu.registry import GpuSpec, claim_simulated_gpu
from agft_ray.serve.attach import attach_tuner
from agft_ray.serve.link import TunerLink
from agft_ray.serve.llm.config import (
    ENERGY_KEY,
    NO_SERVER_CLS,
    EnergyConfig,
    LlmAppConfig,
    LlmDpAppConfig,
    LlmPdAppConfig,
    check_llm_config,
)
from agft_ray.serve.vllm.look import look_at_vllm
from agft_ray.serve.vllm.statistics import VllmStats
from agft_ray.simulation.profiles import load_gpu_profile

log = logging.getLogger(__name__)


class TunedServerMixin:
    """Gives a server of `ray.serve.llm` a tuner; put it before the server among the bases.

    The tuner starts before the engine does and learns of its GPUs from Ray; it reads vLLM's
    statistics in process, so that it does not matter which way requests come in (ingress, direct
    streaming). No request waits for it.
    """

    tuner_role = "mixed"
    """What the engine does: 'mixed', 'prefill' or 'decode'; replicas of a role learn together."""
    _tuner: TunerLink | None = None

    @classmethod
    def get_deployment_options(cls, llm_config: LLMConfig) -> dict[str, Any]:
        """As the server's; raises `ConfigError` here, where the application is built, for settings
        of ours with anything wrong in them."""
        check_llm_config(llm_config.experimental_configs, llm_config.deployment_config)
        options: dict[str, Any] = super().get_deployment_options(llm_config)  # type: ignore[misc]
        return options

    async def start(self) -> None:
        """Start the tuner, then the engine."""
        llm_config: LLMConfig = await self.llm_config()  # type: ignore[attr-defined]
        wants_log = llm_config.engine_kwargs.get("enable_logging_iteration_details", False)
        stats = VllmStats(quiet=not wants_log)
        problem, times_steps = look_at_vllm()
        self._tuner = _attach(llm_config, self.tuner_role, stats, problem)
        await self._tuner.probed()
        await self._tuner.cleared()
        if times_steps:
            llm_config.update_engine_kwargs(enable_logging_iteration_details=True)
        with stats.registered():
            await super().start()  # type: ignore[misc]
        engine = getattr(self, "engine", None)
        stats.watch(getattr(engine, "_engine_client", engine), self._tuner.switch)

    async def check_health(self) -> None:
        """The engine's health, and whether its GPU is still there."""
        await super().check_health()  # type: ignore[misc]
        if self._tuner is not None:
            self._tuner.check_health()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """New tuner settings (the fields of `TunerConfig`), see `TunerLink.reconfigure`."""
        if self._tuner is not None:
            self._tuner.reconfigure(user_config)

    async def __del__(self) -> None:
        try:
            if self._tuner is not None:
                await self._tuner.close()
        finally:
            await super().__del__()  # type: ignore[misc]


class TunedLLMServer(TunedServerMixin, LLMServer):  # type: ignore[misc]
    """`LLMServer` with a tuner."""


class TunedDPServer(TunedServerMixin, DPServer):  # type: ignore[misc]
    """`DPServer` with a tuner for each data-parallel rank, which is a replica."""


class TunedPDPrefillServer(TunedServerMixin, PDPrefillServer):  # type: ignore[misc]
    """`PDPrefillServer` with a tuner, which judges by TTFT."""

    tuner_role = "prefill"


class TunedPDDecodeServer(TunedServerMixin, PDDecodeServer):  # type: ignore[misc]
    """`PDDecodeServer` with a tuner."""

    tuner_role = "decode"


class TunedDPPDPrefillServer(TunedServerMixin, PDPrefillServer, DPServer):  # type: ignore[misc]
    """`TunedPDPrefillServer` for data-parallel engines."""

    tuner_role = "prefill"


class TunedDPPDDecodeServer(TunedServerMixin, PDDecodeServer, DPServer):  # type: ignore[misc]
    """`TunedPDDecodeServer` for data-parallel engines."""

    tuner_role = "decode"


def _attach(llm_config: LLMConfig, role: str, stats: VllmStats, problem: str) -> TunerLink:
    energy = check_llm_config(llm_config.experimental_configs, llm_config.deployment_config)
    kwargs = llm_config.engine_kwargs
    source = llm_config.model_loading_config.model_source
    return attach_tuner(
        stats.sample,
        gpu=_gpu(energy),
        engine_model=source if isinstance(source, str) else llm_config.model_id,
        config=energy.tuner,
        tensor_parallel=kwargs.get("tensor_parallel_size", 1),
        role=role,
        quantization=kwargs.get("quantization") or "none",
        observe_only=problem,
        bundles=_bundles(),
    )


def _gpu(energy: EnergyConfig) -> GpuSpec | NvmlGpuConfig:
    if not isinstance(energy.gpu, SimulatedGpuConfig):
        return energy.gpu
    # No engine model of the profile is what vLLM runs; the simulated GPU stays idle all the same.
    model = next(iter(load_gpu_profile(energy.gpu.profile).models))
    application = serve.get_replica_context().app_name
    return claim_simulated_gpu(energy.gpu, application=application, model=model)


def _bundles() -> tuple[int, ...] | None:
    """The replica's bundles in the placement group of its gang; None if that is its own."""
    if serve.get_replica_context().gang_context is None:
        return None
    # DPServer has chosen them, and told vLLM so, by the time it starts.
    chosen = os.environ.get("VLLM_RAY_BUNDLE_INDICES")
    if chosen is None:
        log.warning(
            "which bundles of its gang's placement group are this replica's is not known; to have "
            "it tuned, name its GPUs in gpu.uuids"
        )
        return ()
    return tuple(int(index) for index in chosen.split(","))


# -- builders, for `import_path` -------------------------------------------------------------------


def build_openai_app(args: dict[str, Any]) -> serve.Application:
    """`ray.serve.llm:build_openai_app` with tuned servers; `args` as `LlmAppConfig`.

    Raises `ConfigError` naming every problem of ours and of Ray's at once.
    """
    config = parse(LlmAppConfig, args, source="args")
    places = [f"llm_configs.{index}" for index in range(len(config.llm_configs))]
    llm_configs = _llm_configs(dict(zip(places, config.llm_configs, strict=True)), config.energy)
    for llm_config in llm_configs:
        llm_config.server_cls = _tuned(llm_config.server_cls)
    return ray_llm.build_openai_app(_ray_args(config) | {"llm_configs": llm_configs})


def build_dp_openai_app(args: dict[str, Any]) -> serve.Application:
    """`ray.serve.llm:build_dp_openai_app` with tuned servers; `args` as `LlmDpAppConfig`."""
    config = parse(LlmDpAppConfig, args, source="args")
    given = {"llm_config": config.llm_config}
    (llm_config,) = _llm_configs(given, config.energy, takes_server_cls=False)
    with _substituted("data_parallel", {"DPServer": TunedDPServer}):
        return ray_llm.build_dp_openai_app(_ray_args(config) | {"llm_config": llm_config})


def build_pd_openai_app(args: dict[str, Any]) -> serve.Application:
    """`ray.serve.llm:build_pd_openai_app` with tuned servers; `args` as `LlmPdAppConfig`."""
    config = parse(LlmPdAppConfig, args, source="args")
    given = {"prefill_config": config.prefill_config, "decode_config": config.decode_config}
    prefill, decode = _llm_configs(given, config.energy, takes_server_cls=False)
    servers = {
        "PDPrefillServer": TunedPDPrefillServer,
        "PDDecodeServer": TunedPDDecodeServer,
        "DPPDPrefillServer": TunedDPPDPrefillServer,
        "DPPDDecodeServer": TunedDPPDDecodeServer,
    }
    with _substituted("prefill_decode", servers):
        return ray_llm.build_pd_openai_app(
            _ray_args(config) | {"prefill_config": prefill, "decode_config": decode}
        )


def _ray_args(config: LlmAppConfig | LlmDpAppConfig | LlmPdAppConfig) -> dict[str, Any]:
    """What is Ray's alone, as far as it was given."""
    names = ("ingress_cls_config", "ingress_deployment_config")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def _llm_configs(
    given: Mapping[str, object], energy: EnergyConfig, *, takes_server_cls: bool = True
) -> list[LLMConfig]:
    """Ray's `LLMConfig`s, by their places in the arguments, with an energy block each."""
    problems: list[str] = []
    found: list[LLMConfig] = []
    for place, value in given.items():
        try:
            llm_config = read_llm_config(value)
            if llm_config.server_cls is not None and not takes_server_cls:
                problems.append(f"{place}.{NO_SERVER_CLS}")
            llm_config.experimental_configs.setdefault(ENERGY_KEY, energy.model_dump())
            check_llm_config(llm_config.experimental_configs, llm_config.deployment_config)
            found.append(llm_config)
        except ConfigError as error:
            problems += [f"{place}.{problem}" for problem in error.problems]
    if problems:
        raise ConfigError("args", problems)
    return found


def read_llm_config(value: object) -> LLMConfig:
    """Ray's `LLMConfig` from a mapping, a YAML file's name or another, of which it is a copy.

    Raises `ConfigError` with every problem that Ray finds.
    """
    try:
        if isinstance(value, LLMConfig):
            return value.model_copy(deep=True)
        return (
            LLMConfig.from_file(value)
            if isinstance(value, str)
            else LLMConfig.model_validate(value)
        )
    except ValidationError as error:
        raise ConfigError("LLMConfig", problems_of(error, LLMConfig)) from None
    except (OSError, ValueError) as error:
        raise ConfigError("LLMConfig", [f"{value!r} is not a config: {error}"]) from None


def _tuned(server_cls: type | None) -> type:
    if server_cls is None or server_cls is LLMServer:
        return TunedLLMServer
    if issubclass(server_cls, TunedServerMixin):
        return server_cls
    raise ConfigError(
        "args",
        [
            f"server_cls: {server_cls.__name__} has no tuner; leave it out, or derive it from "
            "agft_ray.serve.llm.servers.TunedServerMixin as well"
        ],
    )


@contextlib.contextmanager
def _substituted(pattern: str, servers: Mapping[str, type]) -> Iterator[None]:
    """While an application is built, have Ray's builder take our servers.

    Its builders for data-parallel engines and for prefill and decode apart name their classes, and
    do not ask for `server_cls`.
    """
    try:
        builder = importlib.import_module(
            f"ray.llm._internal.serve.serving_patterns.{pattern}.builder"
        )
        originals = {name: getattr(builder, name) for name in servers}
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "args", [f"Ray {ray.__version__} does not build this as 2.60 does: {error}"]
        ) from error
    for name, server in servers.items():
        setattr(builder, name, server)
    try:
        yield
    finally:
        for name, server in originals.items():
            setattr(builder, name, server)
