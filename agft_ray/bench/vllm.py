"""What a tuner and its switch cost a real vLLM engine, on the CPU: `agft-ray bench vllm`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml

from agft_ray.actors.metrics_scraper import INTERVAL_VARIABLE
from agft_ray.bench.decision import versions
from agft_ray.bench.tools import CpuUsage, cpu_seconds, say
from agft_ray.bench.vllm_engine import BENCH, CLIENTS, SIDES, Block
from agft_ray.config import parse
from agft_ray.errors import AgftError
from agft_ray.results.spread import median_interval
from agft_ray.serve.run import free_port, serve_run
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.delays import Delays

BLOCK_S = 10.0
"""As long as the interval of Ray's metrics, so that each block of a tuner has one reading of them,
which is a burst of work."""
WINDOW_S = float(TunerConfig.model_fields["window_s"].default)
WARM_UP_S = 1.5
"""Load on a block's engine before it is measured: an idle tuner has taken up its work by then."""
SETTLE_S = 4.0
"""After a tuner has come or gone: Ray starts and ends processes then."""
TUNED = tuple(side for side in SIDES if side != "without")
COMPARED = (("with", "without"), ("untimed", "without"), ("with", "untimed"))
"""A side against another. Targets are about the first: an engine as it is tuned, and untuned. The
last is what timing its steps costs."""
MIN_TOKENS_RATIO, MAX_TTFT_RATIO = 0.99, 1.01
FIGURES: tuple[tuple[str, Callable[[Block], float], Callable[[float], bool]], ...] = (
    ("tokens/s", lambda block: block.tokens_per_s, lambda median: median >= MIN_TOKENS_RATIO),
    ("p99 TTFT", lambda block: block.ttft_s(0.99), lambda median: median <= MAX_TTFT_RATIO),
)
"""What is compared, and which median is good enough."""
MAX_DELAY_MS = 10.0
"""From a prompt's arrival to the GPU's having been called for its clock, in the median."""
ANSWER_TIMEOUT_S = 60.0
EXECUTORS = {
    "uni": "the model in the engine core's process, as with one GPU",
    "mp": "in a process of its own; both spin while one waits for the other, and fill two cores",
}
"""vLLM's executors; `mp` is its choice on the CPU."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
UNI_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Lets vLLM use that executor on the CPU; its OpenMP threads are set above."""
REPORT_INTERVAL_S = 10.0
"""Of Ray's metrics, which a tuner reads as often: Ray's default. Each reading takes the agent of
the node 0.1 to 0.2 s, which two cores feel if it is every second, as in our demo and tests."""


def bench_vllm(
    model: Path,
    *,
    blocks: int = 20,
    block_s: float = BLOCK_S,
    window_s: float = WINDOW_S,
    executor: str = "uni",
    seed: int = 0,
) -> int:
    """vLLM with tuner and switch against vLLM without, three engines loaded in alternating blocks.

    The tuner has a clock for prompts and one for further tokens (policy `pair`), on a simulated
    GPU. The third engine does not time its steps: what that costs is told apart. Each engine
    is in a replica of its own on a Ray cluster of the bench's own, and gets its load from within
    the replica, so that nothing but engine and tuner is measured; the others idle meanwhile. The
    requests of a round's blocks are the same. Prints every block, then the medians of the rounds'
    ratios with their intervals, and whether that of tuned to untuned is within the targets:
    tokens/s not below 0.99, p99 TTFT not above 1.01, or 1 within the interval. And how long it
    takes from a prompt's arrival until the GPU has been called, whose median is to be under 10 ms.

    Args:
        model: directory of a small model.
        blocks: blocks of each side, one a round.
        block_s: wall seconds of a block that are measured.
        window_s: length of a tuner's window.
        executor: vLLM's, one of `EXECUTORS`.
        seed: of the order within rounds, the requests and the bootstrap.

    Returns 1 if a target is missed, else 0. Raises `AgftError` for bad arguments, an engine that
    does not start and a tuner not at work.
    """
    _check(blocks, block_s, window_s)
    print(
        f"{versions()}, Ray {ray.__version__}, vLLM {importlib.metadata.version('vllm')}, "
        f"{os.cpu_count()} CPUs, seed {seed}\n"
        f"{CLIENTS} closed-loop clients, {blocks} rounds of a block of {block_s:g} s each side, "
        f"window {window_s:g} s, Ray's metrics every {REPORT_INTERVAL_S:g} s",
        f"executor {executor}: {EXECUTORS[executor]}",
        *(f"side {side}: {what}" for side, what in SIDES.items()),
        sep="\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="agft-bench-") as directory:
        path = Path(directory) / "bench.yaml"
        path.write_text(yaml.safe_dump(_config(model, executor, window_s)))
        log_path = Path(directory) / "serve.log"
        interval = {INTERVAL_VARIABLE: f"{REPORT_INTERVAL_S * 1e3:.0f}"}
        environment = ENVIRONMENT | interval | (UNI_ENVIRONMENT if executor == "uni" else {})
        with serve_run(path, None, log_path, environment=environment, on_wait=say) as running:
            bench = _Bench(running.url, block_s)
            bench.run(blocks, seed)
    return bench.print_summary(seed)


def _check(blocks: int, block_s: float, window_s: float) -> None:
    if blocks < 1:
        raise AgftError(f"--blocks: {blocks} is not a positive number of blocks")
    if not block_s > 0:
        raise AgftError(f"--block-s: {block_s:g} is not a positive number of seconds")
    parse(TunerConfig, {"window_s": window_s}, source="--window")


def _config(model: Path, executor: str, window_s: float) -> dict[str, Any]:
    """For `serve run`: one application a side."""
    args = {"model": str(model.resolve()), "executor": executor, "window_s": window_s}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [
            {
                "name": f"{BENCH}-{side}",
                "route_prefix": f"/{side}",
                "import_path": "agft_ray.bench.vllm_engine:build_replica",
                "args": args | {"side": side},
            }
            for side in SIDES
        ],
    }


