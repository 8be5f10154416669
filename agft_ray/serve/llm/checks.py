"""Checking an application of `ray.serve.llm` in a config file, as far as that can be done here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agft_ray.config import StrictModel, load_yaml, parse
from agft_ray.errors import ConfigError
from agft_ray.gpu.config import GpuConfig
from agft_ray.serve.llm.config import (
    ENERGY_KEY,
    NO_SERVER_CLS,
    EnergyConfig,
    LlmAppConfig,
    LlmDpAppConfig,
    LlmPdAppConfig,
    check_llm_config,
    check_user_config,
    with_way_out,
)
from agft_ray.settings import TunerConfig

RAY_BUILDER = "ray.serve.llm:build_openai_app"
BUILDERS: dict[str, type[StrictModel]] = {
    "agft_ray.serve:build_openai_app": LlmAppConfig,
    "agft_ray.serve:build_dp_openai_app": LlmDpAppConfig,
    "agft_ray.serve:build_pd_openai_app": LlmPdAppConfig,
}
TUNED_SERVER = "agft_ray.serve.llm:TunedLLMServer"
Problems = list[str]


@dataclass(frozen=True, slots=True)
class TunedLlm:
    """An `LLMConfig` whose replicas are tuned."""

    model_id: str
    role: str
    gpu: GpuConfig
    tuner: TunerConfig
    """What the tuners start with: a `user_config` goes before the `energy` block."""


@dataclass(frozen=True, slots=True)
class LlmApplication:
    """An application of `ray.serve.llm` with tuned replicas."""

    llms: tuple[TunedLlm, ...]
    checked_by_ray: bool
    """Whether Ray's own part of each `LLMConfig` was checked: it needs `ray.serve.llm`."""


@dataclass(frozen=True, slots=True)
class _Llm:
    """An `LLMConfig` as the file has it, and what its deployment is called before the ':'."""

    place: str
    content: dict[str, Any]
    role: str
    prefix: str
    by_us: bool
    """Whether one of our builders makes it, with a tuned server in any case."""
    takes_server_cls: bool

    @property
    def model_id(self) -> str:
        loading = self.content.get("model_loading_config")
        return str(loading.get("model_id", "?")) if isinstance(loading, dict) else "?"

    @property
    def deployment(self) -> str:
        # As Ray names it, ray.llm._internal.serve.core.server.builder.
        return f"{self.prefix}:{self.model_id.replace('/', '--').replace('.', '_')}"

    @property
    def server(self) -> str:
        return str(self.content.get("server_cls") or "ray.serve.llm")

    @property
    def tuned(self) -> bool:
        """Whether it has a tuner, or is meant to."""
        experimental = self.content.get("experimental_configs")
        blocks = (self.content, experimental if isinstance(experimental, dict) else {})
        return (
            self.by_us
            or self.server.startswith("agft_ray.")
            or any(ENERGY_KEY in block for block in blocks)
        )


def check_llm_application(
    application: dict[str, Any], place: str, problems: Problems
) -> LlmApplication | None:
    """The application, or None if no replica of it would be tuned or anything in it is wrong.

    Problems are added to `problems`, each with its place in the file.
    """
    args = application.get("args") or {}
    before = len(problems)
    if not isinstance(args, dict):
        problems.append(f"{place}.args: must be a mapping, got {args!r}")
        return None
    energy = _default_energy(application["import_path"], args, f"{place}.args.", problems)
    llms = list(_llms(application["import_path"], args, f"{place}.args", problems))
    user_configs = _user_configs(application, place, llms, problems)
    found = [
        tuned
        for llm in llms
        if llm.tuned and (tuned := _check(llm, energy, user_configs.get(llm.deployment), problems))
    ]
    if len(problems) > before or not found:
        return None
    by_ray = _check_by_ray(llms, problems)
    return None if len(problems) > before else LlmApplication(tuple(found), by_ray)


def _default_energy(
    import_path: str, args: dict[str, Any], place: str, problems: Problems
) -> object:
    """What LLMs without an `energy` block have, as the file has it."""
    if import_path in BUILDERS:
        try:
            parse(BUILDERS[import_path], args, source="args")
        except ConfigError as error:
            problems += [place + problem for problem in with_way_out(error.problems)]
            return {}
    return args.get(ENERGY_KEY, {})


