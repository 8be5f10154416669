"""Mutable counters an engine keeps, and the frozen sample they are read out as."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from agft_ray.types import (
    BUCKETS_PER_DECADE,
    LATENCY_BUCKETS,
    EngineSample,
    Histogram,
    StepTotals,
    counters_of,
)


@dataclass(slots=True)
class _StepCounter:
    steps: int = 0
    tokens: int = 0
    time_s: float = 0.0
    _totals: StepTotals = field(default_factory=StepTotals)

    def totals(self) -> StepTotals:
        if self._totals.steps != self.steps:  # of three counters one or two stand still
            self._totals = StepTotals(self.steps, self.tokens, self.time_s)
        return self._totals


@dataclass(slots=True)
class _LatencyCounter:
    counts: list[int] = field(default_factory=lambda: [0] * LATENCY_BUCKETS)
    _histogram: Histogram | None = field(default_factory=Histogram)

    def add(self, latency_s: float) -> None:
        decades = math.log10(max(latency_s, 1e-3)) + 3.0
        self.counts[min(int(decades * BUCKETS_PER_DECADE), LATENCY_BUCKETS - 1)] += 1
        self._histogram = None

    def histogram(self) -> Histogram:
        if self._histogram is None:
            self._histogram = Histogram(tuple(self.counts))
        return self._histogram


@dataclass(slots=True)
class EngineStats:
    """Cumulative statistics of an LLM engine: call the `on_*` methods, read with `sample`.

    It has every one of `EngineCounters`, which is frozen: `sample` fails where one is lacking.
    Not thread-safe: keep it on the thread (or event loop) that runs the engine.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    iterations: int = 0
    iteration_tokens: int = 0
    ttft_sum_s: float = 0.0
    ttft_count: int = 0
    itl_sum_s: float = 0.0
    itl_count: int = 0
    e2e_sum_s: float = 0.0
    e2e_count: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    _decode: _StepCounter = field(default_factory=_StepCounter)
    _prefill: _StepCounter = field(default_factory=_StepCounter)
    _unknown: _StepCounter = field(default_factory=_StepCounter)
    _ttft: _LatencyCounter = field(default_factory=_LatencyCounter)
    _tpot: _LatencyCounter = field(default_factory=_LatencyCounter)
    _e2e: _LatencyCounter = field(default_factory=_LatencyCounter)

    def on_step(self, *, prefill_tokens: int, decode_tokens: int, time_s: float) -> None:
        """One engine iteration; it is a step with prefill if it computed any prompt token."""
        counter = self._prefill if prefill_tokens else self._decode
        self._count(counter, prefill_tokens + decode_tokens, time_s)

    def on_decode_steps(
        self, *, steps: int, sequences: int, time_s: float, itl_sum_s: float
    ) -> None:
        """Iterations in a row, together, each with one token (not the first) for every one of the
        same sequences."""
        counter, tokens = self._decode, steps * sequences
        self.iterations += steps
        self.iteration_tokens += tokens
        counter.steps += steps
        counter.tokens += tokens
        counter.time_s += time_s
        self.generation_tokens += tokens
        self.itl_count += tokens
        self.itl_sum_s += itl_sum_s

    def on_unknown_step(self, *, tokens: int, time_s: float) -> None:
        """One engine iteration of which it is not known whether it computed prompt tokens."""
        self._count(self._unknown, tokens, time_s)

    def _count(self, counter: _StepCounter, tokens: int, time_s: float) -> None:
        self.iterations += 1
        self.iteration_tokens += tokens
        counter.steps += 1
        counter.tokens += tokens
        counter.time_s += time_s

    def on_prompt(self, *, tokens: int, cached_tokens: int = 0) -> None:
        """A prompt of `tokens` was scheduled, `cached_tokens` of them found in the prefix cache."""
        self.prompt_tokens += tokens
        self.prefix_cache_queries += tokens
        self.prefix_cache_hits += cached_tokens

    def on_first_token(self, *, ttft_s: float) -> None:
        """A request got its first token."""
        self.generation_tokens += 1
        self.on_ttft(ttft_s)

    def on_ttft(self, ttft_s: float) -> None:
        """The same where tokens are counted otherwise."""
        self.ttft_sum_s += ttft_s
        self.ttft_count += 1
        self._ttft.add(ttft_s)

    def on_token(self, *, itl_s: float) -> None:
        """A token after the first, `itl_s` after the one before."""
        self.generation_tokens += 1
        self.itl_sum_s += itl_s
        self.itl_count += 1

    def on_finish(self, *, e2e_s: float, tpot_s: float | None = None) -> None:
        """A request is finished; `tpot_s` is its own mean, None where it had one token only."""
        self.e2e_sum_s += e2e_s
        self.e2e_count += 1
        self._e2e.add(e2e_s)
        if tpot_s is not None:
            self._tpot.add(tpot_s)

    def on_preemption(self) -> None:
        """A sequence lost its KV blocks to others."""
        self.preemptions += 1

    def sample(
        self, *, t_s: float, running: int, waiting: int, kv_cache_usage: float
    ) -> EngineSample:
        """The counters as they stand, with the gauges of this moment."""
        return EngineSample(
            *counters_of(self),
            t_s=t_s,
            running=running,
            waiting=waiting,
            kv_cache_usage=kv_cache_usage,
        )

    @property
    def decode_steps(self) -> StepTotals:
        """Steps that computed no prompt token."""
        return self._decode.totals()

    @property
    def prefill_steps(self) -> StepTotals:
        """Steps that computed prompt tokens, and perhaps others."""
        return self._prefill.totals()

    @property
    def unknown_steps(self) -> StepTotals:
        """Steps of which it is not known whether they computed prompt tokens."""
        return self._unknown.totals()

    @property
    def ttft_histogram(self) -> Histogram:
        """Times to first token."""
        return self._ttft.histogram()

    @property
    def tpot_histogram(self) -> Histogram:
        """Times per output token of finished requests."""
        return self._tpot.histogram()

    @property
    def e2e_histogram(self) -> Histogram:
        """Times of finished requests."""
        return self._e2e.histogram()
