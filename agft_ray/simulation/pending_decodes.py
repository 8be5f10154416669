"""What a series of decode steps has done, before it is written to the sequences."""

from __future__ import annotations

from agft_ray.simulation.batch import DecodeSeries, Sequence
from agft_ray.simulation.kv_blocks import KvBlocks


class PendingDecodes:
    """The series of decode steps that all running sequences are in, if any, and how far it is.

    In a series all sequences advance alike, so that steps are only counted. Until `settle`, the
    sequences and the KV blocks are as they were when it started, and what is true of them is that
    plus the count: whoever looks at them settles first, or asks here.

    Args:
        running: the engine's own list, which may change only while nothing is pending.
        kv: where the sequences' blocks come from.
    """

    def __init__(self, running: list[Sequence], kv: KvBlocks) -> None:
        self._running, self._kv = running, kv
        self._series: DecodeSeries | None = None
        self._done, self._done_s = 0, 0.0
        """Steps that have ended since the start, and when the last one did."""
        self._in_step = False

    @property
    def left(self) -> DecodeSeries | None:
        """What of the series is still to be done; None if there is none."""
        return self._series and self._series.after(self._done)

    @property
    def is_over(self) -> bool:
        """All steps are done, or there is no series."""
        return self._series is None or self._done == self._series.steps

    @property
    def blocks(self) -> int:
        """KV blocks that the steps done and the one in progress take, and that are not allocated
        yet."""
        return self._kv.needed(self._running, self._done + self._in_step)

    def start(self, series: DecodeSeries | None) -> None:
        """Count the steps of this series from now on, once the last one is settled."""
        assert not self._done, "settle the last series first"
        self._series = series

    def begin_step(self) -> None:
        """The next step is in progress."""
        self._in_step = True

    def end_steps(self, steps: int, end_s: float) -> float:
        """So many more steps are done, the last one at `end_s`; returns the sum over sequences of
        the time since the token before them."""
        assert self._series is not None, "plan the series first"
        assert self._done + steps <= self._series.steps, "more than planned"
        sequences = len(self._running)
        if self._done:
            last_tokens_s = sequences * self._done_s
        else:
            last_tokens_s = sum(sequence.last_token_s for sequence in self._running)
        self._done, self._done_s, self._in_step = self._done + steps, end_s, False
        return sequences * end_s - last_tokens_s

    def settle(self) -> None:
        """Write what was done to the sequences and the KV blocks, and end the series."""
        assert not self._in_step, "a series' step is in progress"
        if self._done:
            for sequence in self._running:
                self._kv.allocate(sequence, sequence.computed + self._done)
                sequence.computed += self._done
                sequence.length += self._done
                sequence.last_token_s = self._done_s
        self._series, self._done = None, 0
