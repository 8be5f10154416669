import copy
import operator
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from agft_ray.telemetry.counters import EngineStats
from agft_ray.types import (
    COUNTERS,
    LATENCY_BUCKETS,
    EngineCounters,
    EngineSample,
    Histogram,
    StepTotals,
    counters_of,
)

GAUGES = {"t_s": 9.0, "running": 3, "waiting": 1, "kv_cache_usage": 0.5}


@pytest.fixture
def stats():
    """An engine that has counted some of everything."""
    stats = EngineStats()
    stats.on_prompt(tokens=100, cached_tokens=40)
    stats.on_step(prefill_tokens=60, decode_tokens=2, time_s=0.25)
    stats.on_first_token(ttft_s=0.5)
    stats.on_token(itl_s=0.125)
    stats.on_decode_steps(steps=5, sequences=2, time_s=0.5, itl_sum_s=1.0)
    stats.on_unknown_step(tokens=7, time_s=0.0625)
    stats.on_finish(e2e_s=2.0, tpot_s=0.1)
    stats.on_preemption()
    return stats


def one_in(*buckets):
    return Histogram(tuple(int(at in buckets) for at in range(LATENCY_BUCKETS)))


def test_latencies_beyond_the_buckets_are_in_the_outermost():
    stats = EngineStats()
    for e2e_s in (0.0, 1e-9, 1e-3, 999.0, 1e9):
        stats.on_finish(e2e_s=e2e_s)
    counts = stats.e2e_histogram.counts
    assert (counts[0], counts[-1], sum(counts)) == (3, 2, 5)
    assert not any(stats.tpot_histogram.counts), "requests of a single token have none"


def test_a_sample_has_every_counter_and_the_gauges(stats):
    sample = stats.sample(**GAUGES)
    assert sample == EngineSample(
        **GAUGES,
        prompt_tokens=100,
        generation_tokens=12,
        iterations=7,
        iteration_tokens=79,
        ttft_sum_s=0.5,
        ttft_count=1,
        itl_sum_s=1.125,
        itl_count=11,
        e2e_sum_s=2.0,
        e2e_count=1,
        prefix_cache_queries=100,
        prefix_cache_hits=40,
        preemptions=1,
        decode_steps=StepTotals(5, 10, 0.5),
        prefill_steps=StepTotals(1, 62, 0.25),
        unknown_steps=StepTotals(1, 7, 0.0625),
        ttft_histogram=one_in(86),  # 10^(86/32) ms = 487 ms
        tpot_histogram=one_in(64),
        e2e_histogram=one_in(105),
    )
    assert [f.name for f in fields(EngineSample)] == [*COUNTERS, *GAUGES]


def test_everything_that_engines_count_is_counted(stats):
    assert all(map(operator.ne, counters_of(stats), counters_of(EngineStats())))


def test_a_difference_is_what_was_counted_in_between(stats):
    before = stats.sample(**GAUGES)
    stats.on_token(itl_s=0.25)
    stats.on_unknown_step(tokens=3, time_s=0.5)
    stats.on_ttft(1.5)
    assert stats.sample(**GAUGES) - before == EngineCounters(
        ttft_sum_s=1.5,
        ttft_count=1,
        ttft_histogram=one_in(101),
        generation_tokens=1,
        iterations=1,
        iteration_tokens=3,
        itl_sum_s=0.25,
        itl_count=1,
        unknown_steps=StepTotals(1, 3, 0.5),
    )


def test_a_sample_is_a_value(stats):
    sample = stats.sample(**GAUGES)
    assert pickle.loads(pickle.dumps(sample)) == copy.deepcopy(sample) == sample
    with pytest.raises(FrozenInstanceError):
        sample.prompt_tokens = 0
    assert not hasattr(sample, "__dict__")
