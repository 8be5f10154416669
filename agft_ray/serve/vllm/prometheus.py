"""vLLM's statistics from its Prometheus text, for engines in another process."""

from __future__ import annotations

import logging
import math
import threading
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from agft_ray.clock import Clock, WallClock
from agft_ray.errors import StaleMetricsError
from agft_ray.telemetry.prometheus_text import read_series
from agft_ray.types import EngineSample

log = logging.getLogger(__name__)

NAMES: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    # gpu_cache_usage_perc until 0.9.1, beside the new name in 0.10, hidden from 0.11 on.
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "generation_tokens": ("vllm:generation_tokens_total",),
    "iterations": ("vllm:iteration_tokens_total_count",),
    "iteration_tokens": ("vllm:iteration_tokens_total_sum",),
    "ttft_sum_s": ("vllm:time_to_first_token_seconds_sum",),
    "ttft_count": ("vllm:time_to_first_token_seconds_count",),
    # time_per_output_token_seconds, of each token as well, until 0.10; beside the new name in 0.11,
    # hidden from 0.12 on.
    "itl_sum_s": (
        "vllm:inter_token_latency_seconds_sum",
        "vllm:time_per_output_token_seconds_sum",
    ),
    "itl_count": (
        "vllm:inter_token_latency_seconds_count",
        "vllm:time_per_output_token_seconds_count",
    ),
    "e2e_sum_s": ("vllm:e2e_request_latency_seconds_sum",),
    "e2e_count": ("vllm:e2e_request_latency_seconds_count",),
    # As kv_cache_usage: gpu_prefix_cache_* until 0.9.1, beside the new names in 0.10.
    "prefix_cache_queries": (
        "vllm:prefix_cache_queries_total",
        "vllm:gpu_prefix_cache_queries_total",
    ),
    "prefix_cache_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    "preemptions": ("vllm:num_preemptions_total",),
}
"""What vLLM 0.10 to 0.32 calls each quantity in `/metrics`, the newest name first."""

OPTIONAL = frozenset({"prefix_cache_queries", "prefix_cache_hits", "preemptions"})
"""Read as none where they are missing: no clock is judged by them."""
_KNOWN = frozenset(name for names in NAMES.values() for name in names)

MAX_TEXT_BYTES = 16 << 20
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""An engine is near; a proxy in the environment is for what is far."""


def engine_sample(
    lines: Iterable[str], *, t_s: float, labels: Mapping[str, str] | None = None
) -> EngineSample:
    """The statistics in vLLM's own Prometheus text (names `vllm:...`), as of `t_s`.

    Counters, running and waiting requests are added up over all engines (label `engine`) and
    models in the text; KV cache usage is the engines' mean. `labels` takes only series that have
    those, which keeps data-parallel engines apart: `{"engine": "1"}`. The text does not tell steps
    apart, nor how long they took, so all `StepTotals` are empty.

    Raises `StaleMetricsError` naming every quantity that is missing (or no finite, non-negative
    number), with every name it was looked for under: a renamed metric is never read as no load.
    Those of `OPTIONAL` are 0 instead, see `missing`. Ray's export of vLLM's metrics (`ray_vllm_*`)
    is not read: there counters are absent until they count, and gauges while an engine is idle.
    """
    values = _values(lines, labels or {})
    gone = [quantity for quantity in NAMES if quantity not in values and quantity not in OPTIONAL]
    if gone:
        looked = "; ".join(f"{quantity} ({' or '.join(NAMES[quantity])})" for quantity in gone)
        raise StaleMetricsError(f"missing in vLLM's metrics: {looked}")
    sums = {q: math.fsum(values.get(q, ())) for q in NAMES}
    kv_cache_usage = sums.pop("kv_cache_usage") / len(values["kv_cache_usage"])
    numbers = {q: value if q.endswith("_s") else round(value) for q, value in sums.items()}
    return EngineSample(t_s=t_s, kv_cache_usage=kv_cache_usage, **numbers)  # type: ignore[arg-type]


def missing(lines: Iterable[str]) -> list[str]:
    """The quantities that are in none of vLLM's series, the optional ones as well."""
    values = _values(lines, {})
    return [quantity for quantity in NAMES if quantity not in values]


