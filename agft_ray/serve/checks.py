"""Checking a `serve run` config file before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agft_ray.config import load_yaml, parse
from agft_ray.errors import ConfigError
from agft_ray.serve.llm.checks import (
    BUILDERS,
    RAY_BUILDER,
    TUNED_SERVER,
    LlmApplication,
    check_llm_application,
)
from agft_ray.serve.simulated.config import AppConfig

BUILDER = "agft_ray.serve:build_app"
DEPLOYMENT = "SimulatedLLM"


def validate_file(path: str | Path) -> list[AppConfig | LlmApplication]:
    """Check a config file and every application of ours in it.

    Returns what will run: of a simulated application its arguments, with a `user_config` of the
    file in place of `tuner`. Raises `ConfigError` with all problems of the file, each named by its
    place in it.
    """
    content = load_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("applications"), list):
        raise ConfigError(str(path), ["applications: required, a list of Serve applications"])
    problems: list[str] = []
    found: list[AppConfig | LlmApplication | None] = []
    for index, application in enumerate(content["applications"]):
        place = f"applications.{index}"
        if not isinstance(application, dict) or "import_path" not in application:
            problems.append(f"{place}.import_path: required, and missing")
        elif application["import_path"] == BUILDER:
            found.append(_check(application, place, problems))
        elif application["import_path"] in (*BUILDERS, RAY_BUILDER):
            found.append(check_llm_application(application, place, problems))
    applications = [application for application in found if application is not None]
    if not applications and not problems:
        problems.append(
            f"applications: nothing to check; none has an import_path of ours ({BUILDER}, "
            f"{', '.join(BUILDERS)}), or {RAY_BUILDER} with server_cls {TUNED_SERVER}"
        )
    problems += _serve_problems(content)
    if problems:
        raise ConfigError(str(path), problems)
    return applications


def simulated_app(path: str | Path) -> AppConfig:
    """The arguments of the file's only application, which must be a simulated one.

    Raises `ConfigError` if it is not, or with all problems of the file.
    """
    applications = validate_file(path)
    if len(applications) == 1 and isinstance(applications[0], AppConfig):
        return applications[0]
    raise ConfigError(str(path), [f"applications: there must be one, with import_path {BUILDER!r}"])


def _check(application: dict[str, Any], place: str, problems: list[str]) -> AppConfig | None:
    args = application.get("args") or {}
    config = _parse(args, f"{place}.args.", f"{place}.args.tuner.", problems)
    deployments = application.get("deployments") or []
    if not isinstance(deployments, list):
        problems.append(f"{place}.deployments: must be a list, got {deployments!r}")
        return None
    for index, deployment in enumerate(deployments):
        here = f"{place}.deployments.{index}"
        if not isinstance(deployment, dict) or deployment.get("name") != DEPLOYMENT:
            problems.append(
                f"{here}: must be a mapping with name {DEPLOYMENT!r}, the application's only "
                f"deployment, got {deployment!r}"
            )
        elif isinstance(args, dict) and "user_config" in deployment:
            merged = args | {"tuner": deployment["user_config"]}
            config = _parse(merged, f"{place}.args.", f"{here}.user_config.", problems)
    return config


def _parse(
    args: object, args_place: str, tuner_place: str, problems: list[str]
) -> AppConfig | None:
    try:
        return parse(AppConfig, args, source="args")
    except ConfigError as error:
        for problem in error.problems:
            of_tuner = problem.startswith("tuner.")
            named = (
                tuner_place + problem.removeprefix("tuner.") if of_tuner else args_place + problem
            )
            if named not in problems:
                problems.append(named)
    return None


def _serve_problems(content: dict[str, Any]) -> list[str]:
    """What Ray Serve itself would refuse; nothing where Ray is not installed."""
    try:
        from pydantic import ValidationError
        from ray.serve.schema import ServeDeploySchema
    except ImportError:
        return []
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    except (AttributeError, TypeError) as error:  # Ray's own validators expect mappings
        return [f"applications: Ray Serve cannot read them: {error}"]
    return []
