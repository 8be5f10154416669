"""Pressure: signs that an engine needs all there is, whatever its policy says."""

from __future__ import annotations

from agft_ray.settings import TunerConfig
from agft_ray.types import Window


class Pressure:
    """KV cache nearly full, preemptions, or a queue that grows.

    It ends after `calm_windows` windows in a row without a sign, as which then a queue counts that
    is long, though it grows no more: else clocks would fall, the queue grow again, and so on. An
    empty engine ends it at once.
    """

    def __init__(self) -> None:
        self.is_on = False
        """Default clocks are needed."""
        self._waiting, self._calm = 0.0, 0

    def see(self, window: Window, config: TunerConfig) -> None:
        """Take a window, of whatever clocks."""
        is_long = window.waiting > config.long_queue
        grows = is_long and (self.is_on or window.waiting > self._waiting)
        full = window.kv_cache_usage > config.high_kv_cache_usage
        self._calm = 0 if grows or full or window.preemptions else self._calm + 1
        calm_for = 0 if window.is_idle else config.calm_windows
        self.is_on = self._calm == 0 or (self.is_on and self._calm < calm_for)
        self._waiting = window.waiting
