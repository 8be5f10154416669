"""vLLM itself: the stat logger that it loads, and an engine. The only module that imports vLLM."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import AsyncIterator
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.metrics import stats as vllm_stats
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from agft_ray.serve.vllm.fields import DETAILS_FIELDS, missing_fields
from agft_ray.serve.vllm.receiver import receiver

OPTION = "enable_logging_iteration_details"


class TunerStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Passes on what vLLM tells it; one for each data-parallel engine. See `VllmStats`."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._stats = receiver()
        if self._stats is not None:
            observability = getattr(vllm_config, "observability_config", None)
            details = getattr(observability, OPTION, False) and times_steps()
            self._stats.connect(engine_index, has_details=details)
            # vLLM rebuilds its loggers when it scales its engines, without those of plugins.
            self._finalizer = weakref.finalize(self, self._stats.disconnect)
            self._finalizer.atexit = False
        self._engine_index = engine_index

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *_: object, **further: Any
    ) -> None:
        """Pass on one iteration; see `VllmStats.record`."""
        if self._stats is not None:
            self._stats.record(scheduler_stats, iteration_stats, self._engine_index)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


# What a later vLLM may ask of its loggers beyond this must not keep its engine from starting.
TunerStatLogger.__abstractmethods__ = frozenset()


def problem() -> str:
    """Why the statistics of the installed vLLM are not enough to tune by, or ""."""
    finished = [field.name for field in dataclasses.fields(FinishedRequestStats)]
    return missing_fields(SchedulerStats(), IterationStats(), finished)


def times_steps() -> bool:
    """Whether this vLLM can time its steps, and tells of each what it has computed.

    Older ones have the option as well, but their engines only log the details.
    """
    details = getattr(vllm_stats, "SchedulerIterationDetails", None)
    hands_out = "iteration_details" in _fields(SchedulerStats)
    return hasattr(AsyncEngineArgs, OPTION) and hands_out and _fields(details) >= {*DETAILS_FIELDS}


def _fields(dataclass: object) -> set[str]:
    return set(getattr(dataclass, "__dataclass_fields__", ()))


def start_engine(**arguments: Any) -> Any:
    """An `AsyncLLM`, given the arguments of `AsyncEngineArgs`; blocks until it has loaded."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def token_counts(
    engine: Any, prompt: list[int], max_tokens: int, request_id: str
) -> AsyncIterator[int]:
    """Have an `AsyncLLM` answer a prompt of token ids greedily, with exactly so many tokens; how
    many have come, as they come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    async for output in engine.generate({"prompt_token_ids": prompt}, sampling, request_id):
        yield len(output.outputs[0].token_ids)
