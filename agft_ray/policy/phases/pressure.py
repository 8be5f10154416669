"""Signs that an engine cannot keep up, on which the highest clocks are needed at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.types import Window

HIGH_WAITING = 4.0
"""Requests that wait, in the mean of a window, from which on a longer queue is a growing one."""


class Pressure(BaseModel):
    """KV cache nearly full, preemptions, or a queue that grows; over only after calm windows."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    waiting: float = 0.0
    """In the window before."""
    calm: int = 1_000
    """Windows since the last sign."""

    def see(self, window: Window, config: PhasesConfig) -> None:
        """Take a window."""
        grows = window.waiting > max(HIGH_WAITING, self.waiting)
        full = window.kv_cache_usage > config.high_kv_cache_usage
        is_sign = grows or full or window.preemptions > 0
        self.calm = 0 if is_sign else min(self.calm + 1, 1_000)
        self.waiting = window.waiting

    def is_on(self, config: PhasesConfig) -> bool:
        """Whether there was a sign of late."""
        return self.calm < config.calm_windows
