"""The KV cache: blocks that running sequences hold, and what the prefix cache keeps in the rest."""

from __future__ import annotations

from collections.abc import Iterable

from agft_ray.simulation.batch import Sequence
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.prefix_cache import PrefixCache
from agft_ray.workloads.requests import PREFIX_BLOCK_TOKENS


class KvBlocks:
    """Gives KV blocks to sequences as their tokens are computed, and takes them all back.

    Blocks that vLLM would share between prompts are counted once for each sequence that uses
    them. Raises `ValueError` if `config.kv_blocks` is absent: see `EngineConfig.for_model`.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.kv_blocks is None:
            raise ValueError("kv_blocks: must be set, got None; see EngineConfig.for_model")
        self.total = self.free = config.kv_blocks
        self._config = config
        self._size = config.block_size
        self.prefixes = PrefixCache(_ceil_div(PREFIX_BLOCK_TOKENS, self._size))

    def fits(self, tokens: int) -> bool:
        """Whether a sequence that holds nothing could get the blocks for so many tokens."""
        return _ceil_div(tokens, self._size) <= self.free

    def needed(self, sequences: Iterable[Sequence], steps: int) -> int:
        """How many more blocks so many decode steps of all the sequences take."""
        if not steps:
            return 0
        size, blocks = self._size, 0
        for sequence in sequences:
            missing = -((sequence.computed + steps) // -size) - sequence.blocks
            if missing > 0:
                blocks += missing
        return blocks

    def allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Have the sequence hold blocks for `tokens` in all; False, changing nothing, if there
        are not enough."""
        missing = _ceil_div(tokens, self._size) - sequence.blocks
        if missing > self.free:
            return False
        if missing > 0:
            sequence.blocks += missing
            self.free -= missing
            self.prefixes.shrink(self.free)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back. What the prefix cache could find in them, it may still find."""
        self.free += sequence.blocks
        assert self.free <= self.total
        self.prefixes.leave(sequence.prefix[: sequence.prefix_held])
        self.prefixes.shrink(self.free)
        sequence.blocks = sequence.prefix_held = 0

    def cached_tokens(self, sequence: Sequence) -> int:
        """How many leading tokens of the prompt the prefix cache holds, in whole KV blocks; one
        token at least is always computed.

        By the request's prefix blocks, or the configured share where it names none.
        """
        prompt_tokens = sequence.request.prompt_tokens
        if not sequence.request.prefix_blocks:
            return self._config.cached_tokens(prompt_tokens)
        tokens = self.prefixes.leading(sequence.prefix) * PREFIX_BLOCK_TOKENS
        return min(tokens, prompt_tokens - 1) // self._size * self._size

    def hold_prefix(self, sequence: Sequence) -> None:
        """Let others find what is computed of the prompt, in whole prefix blocks. Those of which
        even a part was found are held as well."""
        done = _ceil_div(sequence.cached, PREFIX_BLOCK_TOKENS)
        done = min(max(done, sequence.computed // PREFIX_BLOCK_TOKENS), len(sequence.prefix))
        if done > sequence.prefix_held:
            self.prefixes.use(sequence.prefix[sequence.prefix_held : done])
            sequence.prefix_held = done


def _ceil_div(tokens: int, size: int) -> int:
    return -(tokens // -size)