def _llms(import_path: str, args: dict[str, Any], place: str, problems: Problems) -> Iterator[_Llm]:
    by_us = import_path in BUILDERS
    takes_server_cls = BUILDERS.get(import_path) not in (LlmPdAppConfig, LlmDpAppConfig)
    if BUILDERS.get(import_path) is LlmPdAppConfig:
        names = {"prefill_config": ("prefill", "Prefill"), "decode_config": ("decode", "Decode")}
        given = [(name, args.get(name), *named) for name, named in names.items()]
    elif BUILDERS.get(import_path) is LlmDpAppConfig:
        given = [("llm_config", args.get("llm_config"), "mixed", "TunedDPServer")]
    else:
        listed = args.get("llm_configs")
        given = [
            (f"llm_configs.{index}", value, "mixed", _server_name(value, by_us))
            for index, value in enumerate(listed if isinstance(listed, list) else [])
        ]
    for name, value, role, prefix in given:
        content = _content(value, f"{place}.{name}", problems)
        if content is not None:
            yield _Llm(f"{place}.{name}", content, role, prefix, by_us, takes_server_cls)


def _server_name(value: object, by_us: bool) -> str:
    given = value.get("server_cls") if isinstance(value, dict) else None
    name = str(given or "LLMServer").replace(":", ".").rpartition(".")[2]
    return "TunedLLMServer" if by_us and name == "LLMServer" else name


def _content(value: object, place: str, problems: Problems) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = load_yaml(value)
        except ConfigError as error:
            problems += [f"{place}: {value!r}: {problem}" for problem in error.problems]
            return None
    if isinstance(value, dict):
        return value
    if value is not None:  # a missing one has been named
        problems.append(f"{place}: must be a mapping or the name of a YAML file, got {value!r}")
    return None


def _user_configs(
    application: dict[str, Any], place: str, llms: list[_Llm], problems: Problems
) -> dict[str, TunerConfig]:
    """The `user_config`s of the application's `deployments`, by deployment."""
    names = [llm.deployment for llm in llms]
    tuned = [llm.deployment for llm in llms if llm.tuned]
    found: dict[str, TunerConfig] = {}
    deployments = application.get("deployments") or []
    for index, given in enumerate(deployments if isinstance(deployments, list) else []):
        here = f"{place}.deployments.{index}"
        name = str(given.get("name", "")) if isinstance(given, dict) else ""
        if ":" in name and name not in names:
            problems.append(f"{here}.name: no deployment {name!r}, choose one of {names}")
        elif name in tuned and "user_config" in given:
            try:
                found[name] = check_user_config(given["user_config"])
            except ConfigError as error:
                problems += [f"{here}.user_config.{problem}" for problem in error.problems]
    return found


def _check(
    llm: _Llm, energy: object, user_config: TunerConfig | None, problems: Problems
) -> TunedLlm | None:
    before = len(problems)
    problems += _misplaced(llm)
    parts: list[dict[str, Any]] = []
    for name in ("experimental_configs", "deployment_config"):
        part = llm.content.get(name) or {}
        if not isinstance(part, dict):
            problems.append(f"{llm.place}.{name}: must be a mapping, got {part!r}")
        parts.append(part if isinstance(part, dict) else {})
    experimental, deployment = parts
    try:
        own: EnergyConfig = check_llm_config({ENERGY_KEY: energy} | experimental, deployment)
    except ConfigError as error:
        problems += [f"{llm.place}.{problem}" for problem in error.problems]
    if len(problems) > before:
        return None
    if user_config is None and deployment.get("user_config") is not None:
        user_config = check_user_config(deployment["user_config"])
    return TunedLlm(llm.model_id, llm.role, own.gpu, user_config or own.tuner)


def _misplaced(llm: _Llm) -> Problems:
    found = []
    if ENERGY_KEY in llm.content:
        found.append(f"{llm.place}.{ENERGY_KEY}: belongs under experimental_configs")
    if not llm.takes_server_cls and llm.content.get("server_cls"):
        found.append(f"{llm.place}.{NO_SERVER_CLS}")
    if not llm.by_us and llm.server.startswith("ray."):
        found.append(
            f"{llm.place}.server_cls: is {llm.server}, which has no tuner for the energy block; "
            f"write {TUNED_SERVER}"
        )
    return found


def _check_by_ray(llms: list[_Llm], problems: Problems) -> bool:
    """Have Ray check its own parts; False where `ray.serve.llm` is not installed."""
    try:
        from agft_ray.serve.llm.servers import read_llm_config
    except ImportError:
        return False
    for llm in llms:
        try:
            read_llm_config(llm.content)
        except ConfigError as error:
            problems += [f"{llm.place}.{problem}" for problem in error.problems]
    return True
