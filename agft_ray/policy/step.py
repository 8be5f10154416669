"""What a step governor is: a choice before every engine step, not once a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agft_ray.types import Arm


@dataclass(frozen=True, slots=True)
class StepSample:
    """What a step governor is handed before an engine step: the step about to run, the queue, and
    how the step before went."""

    t_s: float
    prefill_tokens: int
    """Prompt tokens the step will compute; 0 for a step that only decodes."""
    decode_sequences: int
    """Sequences that will get their next token."""
    context_tokens: int
    """Tokens in the KV caches of the decoding sequences, summed."""
    waiting: int
    kv_cache_usage: float
    """Share of KV blocks in use, 0..1."""
    last_step_s: float | None = None
    """Duration of the step before, if there was one since the engine was last empty."""
    last_sm_clock_mhz: int | None = None
    """The effective SM clock under which it ran."""

    @property
    def has_prefill(self) -> bool:
        """The step computes prompt tokens."""
        return self.prefill_tokens > 0


class StepGovernor(Protocol):
    """Chooses an SM clock for the engine step about to run.

    It lives beside the engine's scheduler, so it knows the batch before it runs; it sees plain
    frozen values only, and is deterministic. `arms` is the ascending list of clocks the GPU
    supports within the configured bounds. A choice acts some 25 ms later, so on short steps it
    serves the steps that follow.
    """

    @property
    def name(self) -> str:
        """Under which it is told of."""
        ...

    def choose(self, step: StepSample, arms: Sequence[int]) -> Arm:
        """The clock for this step; called before each one. May remember what it was handed."""
        ...

    def choose_idle(self, arms: Sequence[int]) -> Arm:
        """The clock while the engine is empty."""
        ...

    def observe(self, step: StepSample, *, duration_s: float, sm_clock_mhz: int) -> None:
        """Learn how long the step took, and under which effective clock. Raises `ValueError`,
        changing nothing, unless both are finite and above 0.
        """
        ...

    def status(self) -> dict[str, Any]:
        """For people: phase, choices and the like, as JSON-able values."""
        ...


def check_observation(duration_s: float, sm_clock_mhz: int) -> None:
    """Raise `ValueError` unless both are finite and above 0."""
    for name, value in (("duration_s", duration_s), ("sm_clock_mhz", sm_clock_mhz)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}, it must be finite and above 0; skip this step")
