"""Measure a running server by clock and rate, as a CSV that `agft-ray calibrate` takes:

    python examples/load_test.py --clocks 1980,1500,1100 --rates 1,3,6 --out loads.csv

Needs an OpenAI-compatible server (vLLM, say) that nobody else uses, on GPUs with an energy counter
(Volta and later), and the right to lock clocks: `--lock` is the command that does it. `agft-ray
replay` is the load: Poisson arrivals, all prompts and outputs of one length. Its prompts are alike:
start the server without a prefix cache (vLLM: `--no-enable-prefix-caching`). Each clock begins with
the loaded engine without requests. Clocks are reset at the end, whatever happens. With three
clocks and three rates it takes half an hour.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pynvml

Energy = Callable[[], float]
Row = dict[str, Any]

WARM_UP_SHARE = 0.15
"""Of a load, before its power counts: the engine fills."""
IDLE_S = 30.0
SETTLE_S = 5.0
"""After a change of clocks."""


def group_energy_j(indices: Sequence[int]) -> Energy:
    """A function that reads the energy counters of these GPUs, summed."""
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
    return lambda: sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles) / 1e3


def run_command(words: Sequence[str]) -> None:
    """Run a program; its failure ends the measurement."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def mean_power_w(energy_j: Energy, seconds: float) -> float:
    """Over so many seconds from now."""
    start_s, start_j = time.monotonic(), energy_j()
    time.sleep(seconds)
    return (energy_j() - start_j) / (time.monotonic() - start_s)


def replayed(arguments: argparse.Namespace, rate: float, out: Path) -> None:
    """Send the load, and leave what the requests met in `out`."""
    words = [str(Path(sys.executable).with_name("agft-ray")), "replay", "--url", arguments.url]
    words += ["--workload", "poisson", "--rate", str(rate), "--duration", str(arguments.seconds)]
    for name in ("prompt_tokens", "output_tokens"):
        words += ["--param", f"{name}={getattr(arguments, name)}"]
    run_command([*words, "--out", str(out)])


def loaded_row(arguments: argparse.Namespace, rate: float, energy_j: Energy) -> Row:
    """One line: power once the load is steady, and latencies."""
    warm_up_s = WARM_UP_SHARE * arguments.seconds
    with tempfile.TemporaryDirectory() as directory:
        load = threading.Thread(target=replayed, args=(arguments, rate, Path(directory)))
        load.start()
        time.sleep(warm_up_s)
        power_w = mean_power_w(energy_j, 0.95 * arguments.seconds - warm_up_s)
        load.join()
        # Written only if the replay came to its end.
        summary = json.loads((Path(directory) / "summary.json").read_text())
        with (Path(directory) / "requests.csv").open(newline="") as file:
            requests = [request for request in csv.DictReader(file) if request["status"] == "ok"]
    (group,) = summary["groups"]
    row: Row = {"power_w": round(power_w, 1)}
    # As the server counts them: a word is not a token of every model.
    for name in ("prompt_tokens", "output_tokens"):
        row[name] = int(statistics.median(int(request[name]) for request in requests))
    for kind in ("ttft", "tpot"):
        for name in ("mean", "p50", "p99"):
            row[f"{kind}_{name}_s"] = round(group[f"{kind}_s"][name], 5)
    return row


def rows(arguments: argparse.Namespace, energy_j: Energy) -> Iterator[Row]:
    """The loaded engine without requests, then every rate, at each clock."""
    sizes = {name: getattr(arguments, name) for name in ("prompt_tokens", "output_tokens")}
    for clock in arguments.clocks:
        run_command(shlex.split(arguments.lock.format(clock=clock)))
        time.sleep(arguments.settle)
        idle_w = round(mean_power_w(energy_j, arguments.idle), 1)
        yield {"sm_clock_mhz": clock, "rate_per_s": 0, **sizes, "power_w": idle_w}
        for rate in arguments.rates:
            measured = loaded_row(arguments, rate, energy_j)
            yield {"sm_clock_mhz": clock, "rate_per_s": rate, **sizes, **measured}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""

    def clocks(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    def rates(text: str) -> list[float]:
        return [float(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clocks", type=clocks, required=True, help="in MHz: 1980,1500,1100")
    parser.add_argument("--rates", type=rates, required=True, help="requests per second: 1,3,6")
    parser.add_argument("--gpus", type=clocks, default=[0], help="the engine's, as NVML counts")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=180.0, help="of each load")
    parser.add_argument("--idle", type=float, default=IDLE_S, help="seconds without requests")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="seconds after a lock")
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--output-tokens", type=int, default=150)
    parser.add_argument("--lock", default="sudo nvidia-smi -lgc {clock},{clock}")
    parser.add_argument("--reset", default="sudo nvidia-smi -rgc")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; each line is in the file as soon as it is known."""
    arguments = parsed(argv)
    energy_j = group_energy_j(arguments.gpus)
    columns = ["sm_clock_mhz", "rate_per_s", "prompt_tokens", "output_tokens", "power_w"]
    columns += [f"{kind}_{of}_s" for kind in ("ttft", "tpot") for of in ("mean", "p50", "p99")]
    try:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows(arguments, energy_j):
                writer.writerow(row)
                file.flush()
                print(row, flush=True)
    finally:
        run_command(shlex.split(arguments.reset))
    return 0


if __name__ == "__main__":
    sys.exit(main())
