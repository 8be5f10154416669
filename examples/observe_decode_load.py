"""Measure a real GPU under an LLM's decode load, and write the figures as Markdown:

    python examples/observe_decode_load.py --out measured.md

Needs an NVIDIA GPU that nobody else uses and PyTorch with CUDA; neither vLLM nor Ray nor root. A
loop like that of an engine's decode steps (weights and KV cache of an 8B model read for every
token) runs at one batch size after the other, with agft_ray's tuner beside it in `observe`; then
prompts of one length after the other. The energy counter is held against integrated power under a
load of matrix products. No clock and no power limit is ever changed. Takes some four minutes and 32
GB of GPU memory (`--layers` for less).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from decode_load import Load, Step, TorchLoad

from agft_ray.clock import WallClock
from agft_ray.doctor.examine import Question, examine
from agft_ray.doctor.text import lines as doctor_lines
from agft_ray.errors import AgftError
from agft_ray.gpu.base import Gpu
from agft_ray.gpu.identity import visible_uuids
from agft_ray.gpu.nvml.backend import NvmlGpu, driver_versions, list_devices
from agft_ray.gpu.probe import watch_energy_counter
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.counters import EngineStats
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import Actuator, EngineSample, EventReason, GpuSample, Window

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PROMPTS = (128, 512, 1024, 2048, 4096)
IDLE_S = 5.0
PUSH_S = 0.05
WARM_UP_S = 3.0
"""Before windows count: power readings are means over up to a second."""
SAMPLES = 200


class ReadOnly:
    """A GPU of which nothing can be set."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.uuid, self.model, self.arms = gpu.uuid, gpu.model, gpu.arms
        self.actuator: Actuator = gpu.actuator
        self.read: Callable[[], GpuSample] = gpu.read

    def claim(self) -> None:
        raise AssertionError("this script sets nothing")

    def lock(self, setting: int) -> None:
        raise AssertionError("this script sets nothing")

    def reset(self) -> None:
        raise AssertionError("this script sets nothing")

    def release(self) -> None:
        """Nothing was claimed."""


class Engine:
    """Runs steps in a thread of its own, and counts their tokens as an engine does."""

    def __init__(self, step: Step, batch: int, *, prompt_tokens: int = 0) -> None:
        self._step, self._batch, self._prompt_tokens = step, batch, prompt_tokens
        self._stats, self._lock = EngineStats(), threading.Lock()
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                begin_s = time.perf_counter()
                self._step()
                self._count(time.perf_counter() - begin_s)
        except Exception as error:
            self._error = error

    def _count(self, time_s: float) -> None:
        with self._lock:
            if self._prompt_tokens:
                self._stats.on_prompt(tokens=self._prompt_tokens)
                self._stats.on_step(
                    prefill_tokens=self._prompt_tokens, decode_tokens=0, time_s=time_s
                )
                self._stats.on_first_token(ttft_s=time_s)
                return
            self._stats.on_step(prefill_tokens=0, decode_tokens=self._batch, time_s=time_s)
            self._stats.generation_tokens += self._batch
            self._stats.itl_sum_s += time_s * self._batch
            self._stats.itl_count += self._batch

    def sample(self, t_s: float) -> EngineSample:
        """Raises `AgftError` if a step has failed, for want of memory for instance."""
        if self._error is not None:
            raise AgftError(f"the load has failed: {self._error}; fewer --layers take less memory")
        with self._lock:
            return self._stats.sample(t_s=t_s, running=self._batch, waiting=0, kv_cache_usage=0.0)


def observed(gpu: Gpu, engine: Engine, *, window_s: float, windows: int) -> list[Window]:
    """What the tuner sees of an engine, once it is warm."""
    clock, inbox = WallClock(), EngineInbox()
    records: list[WindowRecord] = []
    tuner = Tuner(
        TunerConfig(mode="observe", window_s=window_s, settle_s=window_s / 4),
        gpu=gpu,
        engine=inbox,
        serve=ServeMetrics(max_age_s=1.0),
        clock=clock,
        on_record=records.append,
    )
    warm_s = clock.now_s() + WARM_UP_S
    for wake_s in tuner.run():
        while (delay_s := wake_s - clock.now_s()) > 0:
            inbox.push(engine.sample(clock.now_s()))
            time.sleep(min(delay_s, PUSH_S))
        found = [r.window for r in records if r.window and r.window.start_s >= warm_s]
        if len(found) >= windows:
            tuner.stop()
        elif tuner.fault or len(records) > 10 * windows + 10 * WARM_UP_S / window_s:
            raise AgftError(f"no windows: {tuner.fault or records[-1].note}")
    return found


