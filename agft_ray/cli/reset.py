"""The command `agft-ray reset`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError
from agft_ray.gpu import restore

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    reset = commands.add_parser("reset", help="reset the clocks that dead owners left locked")
    restore.add_arguments(reset)
    reset.set_defaults(command=_reset)


def _reset(arguments: argparse.Namespace) -> int:
    if problem := restore.usage_problem(arguments):
        raise ConfigError("reset", [problem])
    return restore.run(arguments)
