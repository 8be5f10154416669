"""What is read of vLLM's statistics, by name."""

from __future__ import annotations

from collections.abc import Iterable

SCHEDULER_FIELDS = (
    "num_running_reqs",
    "num_waiting_reqs",
    "kv_cache_usage",
    "prefix_cache_stats",
)
ITERATION_FIELDS = (
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_preempted_reqs",
    "time_to_first_tokens_iter",
    "inter_token_latencies_iter",
    "finished_requests",
)
FINISHED_FIELDS = ("e2e_latency", "mean_time_per_output_token")
PREFIX_FIELDS = ("queries", "hits")
DETAILS_FIELDS = ("num_ctx_tokens", "num_generation_tokens", "elapsed_ms", "is_dummy")
"""What is read of vLLM's statistics, which it calls unstable; these names hold for 0.29 to 0.32."""


def missing_fields(scheduler: object, iteration: object, finished: Iterable[str]) -> str:
    """What is not there of all that is read, as a reason to observe only; "" if nothing.

    Args:
        scheduler, iteration: vLLM's statistics of one iteration, empty ones for instance.
        finished: the field names of its statistics of a finished request.
    """
    missing = [f"SchedulerStats.{n}" for n in SCHEDULER_FIELDS if not hasattr(scheduler, n)]
    prefix = getattr(scheduler, "prefix_cache_stats", None)
    if prefix is not None:
        missing += [f"PrefixCacheStats.{n}" for n in PREFIX_FIELDS if not hasattr(prefix, n)]
    missing += [f"IterationStats.{n}" for n in ITERATION_FIELDS if not hasattr(iteration, n)]
    names = set(finished)
    missing += [f"FinishedRequestStats.{n}" for n in FINISHED_FIELDS if n not in names]
    return f"this vLLM has no {', '.join(missing)}" if missing else ""
