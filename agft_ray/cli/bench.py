"""The command `agft-ray bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import AgftError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    bench = commands.add_parser("bench", help="what the tuner costs")
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    decision = kinds.add_parser("decision", help="time of one control step (no Ray)")
    decision.add_argument("--arms", type=int, default=130)
    decision.add_argument("--steps", type=int, default=5000)
    decision.add_argument("--seed", type=int, default=0)
    decision.set_defaults(command=_bench_decision)
    simulator = kinds.add_parser("simulator", help="simulated seconds per CPU second (no Ray)")
    simulator.add_argument(
        "--rate", type=float, default=1.0, help="requests per simulated second and replica"
    )
    simulator.add_argument("--duration", type=float, default=3600.0, metavar="S", help="simulated")
    simulator.add_argument(
        "--fleet-duration", type=float, default=600.0, metavar="S", help="of the fleet; simulated"
    )
    simulator.add_argument(
        "--workers", type=int, metavar="N", help="processes of the fleet; default: one a core"
    )
    simulator.add_argument("--seed", type=int, default=0)
    simulator.set_defaults(command=_bench_simulator)
    overhead = kinds.add_parser("overhead", help="serving with tuner against mode: off (Ray)")
    overhead.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    overhead.add_argument("--block-s", type=float, default=5.0, metavar="S")
    overhead.set_defaults(command=_bench_overhead)
    vllm = kinds.add_parser("vllm", help="vLLM with tuner and switch against without (Ray)")
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


def _bench_decision(arguments: argparse.Namespace) -> int:
    from agft_ray.bench.decision import bench_decision, versions

    print(f"{versions()}, seed {arguments.seed}, {arguments.steps} steps")
    for timing in bench_decision(arms=arguments.arms, steps=arguments.steps, seed=arguments.seed):
        print(timing)
    return 0


def _bench_simulator(arguments: argparse.Namespace) -> int:
    from agft_ray.bench.simulator import bench_fleet, bench_simulator, conditions

    duration_s, workers = arguments.duration, arguments.workers
    load = {"rate_per_s": arguments.rate, "seed": arguments.seed}
    print(conditions(duration_s=duration_s, **load))
    try:
        for speed in bench_simulator(duration_s=duration_s, **load):
            print(speed, flush=True)
        for fleet in bench_fleet(duration_s=arguments.fleet_duration, workers=workers, **load):
            print(fleet, flush=True)
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
