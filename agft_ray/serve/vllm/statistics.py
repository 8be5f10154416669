"""vLLM's statistics, read in process: what its stat loggers are told, added up for a tuner."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agft_ray.errors import StaleMetricsError
from agft_ray.serve.vllm.pending import PendingPrompts
from agft_ray.serve.vllm.receiver import receiver, set_receiver
from agft_ray.simulation.batch import StepListener
from agft_ray.telemetry.counters import EngineStats
from agft_ray.types import EngineSample

log = logging.getLogger(__name__)

PLUGIN = "agft_ray"
"""Our name in vLLM's plugin group, and what `VLLM_PLUGINS` must list where it is set."""
_ENTRY_POINTS = f"""
[vllm.stat_logger_plugins]
{PLUGIN} = agft_ray.serve.vllm.plugin:TunerStatLogger
"""

SILENCE_LIMIT_S = 10.0
"""An engine that has requests and does no step for longer is taken to hang; prefill of a long
prompt takes a few seconds."""


@dataclass(slots=True)
class _Gauges:
    """One engine's state after its last iteration."""

    recorded_s: float
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0


class VllmStats:
    """Statistics of the vLLM engine whose start is enclosed by `registered`.

    ```python
    stats = VllmStats()
    tuner = attach_tuner(stats.sample, gpu=NvmlGpuConfig(), engine_model="...")
    with stats.registered():
        engine = AsyncLLM.from_engine_args(args)
    stats.watch(engine, tuner.switch)
    ```

    vLLM calls `record` once an iteration, in the process and on the event loop of the engine's
    front end, and never while it is idle. Give the engine `enable_logging_iteration_details=True`,
    and its steps are told apart (decode only, with prefill) by what it measured of them; without,
    steps are those that gave out tokens, timed by the inter-token latencies, in the class
    'unknown'. Data-parallel engines of one front end are summed: counters, running and waiting
    requests; the KV cache usage is their mean.

    Args:
        quiet: take the iteration details away once they are read, so that vLLM does not log a
            line for every step; False if that log is wanted.
        now_s: the time, for tests.
    """

    def __init__(self, *, quiet: bool = True, now_s: Callable[[], float] = time.monotonic) -> None:
        self._quiet, self._now_s = quiet, now_s
        self._stats = EngineStats()
        self._engines: dict[int, _Gauges] = {}
        self._has_details = self._had_prefill = False
        self._problem = ""
        self._prompts: PendingPrompts | None = None
        self._watched: object = None

    @property
    def is_connected(self) -> bool:
        """Whether an engine reports here."""
        return bool(self._engines)

    def sample(self, t_s: float) -> EngineSample:
        """The statistics as they stand.

        Raises `StaleMetricsError`, saying why, before the engine has started, while it has
        requests and does nothing, and for good after something in its statistics could not be read.
        """
        if self._problem:
            raise StaleMetricsError(self._problem)
        if not self._engines:
            raise StaleMetricsError("vLLM has not started yet")
        self._check_not_silent()
        gauges = self._engines.values()
        if self._prompts is not None:
            self._prompts.settle(is_empty=not any(g.running + g.waiting for g in gauges))
        return self._stats.sample(
            t_s=t_s,
            running=sum(gauge.running for gauge in gauges),
            waiting=sum(gauge.waiting for gauge in gauges),
            kv_cache_usage=sum(gauge.kv_cache_usage for gauge in gauges) / len(gauges),
        )

    def _check_not_silent(self) -> None:
        """vLLM reports every step, so an engine with work that reports none does none."""
        for index, gauges in self._engines.items():
            silent_s = self._now_s() - gauges.recorded_s
            if silent_s > SILENCE_LIMIT_S and gauges.running + gauges.waiting > 0:
                raise StaleMetricsError(
                    f"engine {index} has done no step for {silent_s:.0f} s, with "
                    f"{gauges.running} requests running and {gauges.waiting} waiting"
                )

    def watch(self, engine: object, switch: StepListener) -> None:
        """Have the switch told of this `AsyncLLM`'s arrivals and steps, so that prompts and further
        tokens may have clocks of their own.

        Never raises. Of an engine without `add_request` prompts are noticed a step late, once they
        wait in its scheduler.
        """
        self._prompts = PendingPrompts(switch, now_s=self._now_s)
        if engine is self._watched:
            return
        try:
            add_request = engine.add_request  # type: ignore[attr-defined]
            engine.add_request = self._telling(add_request)  # type: ignore[attr-defined]
            self._watched = engine
        except AttributeError as error:
            log.warning("arrivals cannot be watched: %s", error)

    def _telling(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **further: Any) -> Any:
            if self._prompts is not None:
                self._prompts.on_arrival()
            return add_request(*arguments, **further)

        return told

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """While this is open, vLLM engines that start in this process report here, and no others.

        The plugin's entry point exists only here: vLLM, which turns statistics on wherever it
        finds one, is as it was everywhere else in the environment. Never raises: what is wrong is
        logged, and `sample` says it.
        """
        if receiver() is not None:
            self._fail("another engine is starting in this process; start them one after the other")
            yield
            return
        finder = _PluginFinder()
        set_receiver(self)
        sys.meta_path.append(finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            set_receiver(None)
        if not self._engines:
            self._fail(f"vLLM did not load its plugin {PLUGIN!r}: {_why_not_loaded()}")

    # -- called by vLLM, through the plugin ----------------------------------------------------

    def connect(self, engine_index: int, *, has_details: bool) -> None:
        """An engine will report under this index; `has_details` if it times its iterations."""
        self._engines[engine_index] = _Gauges(self._now_s())
        self._has_details = has_details

    def disconnect(self) -> None:
        """No more will be reported, and what was is soon out of date."""
        self._fail("vLLM has given up its stat logger, or its engine has ended")

    def record(self, scheduler: Any, iteration: Any, engine_index: int) -> None:
        """Add one iteration of an engine.

        Never raises: vLLM would end its output handler, and fail every request. Takes time
        proportional to what vLLM has gathered of this one iteration, and keeps none of it.
        """
        if self._problem:
            return
        try:
            if scheduler is not None:
                self._add_scheduler(scheduler, self._engines[engine_index])
            if iteration is not None:
                self._add_iteration(iteration)
                self._tell_prompts(iteration)
        except Exception as error:
            self._fail(f"vLLM's statistics cannot be read: {error!r}", exc_info=error)

    def _add_scheduler(self, scheduler: Any, gauges: _Gauges) -> None:
        skipped = getattr(scheduler, "num_skipped_waiting_reqs", 0)  # since 0.17
        gauges.recorded_s = self._now_s()
        gauges.running = scheduler.num_running_reqs
        gauges.waiting = scheduler.num_waiting_reqs + skipped
        gauges.kv_cache_usage = scheduler.kv_cache_usage
        prefix = scheduler.prefix_cache_stats
        if prefix is not None:
            self._stats.prefix_cache_queries += prefix.queries
            self._stats.prefix_cache_hits += prefix.hits
        details = scheduler.iteration_details if self._has_details else None
        if details is None:
            return
        if not details.is_dummy:
            self._had_prefill = details.num_ctx_tokens > 0
            self._stats.on_step(
                prefill_tokens=details.num_ctx_tokens,
                decode_tokens=details.num_generation_tokens,
                time_s=details.elapsed_ms / 1000,
            )
        if self._quiet:
            scheduler.iteration_details = None

    def _tell_prompts(self, iteration: Any) -> None:
        if self._prompts is None:
            return
        gauges = self._engines.values()
        first_tokens = len(iteration.time_to_first_tokens_iter)
        self._prompts.on_step(
            running=sum(gauge.running for gauge in gauges),
            waiting=sum(gauge.waiting for gauge in gauges),
            first_tokens=first_tokens,
            had_prefill=self._had_prefill or first_tokens > 0,
            is_timed=self._has_details,
        )
        self._had_prefill = False

    def _add_iteration(self, iteration: Any) -> None:
        stats = self._stats
        ttfts_s, itls_s = iteration.time_to_first_tokens_iter, iteration.inter_token_latencies_iter
        stats.prompt_tokens += iteration.num_prompt_tokens
        stats.generation_tokens += iteration.num_generation_tokens
        stats.preemptions += iteration.num_preempted_reqs
        for ttft_s in ttfts_s:
            stats.on_ttft(ttft_s)
        stats.itl_sum_s += sum(itls_s)
        stats.itl_count += len(itls_s)
        for finished in iteration.finished_requests:
            tpot_s = finished.mean_time_per_output_token or None  # 0 of a single token
            stats.on_finish(e2e_s=finished.e2e_latency, tpot_s=tpot_s)
        if not self._has_details:
            tokens = iteration.num_prompt_tokens + iteration.num_generation_tokens
            # Of all requests served, the least waited for the step alone and not in a queue.
            stats.on_unknown_step(tokens=tokens, time_s=min(itls_s, default=0.0))

    def _fail(self, problem: str, *, exc_info: BaseException | None = None) -> None:
        self._problem = problem
        log.error("%s; serving goes on, the clocks return to default", problem, exc_info=exc_info)


def _why_not_loaded() -> str:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"VLLM_PLUGINS is {allowed!r}; add {PLUGIN!r} to it"
    return "see vLLM's log; its statistics can be read since 0.11, by AsyncLLM only"


class _PluginDistribution(importlib.metadata.Distribution):
    """A distribution that consists of one entry point."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": "Metadata-Version: 2.1\nName: agft-ray-vllm-plugin\nVersion: 1\n",
            "entry_points.txt": _ENTRY_POINTS,
        }
        return texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(path)


class _PluginFinder(importlib.metadata.DistributionFinder):
    """Shows it to `importlib.metadata`, the documented way to add distributions."""

    def find_spec(self, *_: object) -> None:
        """Finds no module."""

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        if context is None or context.name is None:
            yield _PluginDistribution()
