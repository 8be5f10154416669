"""Settings of the simulated engine."""

from __future__ import annotations

import math
from typing import Self

from pydantic import model_validator

from agft_ray.config import Count, Share, StrictModel, parse
from agft_ray.simulation.profiles import ModelProfile

PROFILE_BLOCK_TOKENS = 16
"""Tokens in one of the KV blocks that `ModelProfile.kv_blocks` counts."""


class EngineConfig(StrictModel):
    """Settings of the engine, named as vLLM's."""

    max_num_seqs: Count = 128
    """Most sequences running at once."""
    max_num_batched_tokens: Count = 2048
    """Most tokens computed in one step."""
    block_size: Count = 16
    """Tokens in a KV block."""
    kv_blocks: Count | None = None
    """KV blocks on the GPU; if absent, what the model's profile says."""
    max_model_len: Count = 8192
    """Most tokens of a prompt and its output together."""
    prefix_hit_share: Share = 0.0
    """Share of each prompt found in the prefix cache, in whole blocks; one token at least is
    always computed."""

    @model_validator(mode="after")
    def _check_crossed_values(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} must be at least "
                f"max_num_seqs, which is {self.max_num_seqs}; raise it or lower max_num_seqs"
            )
        if self.kv_blocks is not None and self.kv_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"kv_blocks: {self.kv_blocks} blocks of block_size {self.block_size} hold "
                f"{self.kv_blocks * self.block_size} tokens and must hold max_model_len, which is "
                f"{self.max_model_len}; raise kv_blocks or lower max_model_len"
            )
        return self

    def cached_tokens(self, prompt_tokens: int) -> int:
        """How many leading tokens of a prompt the prefix cache holds."""
        # The small addend keeps products such as 0.57 * 1600 from falling below a whole block.
        hits = math.floor(self.prefix_hit_share * prompt_tokens / self.block_size + 1e-9)
        return min(hits, (prompt_tokens - 1) // self.block_size) * self.block_size

    def for_model(self, model: ModelProfile) -> EngineConfig:
        """These settings with `kv_blocks` taken from the model's profile if absent.

        Raises `ConfigError` if those blocks do not hold `max_model_len`.
        """
        if self.kv_blocks is not None:
            return self
        blocks = model.kv_blocks * PROFILE_BLOCK_TOKENS // self.block_size
        return parse(EngineConfig, self.model_dump() | {"kv_blocks": blocks}, source="engine")