def decode_table(gpu: Gpu, load: Load, arguments: argparse.Namespace) -> Iterator[str]:
    yield f"| batch | {COLUMNS}"
    yield "|---:|---:|---:|---:|---:|---:|---|"
    for batch in arguments.batches:
        print(f"batch size {batch}", file=sys.stderr)
        engine = Engine(load.decode(batch), batch)
        yield f"| {batch} | {_cells(gpu, engine, arguments)}"


def prefill_table(gpu: Gpu, load: Load, arguments: argparse.Namespace) -> Iterator[str]:
    yield f"| prompt tokens | {COLUMNS}"
    yield "|---:|---:|---:|---:|---:|---:|---|"
    for tokens in arguments.prompts:
        print(f"prompts of {tokens} tokens", file=sys.stderr)
        engine = Engine(load.prefill(tokens), 1, prompt_tokens=tokens)
        yield f"| {tokens} | {_cells(gpu, engine, arguments)}"


COLUMNS = "tokens/s | step | power | SM clock | energy per token | clock limited by |"


def _cells(gpu: Gpu, engine: Engine, arguments: argparse.Namespace) -> str:
    with engine:
        windows = observed(gpu, engine, window_s=arguments.window_s, windows=arguments.windows)
    totals = [t for window in windows for t in (window.decode_steps, window.prefill_steps)]
    tokens, steps = sum(total.tokens for total in totals), sum(total.steps for total in totals)
    step_s = sum(total.time_s for total in totals) / steps
    time_s = sum(window.duration_s for window in windows)
    energy_j = sum(window.energy_j for window in windows)
    clock_mhz = statistics.fmean(window.sm_clock_mhz for window in windows)
    reasons = EventReason.NONE
    for window in windows:
        reasons |= window.event_reasons
    return (
        f"{tokens / time_s:,.1f} | {1e3 * step_s:.2f} ms | {energy_j / time_s:.1f} W | "
        f"{clock_mhz:,.0f} MHz | {energy_j / tokens:.4f} J | "
        f"{reasons.name if reasons else 'nothing'} |"
    )


def idle_line(gpu: Gpu, seconds: float) -> str:
    """What the card draws with the weights loaded and nothing to do, the clocks its own."""
    print("loaded, nothing to do", file=sys.stderr)
    samples = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(0.05)
        samples.append(gpu.read())
    power_w = statistics.median(sample.power_w for sample in samples)
    clocks_mhz = sorted(sample.sm_clock_mhz for sample in samples)
    return (
        f"Loaded, with nothing to do: {power_w:.1f} W, median of {seconds:g} s; SM clock "
        f"{clocks_mhz[0]:,.0f} to {clocks_mhz[-1]:,.0f} MHz."
    )


def energy_check(gpu: Gpu, load: Load, seconds: float) -> Iterator[str]:
    """The energy counter against power, integrated between two of its updates."""
    print("matrix products", file=sys.stderr)
    with Engine(load.matmul(), 1) as engine:
        time.sleep(WARM_UP_S)
        counter = watch_energy_counter(gpu, WallClock(), watch_s=min(2.0, seconds))
        samples: list[GpuSample] = []
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            samples.append(gpu.read())
            engine.sample(0.0)
            time.sleep(0.005)
        costs_s = sorted(_timed(gpu.read) for _ in range(SAMPLES))
    power_w = statistics.median(sample.power_w for sample in samples)
    yield f"- power: {power_w:.1f} W ({samples[-1].power_source}), median of {len(samples)}"
    if counter.source == "counter":
        period = "?" if counter.update_period_s is None else f"{counter.update_period_s * 1e3:.0f}"
        yield (
            f"- energy counter: updated every {period} ms, read every {counter.poll_s * 1e3:.1f} "
            f"ms; its changes are multiples of {counter.resolution_j} J"
        )
        yield f"- counted energy / integrated power over {seconds:g} s: {_ratio(samples):.4f}"
    else:
        yield "- energy counter: none; energy is integrated from power"
    yield (
        f"- one sample costs {statistics.median(costs_s) * 1e3:.2f} ms (median of {SAMPLES}; "
        f"longest {costs_s[-1] * 1e3:.2f} ms)"
    )


