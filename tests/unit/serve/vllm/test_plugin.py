"""The plugin with the classes of the installed vLLM; no engine is started."""

import gc
from types import SimpleNamespace

import pytest

from agft_ray.errors import StaleMetricsError
from agft_ray.serve.vllm.fields import FINISHED_FIELDS, missing_fields
from agft_ray.serve.vllm.look import look_at_vllm
from agft_ray.serve.vllm.statistics import VllmStats
from agft_ray.types import StepTotals

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def vllm():
    """What is used of vLLM, imported here since that takes seconds."""
    from vllm.v1.metrics import loggers, stats

    from agft_ray.serve.vllm import plugin as vllm_plugin

    return SimpleNamespace(loggers=loggers, stats=stats, plugin=vllm_plugin)


def config(*, details):
    """A FAKE of vLLM's config: as much of it as the plugin looks at."""
    observability = SimpleNamespace(enable_logging_iteration_details=details)
    return SimpleNamespace(observability_config=observability)


def load(vllm, stats, **names):
    """What vLLM loads while the statistics are registered: its plugins, as engines' loggers."""
    with stats.registered():
        factories = vllm.loggers.load_stat_logger_plugin_factories()
        assert factories == [vllm.plugin.TunerStatLogger]
        return vllm.loggers.PerEngineStatLoggerAdapter(
            per_engine_stat_logger_factory=factories[0], **names
        )


def test_the_installed_vllm_has_all_that_is_read(vllm):
    assert look_at_vllm() == ("", True)


def test_a_field_that_vllm_loses_is_missed(vllm):
    scheduler, iteration = vllm.stats.SchedulerStats(), vllm.stats.IterationStats()
    del iteration.inter_token_latencies_iter
    problem = missing_fields(scheduler, iteration, FINISHED_FIELDS)
    assert problem.endswith(" no IterationStats.inter_token_latencies_iter")


def test_vllm_finds_the_plugin_only_while_registered(vllm):
    stats = VllmStats()
    assert vllm.plugin.TunerStatLogger not in vllm.loggers.load_stat_logger_plugin_factories()
    load(vllm, stats, vllm_config=config(details=True), engine_indexes=[0])
    assert vllm.plugin.TunerStatLogger not in vllm.loggers.load_stat_logger_plugin_factories()


def test_a_logger_without_anyone_registered_does_nothing(vllm):
    logger = vllm.plugin.TunerStatLogger(config(details=True))
    logger.record(vllm.stats.SchedulerStats(), vllm.stats.IterationStats())
    logger.log_engine_initialized()


def test_statistics_of_the_real_classes_are_read(vllm):
    stats = VllmStats()
    logger = load(vllm, stats, vllm_config=config(details=True), engine_indexes=[0])
    scheduler, iteration = an_iteration(vllm.stats)
    logger.record(scheduler, iteration, engine_idx=0)
    logger.record(None, None, mm_cache_stats=None, engine_idx=0)
    sample = stats.sample(0.0)
    assert (sample.running, sample.waiting, sample.kv_cache_usage) == (5, 3, 0.25)
    assert sample.prefill_steps == StepTotals(1, 68, 0.05)
    assert sample.unknown_steps.steps == 0
    assert (sample.prompt_tokens, sample.generation_tokens, sample.preemptions) == (80, 5, 1)
    assert (sample.ttft_sum_s, sample.itl_sum_s, sample.e2e_sum_s) == (0.5, 0.5, 2.0)
    assert (sample.prefix_cache_queries, sample.prefix_cache_hits) == (80, 16)
    assert scheduler.iteration_details is None


def an_iteration(stats):
    """One prompt of 80 tokens, 16 of them cached, beside four requests that decode."""
    scheduler = stats.SchedulerStats(
        num_running_reqs=5,
        num_waiting_reqs=2,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=0.25,
        prefix_cache_stats=stats.PrefixCacheStats(requests=1, queries=80, hits=16),
        iteration_details=stats.SchedulerIterationDetails(
            iteration_index=1,
            num_ctx_requests=1,
            num_ctx_tokens=64,
            num_generation_requests=4,
            num_generation_tokens=4,
            elapsed_ms=50.0,
        ),
    )
    iteration = stats.IterationStats()
    prefill = stats.PrefillStats(num_prompt_tokens=80, num_computed_tokens=64, num_cached_tokens=16)
    iteration.prompt_token_stats.update_from_output(prefill)
    iteration.num_generation_tokens = 5
    iteration.num_preempted_reqs = 1
    iteration.time_to_first_tokens_iter.append(0.5)
    iteration.inter_token_latencies_iter += [0.125] * 4
    iteration.finished_requests.append(
        stats.FinishedRequestStats(finish_reason=None, e2e_latency=2.0)
    )
    return scheduler, iteration


def test_without_iteration_details_steps_are_unknown(vllm):
    stats = VllmStats()
    logger = load(vllm, stats, vllm_config=config(details=False), engine_indexes=[0])
    scheduler, iteration = an_iteration(vllm.stats)
    scheduler.iteration_details = None
    logger.record(scheduler, iteration, engine_idx=0)
    assert stats.sample(0.0).unknown_steps == StepTotals(1, 85, 0.125)


def test_each_data_parallel_engine_has_a_logger_of_its_own(vllm):
    stats = VllmStats()
    logger = load(vllm, stats, vllm_config=config(details=True), engine_indexes=[0, 1])
    for engine_index in (0, 1):
        scheduler, iteration = an_iteration(vllm.stats)
        logger.record(scheduler, iteration, engine_idx=engine_index)
    sample = stats.sample(0.0)
    assert (sample.running, sample.kv_cache_usage, sample.generation_tokens) == (10, 0.25, 10)


def test_a_logger_that_vllm_gives_up_disconnects(vllm):
    stats = VllmStats()
    logger = load(vllm, stats, vllm_config=config(details=True), engine_indexes=[0])
    stats.sample(0.0)
    del logger
    gc.collect()
    with pytest.raises(StaleMetricsError, match="stat logger"):
        stats.sample(0.0)


def test_vllms_own_manager_takes_the_logger(vllm, monkeypatch):
    """A FAKE stands in for its Prometheus logger, which needs a whole config of a model."""
    told = []

    class FakePrometheusLogger(vllm.loggers.AggregateStatLoggerBase):
        def __init__(self, vllm_config, engine_indexes):
            pass

        def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
            told.append(scheduler_stats)

        def log_engine_initialized(self):
            pass

    monkeypatch.setattr(vllm.loggers, "PrometheusStatLogger", FakePrometheusLogger)
    stats = VllmStats()
    with stats.registered():
        manager = vllm.loggers.StatLoggerManager(
            config(details=True),
            custom_stat_loggers=vllm.loggers.load_stat_logger_plugin_factories(),
            enable_default_loggers=False,
        )
    manager.log_engine_initialized()
    scheduler, iteration = an_iteration(vllm.stats)
    manager.record(scheduler, iteration, engine_idx=0)
    manager.record_sleep_state(1, 1)
    manager.log()
    assert stats.sample(0.0).iterations == 1
    assert told == [scheduler]
