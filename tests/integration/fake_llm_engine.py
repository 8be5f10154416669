"""A FAKE LLM engine for the servers of `ray.serve.llm`: it answers no request.

What it does as vLLM does: it takes the GPUs of its bundles for good, loads vLLM's stat-logger
plugins, and has them told of one iteration after the other. What it has found goes to a JSON file
of its replica's in the folder that `FAKE_ENGINE_DIR` names; it does not start before `go` is there.
"""

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import ray
from ray import serve
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories
from vllm.v1.metrics.stats import (
    FinishedRequestStats,
    IterationStats,
    SchedulerIterationDetails,
    SchedulerStats,
)

STEP_S = 0.02
DIR_ENV = "FAKE_ENGINE_DIR"


def start_worker(index):
    """An actor that holds the bundle's GPU."""

    class Worker:  # in here so that it is pickled by value: a worker does not import vLLM
        def gpus(self):
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    strategy = PlacementGroupSchedulingStrategy(get_current_placement_group(), index)
    return ray.remote(Worker).options(num_cpus=0, num_gpus=1, scheduling_strategy=strategy).remote()


def iteration(step):
    """What vLLM says of an iteration: four requests decode, and every tenth step one is new."""
    prefill = step % 10 == 0
    details = SchedulerIterationDetails(step, prefill, 64 * prefill, 4, 4, 1000 * STEP_S)
    scheduler = SchedulerStats(num_running_reqs=4, kv_cache_usage=0.25, iteration_details=details)
    stats = IterationStats()
    stats.num_generation_tokens = 4 + prefill
    stats.inter_token_latencies_iter = [STEP_S] * 4
    if prefill:
        stats.prompt_token_stats.total = stats.prompt_token_stats.computed = 64
        stats.time_to_first_tokens_iter = [0.1]
        stats.finished_requests = [FinishedRequestStats(finish_reason=None, e2e_latency=1.0)]
    return scheduler, stats


class FakeLLMEngine(LLMEngine):
    def __init__(self, llm_config):
        self._engine_kwargs = llm_config.engine_kwargs

    async def start(self):
        directory = Path(os.environ[DIR_ENV])
        replica = serve.get_replica_context().replica_id.unique_id
        while not (directory / "go").exists():
            await asyncio.sleep(0.05)
        tensor_parallel = self._engine_kwargs.get("tensor_parallel_size", 1)
        own = ",".join(map(str, range(tensor_parallel)))
        bundles = os.environ.get("VLLM_RAY_BUNDLE_INDICES", own).split(",")
        self._workers = [start_worker(int(index)) for index in bundles]
        gpus = await asyncio.gather(*(worker.gpus.remote() for worker in self._workers))
        found = {"gpus": sorted(gpu for (gpu,) in gpus), "bundles": bundles, "pid": os.getpid()}
        unfinished = directory / f"{replica}.unfinished"
        unfinished.write_text(json.dumps(found))
        unfinished.rename(unfinished.with_suffix(".json"))
        details = self._engine_kwargs["enable_logging_iteration_details"]
        observability = SimpleNamespace(enable_logging_iteration_details=details)
        config = SimpleNamespace(observability_config=observability)
        self._loggers = [factory(config, 0) for factory in load_stat_logger_plugin_factories()]
        self._task = asyncio.create_task(self._run())

    async def _run(self):
        step = 0
        while True:
            scheduler, stats = iteration(step)
            for logger in self._loggers:
                logger.record(scheduler, stats, engine_idx=0)
            step += 1
            await asyncio.sleep(STEP_S)

    def routing_stats(self):
        return {}

    async def check_health(self):
        """Always well."""

    async def resolve_lora(self, lora_model):
        raise NotImplementedError("a fake")

    async def reset_prefix_cache(self):
        raise NotImplementedError("a fake")

    async def chat(self, request, raw_request_info=None):
        raise NotImplementedError("a fake")

    completions = embeddings = transcriptions = chat
