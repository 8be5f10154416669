"""What a prefix cache holds: blocks of prompts, by hash id, as long as their room is not needed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence


class PrefixCache:
    """Blocks of prompts whose KV is held, by the ids of `Request.prefix_blocks`.

    A block is in use as long as a sequence that computed or found it runs, and cannot be evicted
    then. Afterwards its content stays in KV space that is free, until that is needed: the least
    recently used block goes first, of one prompt the last block first, as in vLLM.

    Room is counted in KV blocks, `kv_blocks_per_block` for one of ours. A block in use takes none
    here: the sequences that use it have their own KV blocks, each its own.
    """

    def __init__(self, kv_blocks_per_block: int) -> None:
        self._kv_blocks_per_block = kv_blocks_per_block
        self._in_use: Counter[int] = Counter()
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        """How many blocks it holds."""
        return len(self._in_use) + len(self._unused)

    def leading(self, blocks: Sequence[int]) -> int:
        """How many of the blocks, from the first on without a gap, it holds."""
        for count, block in enumerate(blocks):
            if block not in self._in_use and block not in self._unused:
                return count
        return len(blocks)

    def use(self, blocks: Sequence[int]) -> None:
        """A sequence has found or computed these blocks; it must `leave` them later."""
        for block in blocks:
            self._in_use[block] += 1
            self._unused.pop(block, None)

    def leave(self, blocks: Sequence[int]) -> None:
        """A sequence that used these blocks, in the order of its prompt, is gone."""
        for block in reversed(blocks):
            self._in_use[block] -= 1
            if not self._in_use[block]:
                del self._in_use[block]
                self._unused[block] = None

    def shrink(self, free_kv_blocks: int) -> None:
        """Evict until what is not in use fits into so many KV blocks."""
        room = free_kv_blocks // self._kv_blocks_per_block
        while len(self._unused) > room:
            self._unused.popitem(last=False)

    def unused(self) -> Iterator[int]:
        """The blocks that may be evicted, in this order."""
        return iter(self._unused)
