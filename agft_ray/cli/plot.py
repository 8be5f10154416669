"""The command `agft-ray plot`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    plot = commands.add_parser("plot", help="draw a replay's clocks, power and energy")
    plot.add_argument("directory", type=Path, help="what --out of a replay or demo named")
    plot.add_argument("--out", type=Path, default=Path("replay.svg"), help="svg, png or pdf")
    plot.set_defaults(command=_plot)


def _plot(arguments: argparse.Namespace) -> int:
    from agft_ray.replay.plot import plot

    plot(arguments.directory, arguments.out)
    print(arguments.out)
    return 0