def _timed(act: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    act()
    return time.perf_counter() - begin_s


def _ratio(samples: Sequence[GpuSample]) -> float:
    """By the trapezoidal rule, between the counter's first change and its last."""
    changes = [b for a, b in itertools.pairwise(samples) if b.energy_j != a.energy_j]
    if len(changes) < 2:
        raise AgftError("the energy counter did not change; lengthen --matmul-s")
    first, last = changes[0], changes[-1]
    integrated_j = sum(
        (a.power_w + b.power_w) / 2 * max(0.0, min(b.t_s, last.energy_t_s) - max(a.t_s, start_s))
        for start_s in (first.energy_t_s,)
        for a, b in itertools.pairwise(samples)
    )
    return (last.energy_j - first.energy_j) / integrated_j


def names(cuda_uuid: str) -> tuple[str, str, tuple[str, ...]]:
    """How this process's GPU is named: by the environment, by CUDA, by agft_ray."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return visible, cuda_uuid, visible_uuids(os.environ, list_devices())


def names_under_ray(device: str) -> tuple[str, str, tuple[str, ...]]:
    """The same within a Ray task that has one GPU."""
    import ray

    def look() -> tuple[str, str, tuple[str, ...]]:
        cuda_uuid = "not asked"
        if device.startswith("cuda"):
            import torch

            cuda_uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        return names(cuda_uuid)

    with ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR"):
        found: tuple[str, str, tuple[str, ...]] = ray.get(
            ray.remote(num_gpus=1, max_calls=1)(look).remote()
        )
    return found


def report(load: Load, arguments: argparse.Namespace) -> Iterator[str]:
    uuid = load.uuid()
    gpu = ReadOnly(NvmlGpu(uuid, clock=WallClock()))
    driver, nvml, cuda = driver_versions()
    yield f"# {gpu.model}\n"
    yield (
        f"Made by `examples/observe_decode_load.py` on {datetime.date.today()}; driver {driver}, "
        f"NVML {nvml}, CUDA {cuda}. Clocks and power limit were as they were found.\n"
    )
    yield f"## Decode, by batch size\n\n{load.what}.\n"
    yield from decode_table(gpu, load, arguments)
    yield "\n" + idle_line(gpu, arguments.idle_s)
    yield "\n## Prefill, by length of the prompt\n"
    yield from prefill_table(gpu, load, arguments)
    yield "\n## Energy counter, under matrix products\n"
    yield from energy_check(gpu, load, arguments.matmul_s)
    yield "\n## Which GPU it is\n"
    yield "| | `CUDA_VISIBLE_DEVICES` | CUDA says | agft_ray says |\n|---|---|---|---|"
    rows = {"this process": names(uuid)}
    if arguments.ray:
        rows["a Ray task with one GPU"] = names_under_ray(arguments.device)
    for where, (visible, cuda_uuid, ours) in rows.items():
        yield f"| {where} | {visible} | {cuda_uuid} | {', '.join(ours)} |"
    yield "\n## What `agft-ray doctor` says\n\n```"
    yield from doctor_lines(examine(Question(gpus=(uuid,))))
    yield "```"


def main(
    given: Sequence[str] | None = None,
    make_load: Callable[[argparse.Namespace], Load] | None = None,
) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    parser.add_argument("--device", default="cuda:0", help="of PyTorch (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024, help="tokens in each KV cache")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="their lengths")
    parser.add_argument("--idle-s", type=float, default=IDLE_S)
    parser.add_argument("--window-s", type=float, default=2.0)
    parser.add_argument("--windows", type=int, default=10, help="windows for each batch size")
    parser.add_argument("--matmul-s", type=float, default=20.0)
    parser.add_argument("--ray", action="store_true", help="name the GPU in a Ray task as well")
    arguments = parser.parse_args(given)
    try:
        if make_load is None:
            load: Load = TorchLoad(arguments.device, arguments.layers, arguments.context)
        else:
            load = make_load(arguments)
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(arguments.out.open("w")) if arguments.out else sys.stdout
            for line in report(load, arguments):
                print(line, file=out, flush=True)
    except ImportError as error:
        print(f"{error}: this needs PyTorch, built for CUDA", file=sys.stderr)
        return 2
    except (AgftError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
