"""The switch of a live engine: in the replica's process, beside the server and its statistics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from agft_ray.actors.phase_socket import PhaseSender, Told
from agft_ray.switch import Switch
from agft_ray.types import Phase

log = logging.getLogger(__name__)


class LiveSwitch:
    """Has the tuner's thread know what the engine does, within a millisecond.

    Nothing here waits, takes a lock, calls the GPU or raises; without a tuner nothing happens. All
    methods belong to the event loop of the engine's front end.
    """

    def __init__(self) -> None:
        self._switch = Switch()
        self._sender: PhaseSender | None = None
        self._is_broken = False
        self._since_s = time.monotonic()

    @property
    def phase(self) -> Phase:
        """What the tuner is told; the clock of prompts once something has gone wrong here."""
        return Phase.PREFILL if self._is_broken else self._switch.phase

    def connect(self, path: Path) -> None:
        """The tuner listens there, or will."""
        self._sender = PhaseSender(path)

    def on_arrival(self) -> None:
        """See `Switch.on_arrival`."""
        self._tell(self._switch.on_arrival)

    def on_step(self, pending_prompts: int) -> None:
        """See `Switch.on_step`."""
        self._tell(lambda: self._switch.on_step(pending_prompts))

    def on_empty(self) -> None:
        """See `Switch.on_empty`."""
        self._tell(self._switch.on_empty)

    def repeat(self) -> None:
        """Tell once more: the tuner may be a new one, or have been told too much at once."""
        if self._sender is not None:
            self._sender.send(Told(self.phase, self._since_s))

    def _tell(self, event: Callable[[], Phase | None]) -> None:
        try:
            if event() is not None:
                self._since_s = time.monotonic()
                self.repeat()
        except Exception:
            if not self._is_broken:
                log.exception("the switch is off, prompts and decodes have one clock")
            self._is_broken, self._since_s = True, time.monotonic()
