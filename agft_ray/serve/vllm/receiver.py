"""Who is told by the vLLM engine that starts now in this process."""

from __future__ import annotations

from typing import Any, Protocol


class Receiver(Protocol):
    """What vLLM's stat loggers tell; `VllmStats` is one. None of these raises."""

    def connect(self, engine_index: int, *, has_details: bool) -> None:
        """An engine will report under this index; `has_details` if it times its iterations."""
        ...

    def disconnect(self) -> None:
        """No more will be reported."""
        ...

    def record(self, scheduler: Any, iteration: Any, engine_index: int) -> None:
        """Add one iteration of an engine."""
        ...


_receiver: Receiver | None = None


def receiver() -> Receiver | None:
    """Whoever is to be told, if anyone is."""
    return _receiver


def set_receiver(new: Receiver | None) -> None:
    """From now on this one is told; None: nobody."""
    global _receiver
    _receiver = new
