"""The command `agft-ray completion`: what a shell needs to complete the others."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

SHELLS = ("bash", "zsh", "tcsh")


def add_command(commands: Commands, parser: argparse.ArgumentParser) -> None:
    """Add it to the parser; a command returns its exit status."""
    completion = commands.add_parser("completion", help="print completions for a shell")
    completion.add_argument("shell", choices=SHELLS)

    def run(arguments: argparse.Namespace) -> int:
        import shtab

        print(shtab.complete(parser, arguments.shell))
        return 0

    completion.set_defaults(command=run)
