"""vLLM's Prometheus text by generation of names; the files are FAKE texts with vLLM's names."""

import http.server
import importlib.util
import re
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from agft_ray.clock import ManualClock
from agft_ray.errors import StaleMetricsError
from agft_ray.serve.vllm.prometheus import (
    NAMES,
    OPTIONAL,
    VllmMetricsSource,
    engine_sample,
    missing,
)
from agft_ray.types import COUNTERS, EngineSample

TEXTS = Path(__file__).parent / "prometheus_texts"
ONE = EngineSample(
    t_s=5.0,
    running=3,
    waiting=1,
    kv_cache_usage=0.25,
    prompt_tokens=1000,
    generation_tokens=640,
    iterations=80,
    iteration_tokens=1640,
    ttft_sum_s=4.5,
    ttft_count=12,
    itl_sum_s=15.7,
    itl_count=628,
    e2e_sum_s=30.25,
    e2e_count=9,
    prefix_cache_queries=900,
    prefix_cache_hits=320,
    preemptions=2,
)
VERSIONS = ["v0.10", "v0.11", "v0.12", "v0.13", "v0.29"]


def lines(name):
    return (TEXTS / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("version", VERSIONS)
def test_each_generation_of_names(version):
    assert engine_sample(lines(version), t_s=5.0) == ONE
    assert missing(lines(version)) == []


def test_every_counter_but_those_of_steps_and_histograms_has_a_name():
    counters = [name for name in NAMES if name in COUNTERS]
    assert counters == [name for name in COUNTERS if not name.endswith(("_steps", "_histogram"))]


def times(factor):
    counters = {
        name: getattr(ONE, name) * factor for name in NAMES if name not in ("kv_cache_usage",)
    }
    return replace(ONE, **counters)


def test_engines_are_added_up_or_kept_apart():
    text = lines("v0.29_two_engines")
    assert engine_sample(text, t_s=5.0) == replace(times(3), kv_cache_usage=0.375)
    assert engine_sample(text, t_s=5.0, labels={"engine": "0"}) == ONE
    second = engine_sample(text, t_s=5.0, labels={"engine": "1", "model_name": "tiny"})
    assert second == replace(times(2), kv_cache_usage=0.5)
    with pytest.raises(StaleMetricsError):
        engine_sample(text, t_s=5.0, labels={"engine": "2"})


@pytest.mark.parametrize("quantity", sorted(set(NAMES) - OPTIONAL))
def test_what_one_of_two_engines_lacks_is_missing(quantity):
    lacking = f'{NAMES[quantity][0]}{{engine="1"'
    text = [line for line in lines("v0.29_two_engines") if not line.startswith(lacking)]
    with pytest.raises(StaleMetricsError, match=f"missing in vLLM's metrics: {quantity} "):
        engine_sample(text, t_s=5.0)
    assert engine_sample(text, t_s=5.0, labels={"engine": "0"}) == ONE


def test_an_idle_engine_reads_idle():
    sample = engine_sample(lines("v0.29_idle"), t_s=5.0)
    assert sample.is_idle
    assert sample.generation_tokens == 0


@pytest.mark.parametrize("quantity", sorted(set(NAMES) - OPTIONAL))
@pytest.mark.parametrize("fate", ["renamed", "removed", "nan", "inf", "negative", "no number"])
def test_what_is_missing_is_never_read_as_no_load(quantity, fate):
    name = NAMES[quantity][0]
    values = {"nan": "NaN", "inf": "+Inf", "negative": "-1.0", "no number": "much"}
    found = []
    for line in lines("v0.29"):
        if line.startswith(f"{name}{{"):
            if fate == "removed":
                continue
            labels = line.rpartition(" ")[0]
            line = f"{labels} {values[fate]}" if fate in values else line.replace(name, f"{name}_2")
        found.append(line)
    with pytest.raises(StaleMetricsError, match=f"{quantity} .*{name}"):
        engine_sample(found, t_s=5.0)
    assert missing(found) == [quantity]


@pytest.mark.parametrize("quantity", sorted(OPTIONAL))
def test_what_is_optional_may_be_missing(quantity):
    found = [line for line in lines("v0.29") if not line.startswith(NAMES[quantity][0])]
    assert engine_sample(found, t_s=5.0) == replace(ONE, **{quantity: 0})
    assert missing(found) == [quantity]


def test_rays_export_of_them_is_not_taken_for_them():
    text = [line.replace("vllm:", "ray_vllm_") for line in lines("v0.29")]
    with pytest.raises(StaleMetricsError, match="running"):
        engine_sample(text, t_s=5.0)


@pytest.mark.vllm
def test_the_installed_vllm_has_the_newest_names():
    found = importlib.util.find_spec("vllm").submodule_search_locations[0]
    source = Path(found, "v1", "metrics", "loggers.py").read_text()
    for names in NAMES.values():
        stem = names[0].removesuffix("_sum").removesuffix("_count")
        assert f'"{stem}"' in source or f'"{stem.removesuffix("_total")}"' in source


# -- the source ------------------------------------------------------------------------------------


class Fetch:
    """FAKE server: its answers one after the other, the last for ever."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), 0

    def __call__(self, url, timeout_s):
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def source():
    sources = []

    def make(fetch, **settings):
        settings = {"interval_s": 0.005, "clock": ManualClock(5.0)} | settings
        sources.append(VllmMetricsSource("http://engine/metrics", fetch=fetch, **settings))
        return sources[-1]

    yield make
    for each in sources:
        each.close()


def eventually(condition, timeout_s=5.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def sampled(source, t_s=5.0):
    try:
        return source.sample(t_s)
    except StaleMetricsError:
        return None


def why(source, t_s=5.0):
    with pytest.raises(StaleMetricsError) as stale:
        source.sample(t_s)
    return str(stale.value)


TEXT = "\n".join(lines("v0.29"))


def test_the_newest_scrape_with_the_time_it_began(source):
    one = source(Fetch(TEXT))
    eventually(lambda: sampled(one))
    assert one.sample(7.0) == ONE


def test_the_time_is_that_at_which_the_scrape_began(source):
    clock = ManualClock(5.0)

    def slow(url, timeout_s):
        clock.advance_to(6.5)
        return TEXT

    one = source(slow, clock=clock, interval_s=60.0)
    eventually(lambda: sampled(one))
    assert one.sample(6.5) == ONE


def test_labels_select_the_engine(source):
    two = "\n".join(lines("v0.29_two_engines"))
    one = source(Fetch(two), labels={"engine": "0"})
    eventually(lambda: sampled(one))
    assert one.sample(5.0) == ONE


def test_a_server_that_does_not_answer_is_stale_after_a_while(source):
    fetch = Fetch(TEXT, OSError("connection refused"))
    one = source(fetch, max_age_s=2.5)
    eventually(lambda: fetch.calls > 3)
    assert one.sample(7.5) == ONE
    with pytest.raises(StaleMetricsError, match=r"2\.6 s old: connection refused"):
        one.sample(7.6)


def test_a_server_that_recovers(source):
    fetch = Fetch(OSError("connection refused"), "vllm: nonsense {", TEXT)
    one = source(fetch, interval_s=0.2)
    with pytest.raises(StaleMetricsError, match="http://engine/metrics: "):
        one.sample(5.0)
    eventually(lambda: sampled(one))


def test_what_is_optional_and_missing_is_named_once(source, caplog):
    text = "\n".join(line for line in lines("v0.29") if "preemptions" not in line)
    fetch = Fetch(text)
    source(fetch)
    eventually(lambda: fetch.calls > 3)
    (record,) = caplog.records
    assert re.fullmatch("http://engine/metrics: .*: preemptions", record.getMessage())


def test_close_ends_the_thread(source):
    fetch = Fetch(TEXT)
    one = source(fetch)
    eventually(lambda: fetch.calls > 1)
    one.close()
    eventually(lambda: not any(t.name == "vllm-metrics" for t in threading.enumerate()))


@pytest.fixture
def server():
    """A local HTTP server of the text, and the event without which it does not answer."""
    answers = threading.Event()
    answers.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answers.wait(10.0)
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None  # clients that did not wait
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    answers.set()
    server.shutdown()
    server.server_close()


def test_a_server_that_stalls_is_stale_until_it_answers_again(server):
    url, answers = server
    one = VllmMetricsSource(f"{url}/metrics", interval_s=0.01, timeout_s=0.5, max_age_s=2.0)
    try:
        eventually(lambda: sampled(one, time.monotonic()))
        assert replace(one.sample(time.monotonic()), t_s=5.0) == ONE
        answers.clear()
        eventually(lambda: sampled(one, time.monotonic()) is None)
        with pytest.raises(StaleMetricsError, match=r"old: .*timed out"):
            one.sample(time.monotonic())
        answers.set()
        eventually(lambda: sampled(one, time.monotonic()))
    finally:
        one.close()


def test_a_wrong_path_is_named(server):
    one = VllmMetricsSource(f"{server[0]}/elsewhere", interval_s=0.01)
    try:
        eventually(lambda: "404" in why(one))
    finally:
        one.close()


def test_a_proxy_in_the_environment_is_not_asked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # the default one, made anew
    one = VllmMetricsSource(f"{server[0]}/metrics", interval_s=0.01)
    try:
        eventually(lambda: sampled(one, time.monotonic()))
    finally:
        one.close()
