"""A window's context: AGFT's seven features, the request rate and a bias, scaled by constants."""

from __future__ import annotations

import math

from agft_ray.types import Context, Window

FEATURE_SCHEMA = 1

FEATURE_NAMES = (
    "bias",
    "has_queue",
    "prefill_throughput",
    "decode_throughput",
    "packing_efficiency",
    "concurrency",
    "kv_cache_usage",
    "cache_hit_rate",
    "request_rate",
)

CLOCK_DRIVEN = ("has_queue", "packing_efficiency", "concurrency", "kv_cache_usage")
"""Features that a clock moves by itself: slower steps leave more requests running and waiting."""

# One unit of the scaled feature. Constants, so that statistics of different replicas can be added.
PREFILL_TOKENS_PER_S = 2000.0
DECODE_TOKENS_PER_S = 1000.0
TOKENS_PER_STEP = 512.0
SEQUENCES = 64.0
REQUESTS_PER_S = 8.0


def extract(window: Window) -> Context:
    """The context of a window, 9 numbers of about 0..1 (`FEATURE_NAMES`).

    Throughputs, packing, concurrency and request rate span three decades between a quiet
    workstation card and a loaded datacentre one, so they enter as `ln(1 + x) / ln(1 + unit)`;
    shares and the queue indicator enter as they are. Raises `ValueError` if a number is not finite.
    """
    duration_s = window.duration_s
    packing = window.iteration_tokens / window.iterations if window.iterations else 0.0
    queries = window.prefix_cache_queries
    features = (
        1.0,
        1.0 if window.waiting > 0 else 0.0,
        _scaled(window.prompt_tokens / duration_s, PREFILL_TOKENS_PER_S),
        _scaled(window.generation_tokens / duration_s, DECODE_TOKENS_PER_S),
        _scaled(packing, TOKENS_PER_STEP),
        _scaled(window.running, SEQUENCES),
        window.kv_cache_usage,
        window.prefix_cache_hits / queries if queries else 0.0,
        _scaled(window.request_rate_per_s, REQUESTS_PER_S),
    )
    if not all(math.isfinite(value) for value in features):
        raise ValueError(f"window at {window.start_s:.1f} s has a non-finite feature: {features}")
    return Context(features, FEATURE_SCHEMA)


def _scaled(value: float, unit: float) -> float:
    return math.log1p(value) / math.log1p(unit)
