"""When default clocks are kept whatever the policy says: what the loop has seen of late."""

from __future__ import annotations

from agft_ray.policy.reward import Reward
from agft_ray.pressure import Pressure
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.status import TunerState
from agft_ray.types import THROTTLED, Window


class FailSafe:
    """Counts windows in a row that were blind, empty or beyond an SLO, and sees pressure."""

    def __init__(self) -> None:
        self.idle = 0
        """Empty windows in a row."""
        self.is_throttled = False
        """The last window is no evidence, as the GPU slowed itself down."""
        self._blind = self._beyond_slo = self._cooldown = 0
        self._pressure = Pressure()

    @property
    def is_pressed(self) -> bool:
        """The engine needs all there is."""
        return self._pressure.is_on

    def forget(self) -> None:
        """Begin to count anew: clocks have been reset."""
        self.idle = self._blind = self._beyond_slo = 0

    def see(
        self, window: Window | None, config: TunerConfig, reward: Reward, *, interrupted: bool
    ) -> None:
        """Take a window, or that there was none; one cut short on purpose is not blindness."""
        self.is_throttled = window is not None and bool(window.event_reasons & THROTTLED)
        if not interrupted:
            self._blind = self._blind + 1 if window is None or self.is_throttled else 0
        self.idle = self.idle + 1 if window is not None and window.is_idle else 0
        if window is not None:
            self._beyond_slo = self._beyond_slo + 1 if reward.violates_slo(window) else 0
            self._pressure.see(window, config)

    def reason(
        self, config: TunerConfig, *, cut_off: bool, holdout: bool, at_default: bool
    ) -> TunerState | None:
        """Why default clocks are kept: the first reason that holds. To be asked once a window, as
        a cooldown grows shorter by it."""
        cannot_know = self._blind >= config.stale_windows or cut_off
        too_slow = self._beyond_slo >= config.slo_windows
        if cannot_know and self.is_throttled:
            self._cooldown = config.cooldown_windows
        elif not cannot_know and too_slow and not at_default:
            self._beyond_slo, self._cooldown = 0, config.cooldown_windows
        reasons = (
            (cannot_know and self.is_throttled, TunerState.THROTTLED),
            (cannot_know, TunerState.BLIND),
            (self._cooldown > 0, TunerState.COOLDOWN),
            (holdout, TunerState.HOLDOUT),
        )
        found = next((state for holds, state in reasons if holds), None)
        if found is TunerState.COOLDOWN:
            self._cooldown -= 1
        return found
