"""A request of a workload, and what it experienced."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX_BLOCK_TOKENS = 512
"""Tokens in one of the blocks of a prompt that `Request.prefix_blocks` names."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload: when it arrives and how long its prompt and output are."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()
    """Hash ids of the prompt's successive blocks of `PREFIX_BLOCK_TOKENS` tokens (Mooncake's
    `hash_ids`): equal leading ids mean an equal prefix. Empty: nothing is known of it."""


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """What a finished request experienced, on the clock of whoever measured it."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    e2e_s: float

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)
