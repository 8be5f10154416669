"""`VllmStats` without vLLM: the classes here are FAKES of vLLM's statistics, with the same names
of fields; test_vllm_plugin.py holds these names against the real ones."""

import dataclasses
import importlib.metadata
import logging

import pytest

from agft_ray.errors import StaleMetricsError
from agft_ray.serve.vllm_stats import (
    FINISHED_FIELDS,
    ITERATION_FIELDS,
    PLUGIN,
    SCHEDULER_FIELDS,
    VllmStats,
    missing_fields,
    registered_stats,
)
from agft_ray.types import StepTotals

GROUP = "vllm.stat_logger_plugins"


@dataclasses.dataclass
class Details:
    num_ctx_tokens: int = 0
    num_generation_tokens: int = 0
    elapsed_ms: float = 0.0
    is_dummy: bool = False


@dataclasses.dataclass
class Prefix:
    queries: int = 0
    hits: int = 0


@dataclasses.dataclass
class Scheduler:
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_skipped_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_stats: Prefix | None = None
    iteration_details: Details | None = None


@dataclasses.dataclass
class OldScheduler:
    """As in vLLM before 0.17: neither iteration details nor skipped requests."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_stats: Prefix | None = None


@dataclasses.dataclass
class Finished:
    e2e_latency: float


@dataclasses.dataclass
class Iteration:
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preempted_reqs: int = 0
    time_to_first_tokens_iter: list[float] = dataclasses.field(default_factory=list)
    inter_token_latencies_iter: list[float] = dataclasses.field(default_factory=list)
    finished_requests: list[Finished] = dataclasses.field(default_factory=list)


def connected(*, engines=1, has_details=True, quiet=True):
    stats = VllmStats(quiet=quiet)
    for index in range(engines):
        stats.connect(index, has_details=has_details)
    return stats


def step(ctx=0, generation=0, elapsed_ms=0.0, is_dummy=False):
    return Scheduler(iteration_details=Details(ctx, generation, elapsed_ms, is_dummy))


def entry_points():
    return list(importlib.metadata.entry_points(group=GROUP, name=PLUGIN))


# -- what is added up ------------------------------------------------------------------------------


def test_iterations_are_added_up():
    stats = connected()
    first = Iteration(100, 3, 1, [0.5, 0.25, 0.25], [0.125], [Finished(2.0), Finished(3.0)])
    stats.record(Scheduler(prefix_cache_stats=Prefix(100, 64)), first, 0)
    stats.record(Scheduler(prefix_cache_stats=Prefix(10, 0)), Iteration(0, 2, 0, [], [0.25] * 2), 0)
    sample = stats.sample(7.0)
    assert sample.t_s == 7.0
    assert (sample.prompt_tokens, sample.generation_tokens, sample.preemptions) == (100, 5, 1)
    assert (sample.ttft_sum_s, sample.ttft_count) == (1.0, 3)
    assert (sample.itl_sum_s, sample.itl_count) == (0.625, 3)
    assert (sample.e2e_sum_s, sample.e2e_count) == (5.0, 2)
    assert (sample.prefix_cache_queries, sample.prefix_cache_hits) == (110, 64)


def test_gauges_are_those_of_the_last_iteration():
    stats = connected()
    stats.record(Scheduler(8, 5, 0, 0.9), None, 0)
    stats.record(Scheduler(3, 2, 4, 0.5), None, 0)
    stats.record(None, Iteration(), 0)
    sample = stats.sample(0.0)
    assert (sample.running, sample.waiting, sample.kv_cache_usage) == (3, 6, 0.5)


def test_data_parallel_engines_are_summed_and_their_kv_cache_usage_averaged():
    stats = connected(engines=2)
    stats.record(Scheduler(2, 1, 0, 0.25), Iteration(num_generation_tokens=2), 0)
    stats.record(Scheduler(4, 3, 0, 0.75), Iteration(num_generation_tokens=4), 1)
    sample = stats.sample(0.0)
    assert (sample.running, sample.waiting, sample.kv_cache_usage) == (6, 4, 0.5)
    assert sample.generation_tokens == 6


# -- classes of steps ------------------------------------------------------------------------------


def test_steps_are_told_apart_by_what_vllm_measured_of_them():
    stats = connected()
    stats.record(step(generation=4, elapsed_ms=20.0), Iteration(inter_token_latencies_iter=[9]), 0)
    stats.record(step(generation=6, elapsed_ms=30.0), None, 0)
    stats.record(step(ctx=500, generation=4, elapsed_ms=250.0), Iteration(), 0)
    sample = stats.sample(0.0)
    assert sample.decode_steps == StepTotals(2, 10, pytest.approx(0.05))
    assert sample.prefill_steps == StepTotals(1, 504, 0.25)
    assert sample.unknown_steps == StepTotals(0, 0, 0.0)
    assert (sample.iterations, sample.iteration_tokens) == (3, 514)


def test_dummy_iterations_are_no_steps():
    stats = connected()
    scheduler = step(generation=1, elapsed_ms=20.0, is_dummy=True)
    stats.record(scheduler, None, 0)
    assert stats.sample(0.0).iterations == 0
    assert scheduler.iteration_details is None, "vLLM would log it"


@pytest.mark.parametrize("quiet", [True, False])
def test_details_are_taken_away_unless_their_log_is_wanted(quiet):
    stats = connected(quiet=quiet)
    scheduler = step(generation=1, elapsed_ms=20.0)
    stats.record(scheduler, None, 0)
    assert (scheduler.iteration_details is None) is quiet
    assert stats.sample(0.0).iterations == 1


def test_without_details_steps_are_unknown_and_timed_by_the_least_inter_token_latency():
    stats = connected(has_details=False)
    stats.record(OldScheduler(4, 2), Iteration(60, 4, 0, [0.5], [0.25, 0.125, 0.75]), 0)
    stats.record(OldScheduler(4, 0), Iteration(0, 1, 0, [0.5]), 0)
    sample = stats.sample(0.0)
    assert sample.unknown_steps == StepTotals(2, 65, 0.125)
    assert sample.decode_steps == sample.prefill_steps == StepTotals(0, 0, 0.0)
    assert sample.waiting == 0


# -- when nothing is known -------------------------------------------------------------------------


def test_before_the_engine_starts_nothing_is_known():
    stats = VllmStats()
    assert not stats.is_connected
    with pytest.raises(StaleMetricsError, match="not started yet"):
        stats.sample(0.0)


def test_after_the_engine_has_gone_nothing_is_known():
    stats = connected()
    assert stats.is_connected
    stats.disconnect()
    with pytest.raises(StaleMetricsError, match="given up its stat logger"):
        stats.sample(0.0)


@pytest.mark.parametrize(
    ("scheduler", "iteration", "engine_index", "named"),
    [
        (object(), None, 0, "num_running_reqs"),
        (Scheduler(iteration_details=object()), None, 0, "is_dummy"),
        (None, object(), 0, "time_to_first_tokens_iter"),
        (None, Iteration(inter_token_latencies_iter=["x"]), 0, "TypeError"),
        (Scheduler(), None, 3, "KeyError"),
    ],
)
def test_what_cannot_be_read_is_no_error_for_vllm_but_for_good_for_the_tuner(
    scheduler, iteration, engine_index, named, caplog
):
    stats = connected()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            stats.record(scheduler, iteration, engine_index)
    assert len(caplog.records) == 1, "not said once"
    stats.record(Scheduler(), Iteration(), 0)
    with pytest.raises(StaleMetricsError, match=named):
        stats.sample(0.0)


# -- the plugin's entry point ----------------------------------------------------------------------


def test_the_entry_point_exists_only_while_registered():
    stats = VllmStats()
    assert entry_points() == []
    with stats.registered():
        assert registered_stats() is stats
        assert [point.value for point in entry_points()] == [
            "agft_ray.serve.vllm_plugin:TunerStatLogger"
        ]
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("no-such-distribution")
        stats.connect(0, has_details=True)
    assert registered_stats() is None
    assert entry_points() == []
    stats.sample(0.0)


def test_the_entry_point_goes_when_the_engine_fails_to_start():
    with pytest.raises(RuntimeError, match="out of memory"), VllmStats().registered():
        raise RuntimeError("out of memory")
    assert registered_stats() is None
    assert entry_points() == []


@pytest.mark.parametrize(
    ("allowed", "hint"),
    [
        ("others,more", "VLLM_PLUGINS is 'others,more'; add 'agft_ray' to it"),
        ("", "VLLM_PLUGINS is ''; add 'agft_ray' to it"),
        (f"others,{PLUGIN}", "see vLLM's log"),
        (None, "see vLLM's log"),
    ],
)
def test_an_engine_that_does_not_load_the_plugin_is_told_why(allowed, hint, monkeypatch):
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    stats = VllmStats()
    with stats.registered():
        pass
    with pytest.raises(StaleMetricsError, match=hint):
        stats.sample(0.0)


# -- other versions of vLLM ------------------------------------------------------------------------


def test_fields_that_are_there_are_not_missed():
    assert missing_fields(OldScheduler(), Iteration(), ["e2e_latency", "other"]) == ""


def test_missing_fields_are_named():
    problem = missing_fields(object(), object(), ["latency"])
    named = [f"SchedulerStats.{name}" for name in SCHEDULER_FIELDS]
    named += [f"IterationStats.{name}" for name in ITERATION_FIELDS]
    named += [f"FinishedRequestStats.{name}" for name in FINISHED_FIELDS]
    assert problem == f"this vLLM has no {', '.join(named)}"
