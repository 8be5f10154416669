"""The command `agft-ray replay`, and how a replay is run and shown."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.cli import workload_options

if TYPE_CHECKING:
    from agft_ray.replay.result import ReplayResult
    from agft_ray.replay.summary import Comparison
    from agft_ray.results.distribution import Slo

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_TIMEOUT_S = 600.0


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    replay = commands.add_parser(
        "replay", help="replay a trace or a generated workload against an OpenAI-compatible server"
    )
    replay.add_argument("--url", default="http://127.0.0.1:8000")
    replay.add_argument("--model", help="default: the first the server lists")
    replay.add_argument("--speed", type=float, help="simulated seconds per wall second")
    workload_options.add_workload_options(replay)
    replay.add_argument(
        "--duration", type=float, metavar="S", help="stop sending after so many simulated seconds"
    )
    replay.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="S", help="per request"
    )
    replay.add_argument("--slo-ttft", type=float, metavar="S", help="bound on each request's TTFT")
    replay.add_argument("--slo-tpot", type=float, metavar="S", help="bound on each request's TPOT")
    replay.add_argument("--out", type=Path, help="directory for requests.csv and summary.json")
    replay.add_argument("--json", type=Path, metavar="FILE", help="a record of each role's run")
    replay.set_defaults(command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from agft_ray.replay.records import records_of_replay
    from agft_ray.results.distribution import Slo
    from agft_ray.results.record import write_runs
    from agft_ray.workloads.generators import workload_name

    bounds_s = (arguments.slo_ttft, arguments.slo_tpot)
    result, comparison = run_replay(
        workload_options.checked_workload(arguments, arguments.duration),
        url=arguments.url,
        out=arguments.out,
        slo=None if bounds_s == (None, None) else Slo(*bounds_s),
        model=arguments.model,
        speed=arguments.speed,
        timeout_s=arguments.timeout,
    )
    if arguments.json is not None:
        rate_per_s = workload_options.rate_per_s(arguments)
        trace = workload_name(arguments.trace, arguments.workload, rate_per_s)
        origin = {"trace": trace, "seed": arguments.seed, "keep": arguments.keep}
        write_runs(arguments.json, records_of_replay(result, comparison, **origin))
    return exit_status(result)


def run_replay(
    workload: workload_options.Workload,
    *,
    url: str,
    out: Path | None,
    slo: Slo | None = None,
    model: str | None = None,
    speed: float | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> tuple[ReplayResult, Comparison]:
    """Replay, write the files into `out` if there is one, and show the comparison."""
    from rich.console import Console

    from agft_ray.replay.client import replay
    from agft_ray.replay.console import print_comparison, progress_display
    from agft_ray.replay.summary import summarise

    with progress_display(workload.count, last_arrival_s=workload.last_arrival_s) as on_progress:
        result = asyncio.run(
            replay(
                workload.requests,
                url=url,
                model=model,
                speed=speed,
                timeout_s=timeout_s,
                on_progress=on_progress,
            )
        )
    comparison = summarise(result, slo=slo)
    if out is not None:
        result.write(out, summary=comparison.to_json())
    print_comparison(comparison, Console())
    return result, comparison


def exit_status(result: ReplayResult) -> int:
    """130 if it was interrupted, 1 if a request failed, else 0."""
    return 130 if result.interrupted else int(any(row.is_failed for row in result.rows))
