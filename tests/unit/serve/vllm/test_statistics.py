"""`VllmStats` without vLLM: the classes here are FAKES of vLLM's statistics, with the same names
of fields; test_vllm_plugin.py holds these names against the real ones."""

import dataclasses
import importlib
import importlib.metadata
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from agft_ray.errors import StaleMetricsError
from agft_ray.serve.vllm.fields import (
    FINISHED_FIELDS,
    ITERATION_FIELDS,
    SCHEDULER_FIELDS,
    missing_fields,
)
from agft_ray.serve.vllm.look import look_at_vllm
from agft_ray.serve.vllm.receiver import receiver
from agft_ray.serve.vllm.statistics import (
    PLUGIN,
    SILENCE_LIMIT_S,
    VllmStats,
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
    mean_time_per_output_token: float = 0.0


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
    first = Iteration(100, 3, 1, [0.5, 0.25, 0.25], [0.125], [Finished(2.0), Finished(3.0, 0.1)])
    stats.record(Scheduler(prefix_cache_stats=Prefix(100, 64)), first, 0)
    stats.record(Scheduler(prefix_cache_stats=Prefix(10, 0)), Iteration(0, 2, 0, [], [0.25] * 2), 0)
    sample = stats.sample(7.0)
    assert sample.t_s == 7.0
    assert (sample.prompt_tokens, sample.generation_tokens, sample.preemptions) == (100, 5, 1)
    assert (sample.ttft_sum_s, sample.ttft_count) == (1.0, 3)
    assert (sample.itl_sum_s, sample.itl_count) == (0.625, 3)
    assert (sample.e2e_sum_s, sample.e2e_count) == (5.0, 2)
    histograms = sample.ttft_histogram, sample.tpot_histogram, sample.e2e_histogram
    assert [sum(each.counts) for each in histograms] == [3, 1, 2]
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


def test_details_of_an_engine_that_does_not_promise_them_are_not_read():
    stats = connected(has_details=False)
    details = SimpleNamespace(num_ctx_tokens=0, num_generation_tokens=4)  # says no time
    stats.record(Scheduler(iteration_details=details), Iteration(0, 4, 0, [], [0.25] * 4), 0)
    assert stats.sample(0.0).unknown_steps == StepTotals(1, 4, 0.25)


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
    with pytest.raises(StaleMetricsError, match="stat logger"):
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


class Times:
    """FAKE time, of the engine's front end."""

    def __init__(self):
        self.t_s = 100.0

    def __call__(self):
        return self.t_s


def test_an_engine_that_hangs_with_requests_is_not_known():
    now = Times()
    stats = VllmStats(now_s=now)
    stats.connect(0, has_details=True)
    stats.connect(1, has_details=True)
    stats.record(Scheduler(2, 1), None, 0)
    now.t_s += SILENCE_LIMIT_S
    stats.record(Scheduler(1), None, 1)
    assert stats.sample(0.0).running == 3
    now.t_s += 1.0
    with pytest.raises(StaleMetricsError, match=r"engine 0 .*\b11 s.*\b2 requests"):
        stats.sample(0.0)
    stats.record(Scheduler(2, 1), None, 0)
    assert stats.sample(0.0).running == 3, "it works again"


def test_an_idle_engine_says_nothing_and_is_known_to_be_idle():
    now = Times()
    stats = VllmStats(now_s=now)
    stats.connect(0, has_details=True)
    now.t_s += 1000.0
    assert stats.sample(0.0).is_idle
    stats.record(Scheduler(), None, 0)
    now.t_s += 1000.0
    assert stats.sample(0.0).is_idle


# -- the plugin's entry point ----------------------------------------------------------------------


def test_the_entry_point_exists_only_while_registered():
    stats = VllmStats()
    assert entry_points() == []
    with stats.registered():
        assert receiver() is stats
        assert [point.value for point in entry_points()] == [
            "agft_ray.serve.vllm.plugin:TunerStatLogger"
        ]
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("no-such-distribution")
        stats.connect(0, has_details=True)
    assert receiver() is None
    assert entry_points() == []
    stats.sample(0.0)


def test_the_entry_point_goes_when_the_engine_fails_to_start():
    with pytest.raises(RuntimeError, match="out of memory"), VllmStats().registered():
        raise RuntimeError("out of memory")
    assert receiver() is None
    assert entry_points() == []


def test_two_engines_that_start_at_once_are_not_taken_for_one_another():
    first, second = VllmStats(), VllmStats()
    with first.registered():
        with second.registered():
            assert receiver() is first
        assert len(entry_points()) == 1
        first.connect(0, has_details=True)
    assert entry_points() == []
    first.sample(0.0)
    with pytest.raises(StaleMetricsError, match="another engine"):
        second.sample(0.0)


@pytest.mark.parametrize(
    ("allowed", "hint"),
    [
        ("others,more", "VLLM_PLUGINS is 'others,more'.*'agft_ray'"),
        ("", "VLLM_PLUGINS is ''.*'agft_ray'"),
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
    assert missing_fields(OldScheduler(), Iteration(), [*FINISHED_FIELDS, "other"]) == ""


def test_missing_fields_are_named():
    problem = missing_fields(object(), object(), ["latency"])
    named = [f"SchedulerStats.{name}" for name in SCHEDULER_FIELDS]
    named += [f"IterationStats.{name}" for name in ITERATION_FIELDS]
    named += [f"FinishedRequestStats.{name}" for name in FINISHED_FIELDS]
    assert problem.endswith(f" no {', '.join(named)}")


def test_a_prefix_cache_that_says_something_else_is_named():
    scheduler = Scheduler(prefix_cache_stats=SimpleNamespace(queries=0, found=0))
    problem = missing_fields(scheduler, Iteration(), FINISHED_FIELDS)
    assert problem.endswith(" no PrefixCacheStats.hits")


@dataclasses.dataclass
class TimelessDetails:
    """Iteration details of a vLLM that has renamed their time."""

    num_ctx_tokens: int = 0
    num_generation_tokens: int = 0
    elapsed_us: float = 0.0
    is_dummy: bool = False


@dataclasses.dataclass
class NeedyScheduler:
    """Statistics that cannot be made without arguments."""

    num_running_reqs: int


class NoDataclass:
    e2e_latency = 0.0


class Logger:
    """What vLLM's own base class asks of a stat logger, and more of a later one."""


@dataclasses.dataclass
class EngineArgs:
    enable_logging_iteration_details: bool = False


@pytest.fixture
def plugin_with(monkeypatch):
    """The plugin, loaded as if a vLLM with those classes were installed."""

    def load(*, without=None, arguments=EngineArgs, **classes):
        fakes = {
            "SchedulerStats": Scheduler,
            "IterationStats": Iteration,
            "FinishedRequestStats": Finished,
            "SchedulerIterationDetails": Details,
        } | classes
        fakes.pop(without, None)
        modules = {
            "vllm": {},
            "vllm.engine": {},
            "vllm.engine.arg_utils": {"AsyncEngineArgs": arguments},
            "vllm.v1": {},
            "vllm.v1.metrics": {},
            "vllm.v1.metrics.loggers": {"StatLoggerBase": Logger},
            "vllm.v1.metrics.stats": fakes,
        }
        for name, content in modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        for name in modules:
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])

    forget = "agft_ray.serve.vllm.plugin"
    monkeypatch.delitem(sys.modules, forget, raising=False)
    monkeypatch.delattr(importlib.import_module("agft_ray.serve.vllm"), "plugin", raising=False)
    yield load
    sys.modules.pop(forget, None)
    vars(importlib.import_module("agft_ray.serve.vllm")).pop("plugin", None)


def test_a_vllm_that_has_everything_is_found_to(plugin_with):
    plugin_with()
    assert look_at_vllm() == ("", True)


@pytest.mark.parametrize(
    "classes",
    [
        {"SchedulerStats": OldScheduler},  # its option only makes the engine's core log
        {"SchedulerIterationDetails": TimelessDetails},
        {"SchedulerIterationDetails": NoDataclass},
        {"without": "SchedulerIterationDetails"},
        {"arguments": object},
    ],
)
def test_a_vllm_that_does_not_time_its_steps_is_tuned_with_steps_of_unknown_class(
    plugin_with, classes
):
    plugin_with(**classes)
    assert look_at_vllm() == ("", False)
    stats = VllmStats()
    observability = SimpleNamespace(enable_logging_iteration_details=True)
    with stats.registered():
        logger = importlib.import_module("agft_ray.serve.vllm.plugin").TunerStatLogger(
            SimpleNamespace(observability_config=observability)
        )
    for _ in range(50):
        logger.record(OldScheduler(4), Iteration(0, 4, 0, [], [0.25] * 4))
    assert stats.sample(0.0).unknown_steps == StepTotals(50, 200, 12.5)


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        ({"without": "FinishedRequestStats"}, "FinishedRequestStats"),
        ({"SchedulerStats": NeedyScheduler}, "num_running_reqs"),
        ({"FinishedRequestStats": NoDataclass}, "dataclass"),
        ({"without": "SchedulerStats"}, "SchedulerStats"),
    ],
)
def test_a_vllm_of_another_shape_is_a_reason_to_observe_and_no_error(plugin_with, classes, named):
    plugin_with(**classes)
    problem, times_steps = look_at_vllm()
    assert named in problem
    assert not times_steps


def test_no_vllm_at_all_is_a_reason_as_well(plugin_with, monkeypatch):
    plugin_with()
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)
    problem, times_steps = look_at_vllm()
    assert "vllm.engine.arg_utils" in problem
    assert not times_steps


def test_the_loggers_last_word_is_not_spoken_at_exit(plugin_with):
    """A line of an error at the end of every replica, of an engine that has ended well."""
    plugin_with()
    stats = VllmStats()
    module = importlib.import_module("agft_ray.serve.vllm.plugin")
    with stats.registered():
        logger = module.TunerStatLogger(SimpleNamespace(observability_config=None))
    assert not logger._finalizer.atexit
    del logger
    with pytest.raises(StaleMetricsError, match="stat logger"):
        stats.sample(0.0)
