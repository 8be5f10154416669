"""Requests to serve, generated: one settings class for each kind of workload; `docs/workloads.md`.

Every generator is an endless iterator in order of arrival; `until` ends it, `thin` keeps a share.
The n-th request's lengths depend on the seed and the length settings alone, not on the rate.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from agft_ray.config import Count, Positive, StrictModel, parse
from agft_ray.errors import ConfigError
from agft_ray.workloads import arrivals, lengths
from agft_ray.workloads.arrivals import WeeklyRate
from agft_ray.workloads.lengths import Lengths, lognormal
from agft_ray.workloads.requests import PREFIX_BLOCK_TOKENS, Request
from agft_ray.workloads.traces import find_trace

CONVERSATION_CV = 1.09
"""Coefficient of variation of the times between arrivals: that of the Azure 2023 conversation
trace (github.com/Azure/AzurePublicDataset, CC-BY 4.0)."""


class Workload(StrictModel):
    """Settings that every generator has. Arrivals are Poisson's unless a subclass says more."""

    rate_per_s: Positive
    """Mean arrivals per second."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of arrivals and lengths."""
    max_model_len: Annotated[int, Field(ge=2)] = 8192
    """Most tokens of a prompt and its output together: an output takes at most half of them, a
    prompt at most what the output leaves."""

    def requests(self) -> Iterator[Request]:
        """The workload, without end; raises `TraceError` for a file it needs and cannot read."""
        gaps, draws = np.random.default_rng(self.seed).spawn(2)
        times_s = self._arrivals_s(gaps)
        sizes = self._lengths().draw(draws)
        return (
            Request(str(number), t_s, prompt, output)
            for number, t_s, (prompt, output) in zip(
                itertools.count(1), times_s, sizes, strict=False
            )
        )

    def _arrivals_s(self, random: np.random.Generator) -> Iterator[float]:
        return arrivals.poisson(self.rate_per_s, random)

    def _lengths(self) -> Lengths:
        return Lengths(lengths.conversation_prompt, lengths.conversation_output, self.max_model_len)


class AnyLengths(Workload):
    """Lengths like the Azure 2023 conversation trace's, or of a median of your own."""

    prompt_tokens: Count | None = None
    """Median length of a prompt; if absent, prompts are the conversation trace's."""
    output_tokens: Count | None = None
    """Median length of an output; if absent, outputs are the conversation trace's."""
    length_sigma: Annotated[float, Field(ge=0, le=3)] = 0.0
    """Spread of the lengths given here: standard deviation of their logarithm (0: all equal)."""

    def _lengths(self) -> Lengths:
        prompt, output = self.prompt_tokens, self.output_tokens
        sigma = self.length_sigma
        return Lengths(
            lognormal(prompt, sigma) if prompt else lengths.conversation_prompt,
            lognormal(output, sigma) if output else lengths.conversation_output,
            self.max_model_len,
        )


class Conversation(Workload):
    """Chat requests like those of the Azure 2023 conversation trace, at any rate.

    Gamma-distributed gaps with the trace's coefficient of variation. Prompt and output lengths are
    drawn independently (the trace's rank correlation is 0.07).
    """

    def _arrivals_s(self, random: np.random.Generator) -> Iterator[float]:
        return arrivals.gamma(self.rate_per_s, CONVERSATION_CV, random)


class Poisson(AnyLengths):
    """Poisson arrivals."""


class GammaBurst(AnyLengths):
    """Arrivals in bursts: gamma-distributed gaps."""

    cv: Annotated[float, Field(gt=0, le=100)] = 3.0
    """Coefficient of variation of the gaps; 1 is Poisson."""

    def _arrivals_s(self, random: np.random.Generator) -> Iterator[float]:
        return arrivals.gamma(self.rate_per_s, self.cv, random)


class DayNight(AnyLengths):
    """A rate that follows the hours of a week, read from a file and scaled to `rate_per_s`."""

    rates: str
    """CSV with the columns hour_of_week and req_per_min_low, _mid, _high: a path, or a name in
    `$AGFT_RAY_DATA/traces`."""
    column: Literal["low", "mid", "high"] = "mid"
    """Which of the rates."""
    start_hour: Annotated[float, Field(ge=0, lt=arrivals.HOURS_A_WEEK)] = 0.0
    """The hour of the week at which it begins."""

    def _arrivals_s(self, random: np.random.Generator) -> Iterator[float]:
        rate = WeeklyRate.read(find_trace(self.rates), f"req_per_min_{self.column}")
        return rate.arrivals(self.rate_per_s, self.start_hour, random)


class _Prototype(Workload):
    """AGFT names five prototypes of load; we know no numbers of theirs, so these are our own."""

    prompt: ClassVar[tuple[int, float]]
    """Median tokens, standard deviation of their logarithm."""
    output: ClassVar[tuple[int, float]]
    """As `prompt`."""

    def _lengths(self) -> Lengths:
        return Lengths(lognormal(*self.prompt), lognormal(*self.output), self.max_model_len)


class NormalLoad(_Prototype):
    """Prompts of 512 tokens in the median, outputs of 192, Poisson arrivals."""

    prompt, output = (512, 0.8), (192, 0.7)


