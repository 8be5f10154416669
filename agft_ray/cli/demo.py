"""The command `agft-ray demo`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.cli import workload_options
from agft_ray.cli.replay import exit_status, run_replay

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEMO_WALL_S = 220.0
"""TTFT is told to within 5 % by then, learning included."""
START_AND_STOP_S = 45
"""Of wall time, on two cores."""


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    demo = commands.add_parser(
        "demo", help="serve a config of simulated replicas, replay a workload, compare"
    )
    demo.add_argument("file", type=Path, nargs="?", default=Path("configs/simulated.yaml"))
    workload_options.add_workload_options(demo)
    demo.add_argument(
        "--wall", type=float, default=DEMO_WALL_S, metavar="S", help="wall seconds of load"
    )
    demo.add_argument("--out", type=Path, help="directory for the results")
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from agft_ray.results.distribution import Slo
    from agft_ray.serve.checks import simulated_app
    from agft_ray.serve.run import serve_run

    config = simulated_app(arguments.file)
    workload = workload_options.checked_workload(arguments, arguments.wall * config.speed)
    out = arguments.out or Path(tempfile.mkdtemp(prefix="agft-demo-"))
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(
        f"{config.num_replicas} replicas of {config.model} on simulated GPUs "
        f"({config.profile}), {config.tuner.holdout_replicas} held out at default clocks; "
        f"{workload.count:,} requests over {workload.last_arrival_s:,.0f} simulated s take "
        f"{workload.last_arrival_s / config.speed:,.0f} s of wall time (speed {config.speed:g}), "
        f"start and end about {START_AND_STOP_S} s more.",
        highlight=False,
    )
    with (
        console.status("Ray Serve is starting") as status,
        serve_run(arguments.file, config, out / "serve.log", on_wait=status.update) as app,
    ):
        status.stop()
        told = config.tuner.slo
        slo = Slo(told.ttft_s, told.tpot_s, told.e2e_s)
        result, _ = run_replay(workload, url=app.url, out=out, slo=None if slo == Slo() else slo)
        status.start()
    console.print(f"Requests, time line, summary and the log of serve run: {out}")
    return exit_status(result)