@dataclass(slots=True)
class _Bench:
    """The driver's side: asks for blocks, keeps them in rounds."""

    url: str
    block_s: float
    rounds: list[dict[str, Block]] = field(default_factory=list)
    usage: dict[str, CpuUsage] = field(default_factory=lambda: {side: CpuUsage() for side in SIDES})
    windows: int = 0
    clock_changes: int = 0
    put_off: int = 0
    delays: Delays = field(default_factory=Delays)

    def run(self, rounds: int, seed: int) -> None:
        order = random.Random(seed)
        for side in SIDES:
            say(f"warming up the engine of side {side}")
            self._measure(side, order.getrandbits(32))
        say("")
        for number in range(1, rounds + 1):
            request_seed = order.getrandbits(32)
            turns = order.sample(list(SIDES), len(SIDES))
            blocks = {side: self._block(side, request_seed) for side in turns}
            self.rounds.append(blocks)
            for side in SIDES:
                print(f"round {number:>3}, {side:>7}: {blocks[side]}", flush=True)

    def _block(self, side: str, seed: int) -> Block:
        """Tuners are there in their own blocks only: they would take CPU time of the others'."""
        status = self._ask(side, do="begin")["tuner"]
        if side in TUNED:
            refuse_idle_tuner(status)
        time.sleep(SETTLE_S)
        before, start_s = cpu_seconds(), time.monotonic()
        answer = self._measure(side, seed)
        self.usage[side].add(before, cpu_seconds(), time.monotonic() - start_s)
        if side in TUNED:
            self._count(answer["tuner"])
        self._ask(side, do="end")
        return Block(**answer["block"])

    def _count(self, status: Mapping[str, Any]) -> None:
        self.windows += status["windows"]
        self.clock_changes += status["clock_changes"]
        self.put_off += status["phase_changes_put_off"]
        self.delays.merge(status["phase_delays"])

    def _measure(self, side: str, seed: int) -> dict[str, Any]:
        return self._ask(side, do="measure", seed=seed, warm_up_s=WARM_UP_S, block_s=self.block_s)

    def _ask(self, side: str, **asked: Any) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/{side}", data=json.dumps(asked).encode())
        timeout_s = WARM_UP_S + self.block_s + ANSWER_TIMEOUT_S
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.load(response)
        except OSError as error:
            raise AgftError(f"the engine of side {side} has not answered: {error}") from None
        return answer

    def print_summary(self, seed: int) -> int:
        """Returns the exit status."""
        for side in SIDES:
            print(f"CPU by Ray process, blocks {side}: {self.usage[side]}")
        print(
            f"the tuners had {self.windows} windows, made {self.clock_changes} clock changes and "
            f"put {self.put_off} off"
        )
        lines, is_missed = summary(self.rounds, seed)
        delays, is_late = delay_lines(self.delays)
        print(*lines, *delays, sep="\n")
        return int(is_missed or is_late)


def refuse_idle_tuner(status: Mapping[str, Any] | None) -> None:
    """Raises `AgftError` unless the tuner sets clocks: another's costs are not of interest."""
    if status is None or status["state"] != "tuning":
        raise AgftError(
            f"the tuner has not come to work, so there is nothing to measure; its status: {status}"
        )


def delay_lines(delays: Delays) -> tuple[list[str], bool]:
    """The lines that show how soon clocks follow prompts; and whether that target is missed."""
    median_ms, p99_ms = (delays.percentile_ms(share) for share in (0.5, 0.99))
    is_late = not 0 < median_ms <= MAX_DELAY_MS
    head = (
        f"from a prompt's arrival until the GPU has been called, {sum(delays.counts)} times: "
        f"median up to {median_ms:g} ms, p99 up to {p99_ms:g} ms; the target "
        f"{'is missed' if is_late else 'holds'}"
    )
    return [head, *delays.lines()], is_late


def summary(rounds: Sequence[Mapping[str, Block]], seed: int) -> tuple[list[str], bool]:
    """The lines that sum rounds of blocks up, each with the keys of `SIDES`; and whether a target
    is missed."""
    lines = []
    for side in SIDES:
        blocks = [each[side] for each in rounds]
        tokens_per_s = statistics.median(block.tokens_per_s for block in blocks)
        p50_s, p99_s = (statistics.median(b.ttft_s(p) for b in blocks) for p in (0.5, 0.99))
        lines.append(
            f"median of the blocks {side}: {tokens_per_s:.1f} tokens/s, "
            f"TTFT p50 {p50_s * 1e3:.1f} ms, p99 {p99_s * 1e3:.1f} ms"
        )
    is_missed = False
    for side, base in COMPARED:
        for what, figure, is_fine in FIGURES:
            ratios = [figure(each[side]) / figure(each[base]) for each in rounds]
            median, low, high = median_interval(ratios, seed=seed)
            line = (
                f"{what} {side} / {base}: median {median:.4f}, 95 % interval {low:.4f} to "
                f"{high:.4f} ({len(ratios)} pairs)"
            )
            if (side, base) == COMPARED[0]:
                holds = is_fine(median) or low <= 1 <= high
                is_missed |= not holds
                line += f"; the target {'holds' if holds else 'is missed'}"
                line += "" if is_fine(median) or not holds else ", 1 is within the interval"
            lines.append(line)
    return lines, is_missed
