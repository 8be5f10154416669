"""The `agft-ray` command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray import __version__
from agft_ray.actors import simulate_on_ray
from agft_ray.cli import calibrate as calibrate_command
from agft_ray.cli import fetch_data, workload_options
from agft_ray.cli import gpus as gpu_commands
from agft_ray.cli import report as report_command
from agft_ray.cli import simulate as simulate_command
from agft_ray.cli import status as status_command
from agft_ray.errors import AgftError
from agft_ray.workloads.requests import Request

if TYPE_CHECKING:
    from agft_ray.gpu.config import GpuConfig
    from agft_ray.replay.result import ReplayResult
    from agft_ray.replay.summary import Comparison
    from agft_ray.results.distribution import Slo
    from agft_ray.settings import TunerConfig

DEMO_WALL_S = 180.0
DEFAULT_TIMEOUT_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status (0 fine, 1 failed, 2 bad input)."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given, argparse.Namespace(argv=given))
    try:
        with _ended_by_sigterm():
            return int(arguments.command(arguments))
    except AgftError as error:
        print(f"agft-ray: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"agft-ray: {error}; this command needs the extra 'serve': "
            "pip install 'agft-ray[serve]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that a demo stops the cluster it started;
    afterwards it does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agft-ray", description="Energy-aware LLM serving on Ray")
    parser.add_argument("--version", action="version", version=f"agft-ray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    validate = commands.add_parser("validate", help="check a `serve run` config file")
    validate.add_argument("file", type=Path)
    validate.set_defaults(command=_validate)

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

    plot = commands.add_parser("plot", help="draw a replay's clocks, power and energy")
    plot.add_argument("directory", type=Path, help="what --out of a replay or demo named")
    plot.add_argument("--out", type=Path, default=Path("replay.svg"), help="svg, png or pdf")
    plot.set_defaults(command=_plot)

    _add_bench(commands)
    gpu_commands.add_commands(commands)
    simulate_command.add_command(commands, ray_pool=simulate_on_ray.ray_pool)
    status_command.add_command(commands)
    report_command.add_command(commands)
    fetch_data.add_command(commands)
    calibrate_command.add_command(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="what the tuner costs")
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    decision = kinds.add_parser("decision", help="time of one control step (no Ray)")
    decision.add_argument("--arms", type=int, default=130)
    decision.add_argument("--steps", type=int, default=5000)
    decision.add_argument("--seed", type=int, default=0)
    decision.set_defaults(command=_bench_decision)
    simulator = kinds.add_parser("simulator", help="simulated seconds per wall second (no Ray)")
    simulator.add_argument("--rate", type=float, default=1.0, help="requests per simulated second")
    simulator.add_argument("--duration", type=float, default=3600.0, metavar="S", help="simulated")
    simulator.add_argument("--seed", type=int, default=0)
    simulator.set_defaults(command=_bench_simulator)
    overhead = kinds.add_parser("overhead", help="serving with tuner against mode: off (Ray)")
    overhead.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    overhead.add_argument("--block-s", type=float, default=5.0, metavar="S")
    overhead.set_defaults(command=_bench_overhead)
    vllm = kinds.add_parser("vllm", help="vLLM with tuner against without (Ray, vLLM on the CPU)")
    vllm.add_argument("model", type=Path, help="folder of a model, see examples/tiny_model.py")
    vllm.add_argument("--blocks", type=int, default=20, help="blocks of each side")
    vllm.add_argument("--block-s", type=float, default=10.0, metavar="S", help="default: 10")
    vllm.add_argument(
        "--window", type=float, default=2.0, metavar="S", help="a tuner's window, default: 2"
    )
    vllm.add_argument(
        "--executor", choices=["uni", "mp"], default="uni", help="vLLM's; default: uni"
    )
    vllm.add_argument("--seed", type=int, default=0)
    vllm.set_defaults(command=_bench_vllm)


def _validate(arguments: argparse.Namespace) -> int:
    from agft_ray.serve.checks import validate_file
    from agft_ray.serve.simulated.config import AppConfig

    for application in validate_file(arguments.file):
        if isinstance(application, AppConfig):
            what = (
                f"{application.num_replicas} replicas of {application.model} on "
                f"{_described(application.gpu, application.tuner)}, speed {application.speed:g}"
            )
            print(f"{arguments.file}: valid. {what}")
            continue
        for llm in application.llms:
            what = f"{llm.model_id} ({llm.role}) on {_described(llm.gpu, llm.tuner)}"
            print(f"{arguments.file}: valid. {what}")
        if not application.checked_by_ray:
            print("Ray's own fields of llm_configs were not checked: ray.serve.llm is missing here")
    return 0


def _described(gpu: GpuConfig, tuner: TunerConfig) -> str:
    named = f" ({gpu.profile})" if gpu.kind == "simulated" else ""
    return (
        f"{gpu.kind} GPUs{named}, {tuner.holdout_replicas} held out, "
        f"mode {tuner.mode}, policy {tuner.policy.name}, objective {tuner.objective}"
    )


def _replay(arguments: argparse.Namespace) -> int:
    from agft_ray.replay.records import records_of_replay
    from agft_ray.results.distribution import Slo
    from agft_ray.results.record import write_runs
    from agft_ray.workloads.generators import workload_name

    bounds_s = (arguments.slo_ttft, arguments.slo_tpot)
    result, comparison = _run_replay(
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
    return _exit_status(result)


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
    with (
        console.status("Ray Serve is starting") as status,
        serve_run(arguments.file, config, out / "serve.log", on_wait=status.update) as app,
    ):
        status.stop()
        slo = Slo(config.tuner.slo.ttft_s, config.tuner.slo.tpot_s)
        result, _ = _run_replay(workload, url=app.url, out=out, slo=slo)
        status.start()
    console.print(f"Requests, time line, summary and the log of serve run: {out}")
    return _exit_status(result)


def _run_replay(
    workload: tuple[int, Iterable[Request]],
    *,
    url: str,
    out: Path | None,
    slo: Slo | None = None,
    model: str | None = None,
    speed: float | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> tuple[ReplayResult, Comparison]:
    from rich.console import Console

    from agft_ray.replay.client import replay
    from agft_ray.replay.console import print_comparison, progress_display
    from agft_ray.replay.summary import summarise

    count, requests = workload
    with progress_display(count) as on_progress:
        result = asyncio.run(
            replay(
                requests,
                url=url,
                model=model,
                speed=speed,
                timeout_s=timeout_s,
                on_progress=on_progress,
            )
        )
    comparison = summarise(result, slo=slo)
    print_comparison(comparison, Console())
    if out is not None:
        result.write(out, summary=comparison.to_json())
    return result, comparison


def _exit_status(result: ReplayResult) -> int:
    return 130 if result.interrupted else int(any(row.is_failed for row in result.rows))


def _plot(arguments: argparse.Namespace) -> int:
    from agft_ray.replay.plot import plot

    plot(arguments.directory, arguments.out)
    print(arguments.out)
    return 0


def _bench_decision(arguments: argparse.Namespace) -> int:
    from agft_ray.bench.decision import bench_decision, versions

    print(f"{versions()}, seed {arguments.seed}, {arguments.steps} steps")
    for timing in bench_decision(arms=arguments.arms, steps=arguments.steps, seed=arguments.seed):
        print(timing)
    return 0


def _bench_simulator(arguments: argparse.Namespace) -> int:
    from agft_ray.bench.simulator import bench_simulator, conditions

    rate_per_s, duration_s, seed = arguments.rate, arguments.duration, arguments.seed
    print(conditions(rate_per_s=rate_per_s, duration_s=duration_s, seed=seed))
    try:
        for speed in bench_simulator(rate_per_s=rate_per_s, duration_s=duration_s, seed=seed):
            print(speed, flush=True)
    except ValueError as error:
        raise AgftError(str(error)) from None
    return 0


def _bench_overhead(arguments: argparse.Namespace) -> int:
    from agft_ray.bench.overhead import bench_overhead

    return bench_overhead(blocks=arguments.blocks, block_s=arguments.block_s)


def _bench_vllm(arguments: argparse.Namespace) -> int:
    from agft_ray.bench.vllm import bench_vllm

    return bench_vllm(
        arguments.model,
        blocks=arguments.blocks,
        block_s=arguments.block_s,
        window_s=arguments.window,
        executor=arguments.executor,
        seed=arguments.seed,
    )
