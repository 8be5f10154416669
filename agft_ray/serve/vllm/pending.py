"""Which prompts wait for their first token: vLLM's front end sees them come, its statistics go."""

from __future__ import annotations

import time
from collections.abc import Callable

from agft_ray.simulation.batch import StepListener

FRUITLESS_STEPS = 3
"""Steps in a row that computed no prompt, with none waiting in the scheduler, after which one that
is counted as pending was aborted. One is on its way to the scheduler for a step or two."""
FRUITLESS_STEPS_UNTIMED = 50
"""The same of an engine that does not tell which steps compute prompts, before the last of them."""
ON_ITS_WAY_S = 1.0
"""How long a prompt may be on its way to an engine that is empty."""


class PendingPrompts:
    """Tells a switch of arrivals and steps. Belongs to the event loop of vLLM's front end."""

    def __init__(
        self, switch: StepListener, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._switch, self._now_s = switch, now_s
        self._pending = self._fruitless = 0
        self._arrived_s = 0.0

    def on_arrival(self) -> None:
        """A request has come to the front end."""
        self._pending, self._fruitless, self._arrived_s = self._pending + 1, 0, self._now_s()
        self._switch.on_arrival()

    def on_step(
        self, *, running: int, waiting: int, first_tokens: int, had_prefill: bool, is_timed: bool
    ) -> None:
        """vLLM has told of an iteration; `waiting` as its scheduler knows."""
        self._pending = max(self._pending - first_tokens, 0)
        is_fruitful = had_prefill or first_tokens > 0 or waiting > 0
        self._fruitless = 0 if is_fruitful else self._fruitless + 1
        if self._fruitless >= (FRUITLESS_STEPS if is_timed else FRUITLESS_STEPS_UNTIMED):
            self._pending = 0
        pending = max(self._pending, waiting)
        if running or pending:
            self._switch.on_step(pending)
        else:
            self._switch.on_empty()

    def settle(self, *, is_empty: bool) -> None:
        """To be called now and then: an empty engine tells nothing, and a prompt that never came to
        it was aborted."""
        if is_empty and self._pending and self._now_s() - self._arrived_s > ON_ITS_WAY_S:
            self._pending = 0
            self._switch.on_empty()
