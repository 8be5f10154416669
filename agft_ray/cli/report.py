"""The command `agft-ray report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    report = commands.add_parser(
        "report",
        help="one HTML page about simulated runs",
        description="Write one HTML page that needs nothing else, with plots and the comparison "
        "table, and the same figures as JSON beside it. Needs the extra 'report'.",
    )
    report.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of --out (all plots), or file of --json (no plots over time)",
    )
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from agft_ray.report.page import write_report

    if arguments.out.suffix != ".html":
        raise ConfigError("report", [f"--out: {arguments.out} must end in .html"])
    beside = write_report(arguments.runs, arguments.out)
    print(f"{arguments.out}\n{beside}")
    return 0