def _values(lines: Iterable[str], labels: Mapping[str, str]) -> dict[str, list[float]]:
    """Each engine's value, by quantity, under the newest of its names that is there.

    Without those that some engine lacks: its share would be read as none.
    """
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for name, tags, value in read_series(lines, _KNOWN):
        if all(tags.get(label) == wanted for label, wanted in labels.items()):
            found.setdefault(name, {})[frozenset(tags.items())] = value
    chosen = {q: next((n for n in names if n in found), "") for q, names in NAMES.items()}
    engines = {engine for name in chosen.values() if name for engine in found[name]}
    return {
        quantity: list(found[name].values())
        for quantity, name in chosen.items()
        if name and found[name].keys() == engines and all(map(_is_amount, found[name].values()))
    }


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0


@dataclass(frozen=True, slots=True)
class _Scrape:
    sample: EngineSample | None
    error: str


class VllmMetricsSource:
    """The newest statistics of a vLLM server, read from its `/metrics` in a thread of its own.

    ```python
    source = VllmMetricsSource("http://127.0.0.1:8000/metrics")
    tuner = attach_tuner(source.sample, gpu=NvmlGpuConfig(), engine_model="...")
    ```

    Args:
        url: of the metrics.
        interval_s: wall time between scrapes. One takes vLLM some 10 ms; windows should be several
            intervals long.
        timeout_s: wall time after which a scrape counts as failed.
        max_age_s: age from which the newest statistics are stale, on `clock`.
        labels: as of `engine_sample`.
        clock: the tuner's; the default is that of tuners on real GPUs.
        fetch: how the text is got, for tests; raises `OSError`.
    """

    def __init__(
        self,
        url: str,
        *,
        interval_s: float = 0.5,
        timeout_s: float = 2.0,
        max_age_s: float = 5.0,
        labels: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        fetch: Callable[[str, float], str] | None = None,
    ) -> None:
        self._url, self._interval_s, self._timeout_s = url, interval_s, timeout_s
        self._max_age_s, self._labels = max_age_s, labels
        self._clock = clock or WallClock()
        self._fetch = fetch or _fetch
        self._newest = _Scrape(None, "nothing was read yet")
        self._named = False
        self._closed = threading.Event()
        threading.Thread(target=self._poll, name="vllm-metrics", daemon=True).start()

    def sample(self, t_s: float) -> EngineSample:
        """The newest statistics; their `t_s` is when their scrape began, not the given one.

        Raises `StaleMetricsError`, saying why, if at `t_s` there are none younger than `max_age_s`.
        """
        newest = self._newest
        if newest.sample is None:
            raise StaleMetricsError(f"{self._url}: {newest.error}")
        age_s = t_s - newest.sample.t_s
        if age_s > self._max_age_s:
            why = f": {newest.error}" if newest.error else ""
            raise StaleMetricsError(f"{self._url}: the newest metrics are {age_s:.1f} s old{why}")
        return newest.sample

    def close(self) -> None:
        """End the thread, within an interval and a timeout."""
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.wait(0.0):
            self._newest = self._scrape()
            self._closed.wait(self._interval_s)

    def _scrape(self) -> _Scrape:
        t_s = self._clock.now_s()
        try:
            lines = self._fetch(self._url, self._timeout_s).splitlines()
            sample = engine_sample(lines, t_s=t_s, labels=self._labels)
        except Exception as error:  # whatever a server sends must not end the thread
            return _Scrape(self._newest.sample, str(error) or repr(error))
        if not self._named and (optional := missing(lines)):
            log.warning("%s: not there, read as none: %s", self._url, ", ".join(optional))
        self._named = True
        return _Scrape(sample, "")


def _fetch(url: str, timeout_s: float) -> str:
    with _DIRECT.open(url, timeout=timeout_s) as answer:
        return str(answer.read(MAX_TEXT_BYTES).decode("utf-8", "replace"))
