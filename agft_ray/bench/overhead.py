"""What a tuner costs the serving beside it: `agft-ray bench overhead`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agft_ray.bench.tools import WINDOW_WALL_S, CpuUsage, cpu_seconds, say
from agft_ray.results.spread import median_interval
from agft_ray.serve.checks import DEPLOYMENT, simulated_app
from agft_ray.serve.run import RunningServe, serve_run

CLIENTS = 96
PROMPT_WORDS, OUTPUT_TOKENS = 20, 8
SPEED = 10
"""The engine is fast enough not to be the limit."""
SETTLE_WALL_S = 1.5
"""After a change of mode, before a block is measured: tuners take settings within a push."""
CONFIG: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": 8017},
    "applications": [
        {
            "name": "bench",
            "import_path": "agft_ray.serve:build_app",
            "args": {"num_replicas": 2, "speed": SPEED},
            "deployments": [
                {
                    "name": DEPLOYMENT,
                    "user_config": {
                        "mode": "off",
                        "window_s": WINDOW_WALL_S * SPEED,
                    },
                }
            ],
        }
    ],
}


@dataclass(slots=True)
class _Load:
    """Closed-loop clients; counts tokens as answers complete."""

    url: str
    tokens: int = 0
    failed: int = 0
    stopped: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def run(self) -> None:
        import aiohttp

        body = {
            "model": "llama-3.1-8b",
            "prompt": "tok " * PROMPT_WORDS,
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
        }
        async with aiohttp.ClientSession() as session:
            while not self.stopped:
                async with session.post(f"{self.url}/v1/completions", json=body) as response:
                    await response.read()
                    self.failed += response.status != 200
                    self.tokens += OUTPUT_TOKENS * (response.status == 200)


def bench_overhead(*, blocks: int, block_s: float, seed: int = 0) -> int:
    """Serving throughput with `mode: observe` against `mode: off`, in alternating blocks.

    An actor that does nothing runs along, so that what any Ray actor costs can be told apart.

    `observe` does all a tuner does but lock clocks, which would slow the simulated engine itself.
    Many clients with short answers make the processors the limit, not the engine. Prints every
    pair, the median ratio with its 95 % bootstrap interval, and the CPU time of each process.
    """
    with tempfile.TemporaryDirectory(prefix="agft-bench-") as directory:
        path = Path(directory) / "bench.yaml"
        path.write_text(yaml.safe_dump(CONFIG))
        config = simulated_app(path)
        log_path = Path(directory) / "serve.log"
        with serve_run(path, config, log_path, on_wait=say) as running, _idle_actor(running):
            ratios = asyncio.run(_measure(running, blocks, block_s, seed))
    median, low, high = median_interval(ratios, seed=seed)
    print(
        f"throughput with tuner / without: median {median:.4f}, "
        f"95 % interval {low:.4f} to {high:.4f} ({len(ratios)} pairs, seed {seed})"
    )
    return 0


_IDLE = """
import sys, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
class IdleActor:
    pass
actor = ray.remote(IdleActor).options(num_cpus=0).remote()
sys.stdin.read()
"""


@contextlib.contextmanager
def _idle_actor(running: RunningServe) -> Iterator[None]:
    """An actor that does nothing, started by a driver that ends when its input is closed."""
    environment = {**os.environ, **running.environment}
    driver = subprocess.Popen([sys.executable, "-c", _IDLE], stdin=subprocess.PIPE, env=environment)
    try:
        yield
    finally:
        driver.communicate()


async def _measure(running: RunningServe, blocks: int, block_s: float, seed: int) -> list[float]:
    print(f"\n{CLIENTS} closed-loop clients, {blocks} pairs of blocks of {block_s:g} s")
    load = _Load(running.url)
    load.tasks = [asyncio.create_task(load.run()) for _ in range(CLIENTS)]
    order, ratios = random.Random(seed), []
    usage = {"off": CpuUsage(), "observe": CpuUsage()}
    for pair in range(blocks):
        rates = {}
        for mode in order.sample(["off", "observe"], 2):
            await asyncio.to_thread(_set_mode, running, mode)
            await asyncio.sleep(SETTLE_WALL_S)
            tokens, start_s, before = load.tokens, time.monotonic(), cpu_seconds()
            await asyncio.sleep(block_s)
            elapsed_s = time.monotonic() - start_s
            rates[mode] = (load.tokens - tokens) / elapsed_s
            usage[mode].add(before, cpu_seconds(), elapsed_s)
        ratios.append(rates["observe"] / rates["off"])
        print(
            f"pair {pair + 1:>3}: off {rates['off']:8.1f} tokens/s, observe "
            f"{rates['observe']:8.1f} tokens/s, ratio {ratios[-1]:.3f}"
        )
    await _print_loop_cost(running, block_s)
    load.stopped = True
    await asyncio.gather(*load.tasks)
    print(f"failed requests: {load.failed}")
    for mode, cpu in usage.items():
        print(f"CPU by process, mode {mode}: {cpu}")
    return ratios


async def _print_loop_cost(running: RunningServe, seconds: float) -> None:
    """The CPU time of the tuners' loop threads, by their own clocks."""
    await asyncio.to_thread(_set_mode, running, "observe")
    before = {replica["replica"]: replica for replica in running.alive()}
    await asyncio.sleep(2 * seconds)
    for replica in running.alive():
        old = before[replica["replica"]]
        wall_s = (replica["t_s"] - old["t_s"]) / SPEED
        share = (replica["loop_cpu_s"] - old["loop_cpu_s"]) / wall_s
        windows = replica["windows"] - old["windows"]
        print(f"loop of {replica['replica']}: {share:.2%} of a core, {windows} windows")


def _set_mode(running: RunningServe, mode: str) -> None:
    content = json.loads(json.dumps(CONFIG))
    content["applications"][0]["deployments"][0]["user_config"]["mode"] = mode
    running.deploy(content)
    deadline_s = time.monotonic() + 30
    while {replica["mode"] for replica in running.alive()} != {mode}:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the replicas did not take mode {mode} within 30 s")
        time.sleep(0.2)
