"""The command `agft-ray config`: ready configs to start from, and the schema of their arguments."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

READY = Path(__file__).parents[1] / "configs"
"""The ready configs, of the repository and in the wheel."""


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    config = commands.add_parser("config", help="ready configs, and the schema of what may be set")
    kinds = config.add_subparsers(required=True, metavar="WHAT")
    kinds.add_parser("list", help="the ready configs").set_defaults(command=_list)
    show = kinds.add_parser("show", help="print a ready config, to be changed and served")
    show.add_argument("name", help="as `config list` shows it")
    show.set_defaults(command=_show)
    schema = kinds.add_parser("schema", help="JSON schema of an application's args, for editors")
    schema.add_argument(
        "application",
        nargs="?",
        choices=["simulated", "llm", "dp", "pd", "tuner"],
        default="simulated",
        help="whose `args`: the builders' of serve; tuner: of `user_config`",
    )
    schema.set_defaults(command=_schema)


def ready() -> dict[str, Path]:
    """The ready configs by name."""
    return {path.stem: path for path in sorted(READY.glob("*.yaml"))}


def _list(arguments: argparse.Namespace) -> int:
    for name, path in ready().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<16} {first.lstrip('# ')}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    known = ready()
    name = arguments.name.removesuffix(".yaml")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            "config show", [f"{arguments.name!r}: {hint}there are: {', '.join(known)}"]
        )
    print(known[name].read_text(encoding="utf-8"), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from pydantic import BaseModel

    from agft_ray.serve.llm.config import LlmAppConfig, LlmDpAppConfig, LlmPdAppConfig
    from agft_ray.serve.simulated.config import AppConfig
    from agft_ray.settings import TunerConfig

    models: dict[str, type[BaseModel]] = {
        "simulated": AppConfig,
        "llm": LlmAppConfig,
        "dp": LlmDpAppConfig,
        "pd": LlmPdAppConfig,
        "tuner": TunerConfig,
    }
    print(json.dumps(models[arguments.application].model_json_schema(by_alias=True), indent=2))
    return 0
