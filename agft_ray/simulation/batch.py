"""What passes between an engine, its driver and its device: batches, tokens, steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agft_ray.simulation.physics import StepWork
from agft_ray.workloads.requests import PREFIX_BLOCK_TOKENS, Request, RequestTimings


class StepDevice(Protocol):
    """What runs an engine's steps: a GPU, in simulated seconds."""

    def begin_step(self, t_s: float, work: StepWork) -> float:
        """Start a step at `t_s`, or now if the device is past that; returns its predicted end."""
        ...

    def step_end_s(self) -> float | None:
        """The running step's end as known now: clock changes move it; None if none runs."""
        ...

    def finish_step(self) -> float:
        """Move to the running step's end and return it."""
        ...


class StepListener(Protocol):
    """Is told what an engine does, as a server is by its engine."""

    def on_arrival(self) -> None:
        """A prompt has come."""
        ...

    def on_step(self, pending_prompts: int) -> None:
        """A step has ended, or a series of decode steps; so many prompts have no token yet."""
        ...

    def on_empty(self) -> None:
        """Nothing runs and nothing waits."""
        ...


@runtime_checkable
class SeriesDevice(StepDevice, Protocol):
    """A device that can jump over a series of decode steps."""

    def run_series(
        self, t_s: float, work: StepWork, max_steps: int, until_s: float
    ) -> tuple[int, float]:
        """Run steps from `t_s` on, or from now if the device is past that, `work` being the first
        one's and each adding a token per sequence to the context.

        As many whole steps, at most `max_steps`, as end by `until_s` under the present clock;
        returns how many and the end of the last one.
        """
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine."""

    request: Request
    length: int
    """Tokens known: the prompt and what was generated."""
    prefix: tuple[int, ...] = ()
    """Ids of the prompt's whole prefix blocks."""
    prefix_held: int = 0
    """How many of these it has found or computed and holds."""
    cached: int = 0
    """Leading tokens of the prompt that the prefix cache held when it was admitted."""
    computed: int = 0
    """Tokens whose KV is held."""
    blocks: int = 0
    decoding: bool = False
    """All of `length` but the newest token is computed."""
    running: bool = False
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @classmethod
    def of(cls, request: Request) -> Sequence:
        """A request that has just come."""
        whole = request.prompt_tokens // PREFIX_BLOCK_TOKENS
        return cls(request, request.prompt_tokens, request.prefix_blocks[:whole])

    @property
    def remaining(self) -> int:
        """Output tokens still to come."""
        return self.request.prompt_tokens + self.request.output_tokens - self.length


@dataclass(frozen=True, slots=True)
class Batch:
    """One engine step: the tokens each sequence computes in it, and their sums."""

    scheduled: list[tuple[Sequence, int]]
    work: StepWork


@dataclass(frozen=True, slots=True)
class DecodeSeries:
    """Decode-only steps ahead in which nothing but the context changes: each adds a token to it
    for every sequence."""

    work: StepWork
    """The first step's."""
    steps: int
    """How many there can be, at least 1: until a sequence finishes or KV blocks run out."""

    def after(self, steps: int) -> DecodeSeries:
        """What is left of it after so many steps, which may be none."""
        work = self.work
        if not steps:
            return self
        context_tokens = work.context_tokens + steps * work.decode_sequences
        return DecodeSeries(StepWork(0, work.decode_sequences, context_tokens), self.steps - steps)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token."""

    request_id: str
    index: int
    """Place in the output, from 0."""
    t_s: float
    timings: RequestTimings | None = None
    """Of the whole request, with its last token."""
