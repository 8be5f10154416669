"""The command `agft-ray validate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError

if TYPE_CHECKING:
    from agft_ray.gpu.config import GpuConfig
    from agft_ray.settings import TunerConfig

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    validate = commands.add_parser(
        "validate",
        help="check `serve run` config files",
        description="Name every mistake of the files before anything starts. Exit status 2 if one "
        "of them has any.",
    )
    validate.add_argument("files", type=Path, nargs="+", metavar="FILE")
    validate.set_defaults(command=_validate)


def _validate(arguments: argparse.Namespace) -> int:
    status = 0
    for path in arguments.files:
        try:
            _show(path)
        except ConfigError as error:
            print(f"agft-ray: {error}", file=sys.stderr)
            status = 2
    return status


def _show(path: Path) -> None:
    from agft_ray.serve.checks import validate_file
    from agft_ray.serve.simulated.config import AppConfig

    for application in validate_file(path):
        if isinstance(application, AppConfig):
            what = (
                f"{application.num_replicas} replicas of {application.model} on "
                f"{_described(application.gpu, application.tuner)}, speed {application.speed:g}"
            )
            print(f"{path}: valid. {what}")
            continue
        for llm in application.llms:
            what = f"{llm.model_id} ({llm.role}) on {_described(llm.gpu, llm.tuner)}"
            print(f"{path}: valid. {what}")
        if not application.checked_by_ray:
            print("Ray's own fields of llm_configs were not checked: ray.serve.llm is missing here")


def _described(gpu: GpuConfig, tuner: TunerConfig) -> str:
    objective = f"objective {tuner.objective}" if tuner.objective else "its own objective"
    named = f" ({gpu.profile})" if gpu.kind == "simulated" else ""
    return (
        f"{gpu.kind} GPUs{named}, {tuner.holdout_replicas} held out, "
        f"mode {tuner.mode}, policy {tuner.policy.name}, {objective}"
    )