class LongContext(_Prototype):
    """Prompts of 4,096 tokens in the median, short outputs: prefill has most of the work."""

    prompt, output = (4096, 0.4), (128, 0.6)


class LongGeneration(_Prototype):
    """Outputs of 1,024 tokens in the median, short prompts: decode has nearly all of the work."""

    prompt, output = (256, 0.6), (1024, 0.5)


class HighConcurrency(_Prototype):
    """Short requests that arrive `group_size` at once, so that many run at the same time."""

    prompt, output = (256, 0.6), (192, 0.7)
    group_size: Count = 16
    """Requests that arrive together; `rate_per_s` stays the rate of single requests."""

    def _arrivals_s(self, random: np.random.Generator) -> Iterator[float]:
        return arrivals.groups(self.rate_per_s, self.group_size, random)


class HighCacheHit(_Prototype):
    """Prompts that begin with one of a few long texts, as system prompts or documents are.

    Before a question of its own (256 tokens in the median) each prompt has `shared_blocks` blocks
    in common with all others that begin with the same text; `Request.prefix_blocks` says so.
    """

    prompt, output = (256, 0.6), (192, 0.7)
    prefixes: Count = 8
    """How many texts there are, all equally frequent."""
    shared_blocks: Count = 4
    """Length of a text in blocks of 512 tokens."""

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        if self._shared_tokens > self.max_model_len // 2:
            raise ValueError(
                f"shared_blocks: {self.shared_blocks} blocks of {PREFIX_BLOCK_TOKENS} tokens must "
                f"fit half of max_model_len, which is {self.max_model_len}; lower it or raise that"
            )
        return self

    @property
    def _shared_tokens(self) -> int:
        return self.shared_blocks * PREFIX_BLOCK_TOKENS

    def requests(self) -> Iterator[Request]:
        """Without end, in order of arrival."""
        texts = np.random.default_rng(self.seed).spawn(3)[2]
        own_ids = itertools.count(self.prefixes * self.shared_blocks)
        for request in super().requests():
            first_id = int(texts.integers(self.prefixes)) * self.shared_blocks
            own_blocks = -(-request.prompt_tokens // PREFIX_BLOCK_TOKENS)
            yield dataclasses.replace(
                request,
                prompt_tokens=self._shared_tokens + request.prompt_tokens,
                prefix_blocks=(
                    *range(first_id, first_id + self.shared_blocks),
                    *itertools.islice(own_ids, own_blocks),
                ),
            )

    def _lengths(self) -> Lengths:
        room = self.max_model_len - self._shared_tokens
        return Lengths(lognormal(*self.prompt), lognormal(*self.output), room)


WORKLOADS: dict[str, type[Workload]] = {
    "conversation": Conversation,
    "poisson": Poisson,
    "gamma_burst": GammaBurst,
    "day_night": DayNight,
    "normal_load": NormalLoad,
    "long_context": LongContext,
    "long_generation": LongGeneration,
    "high_concurrency": HighConcurrency,
    "high_cache_hit": HighCacheHit,
}


def generate(
    name: str, *, rate_per_s: float, seed: int = 0, **parameters: Any
) -> Iterator[Request]:
    """The workload of this name, without end: see `WORKLOADS` for names and their settings.

    Raises `ConfigError` with every problem of the settings, and `TraceError` for a file they name.
    """
    workload = WORKLOADS.get(name)
    if workload is None:
        close = difflib.get_close_matches(name, WORKLOADS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; choose one of {_NAMES}"
        raise ConfigError("workload", [f"name: there is no {name!r}{hint}"])
    settings = {"rate_per_s": rate_per_s, "seed": seed} | parameters
    return parse(workload, settings, source=f"workload {name}").requests()


_NAMES = ", ".join(WORKLOADS)


def generate_conversation(rate_per_s: float, duration_s: float, seed: int) -> Iterator[Request]:
    """The workload `conversation` for so long; raises as `generate` and `until`."""
    return until(generate("conversation", rate_per_s=rate_per_s, seed=seed), duration_s)


def thin(requests: Iterable[Request], keep: float, seed: int) -> Iterator[Request]:
    """A random share `keep` (above 0, at most 1) of the requests, each decided by itself.

    Keeps a trace's burstiness better than stretching its time. What is kept of the first n
    requests does not depend on how many follow. Raises `ValueError` for any other `keep`.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: must be above 0 and at most 1, got {keep}")
    draws = np.random.default_rng(seed)
    return (request for request in requests if draws.random() < keep)


def until(requests: Iterable[Request], duration_s: float) -> Iterator[Request]:
    """The requests that arrive before `duration_s`; they must come in order of arrival.

    Raises `ValueError` unless the duration is positive.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s: must be above 0, got {duration_s}")
    return itertools.takewhile(lambda request: request.arrival_s < duration_s, requests)


def workload_name(trace: str | None, workload: str, rate_per_s: float) -> str:
    """How records name it: the trace's file name, or the generated workload and its rate."""
    return Path(trace).name if trace else f"{workload}@{rate_per_s:g}"
