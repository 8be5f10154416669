"""The policy `activity`: the clock follows the GPU's activity, as GEOPM's agent `gpu_activity`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agft_ray.config import Count, Share, StrictModel
from agft_ray.policy.arms import midpoint, nearest
from agft_ray.policy.solo import SoloPolicy, SoloState
from agft_ray.types import Context, Decision, Outcome, Window


class ActivityConfig(StrictModel):
    """Settings of the policy `activity`."""

    name: Literal["activity"] = "activity"
    """The policy."""
    phi: Share = 0.5
    """GEOPM's GPU_PHI: from 0.5 to 1, the highest clock falls to the efficient one (energy);
    from 0.5 to 0, the efficient one rises to the highest (performance)."""
    efficient_mhz: Count | None = None
    """The efficient clock, from a characterisation of the GPU; None: halfway between its lowest
    and highest."""
    decode_activity: Share = 0.0
    """Activity of a step that only decodes: it waits for memory, so by default none."""


class ActivityState(SoloState):
    """What the policy remembers."""

    activity: float | None = None
    """Activity while busy, 0..1, of the last window; None: not known."""


class ActivityPolicy(SoloPolicy[ActivityState]):
    """`f = f_efficient + (f_max - f_efficient) * activity / utilisation`, clamped between the two.

    GEOPM's are this formula, what phi does to its two clocks, the highest clock where activity is
    not known, and the lowest clock after a while of idleness (github.com/geopm/geopm,
    src/GPUActivityAgent.cpp). GEOPM samples activity (the share of time SMs have work, less
    stalls) and utilisation from the GPU's own counters every 20 ms. Substitutes, since a window
    has no such counters: utilisation is the time in engine steps over the window's duration;
    activity is the time in steps that compute prompt tokens (compute-bound) over it. Steps of
    which the engine does not tell whether they do count as such. So the quotient is the
    compute-bound share of the busy time.
    """

    name = "activity"

    def __init__(self, config: ActivityConfig) -> None:
        super().__init__(config, ActivityState())
        self._config = config

    def select(self, context: Context, arms: Sequence[int]) -> Decision:
        """See `Policy.select`."""
        if not arms:
            return Decision(None, "no arms")
        efficient_mhz, highest_mhz = self._range(arms)
        activity = self.state.activity
        if activity is None:
            return Decision(nearest(sorted(arms), highest_mhz), "unknown")
        clock_mhz = efficient_mhz + (highest_mhz - efficient_mhz) * activity
        return Decision(nearest(sorted(arms), clock_mhz), "activity")

    def _range(self, arms: Sequence[int]) -> tuple[float, float]:
        """The efficient and the highest clock once phi has moved one towards the other."""
        highest = max(arms)
        efficient = min(self._config.efficient_mhz or midpoint(arms), highest)
        span, bias = highest - efficient, (self._config.phi - 0.5) / 0.5
        return efficient + span * max(0.0, -bias), highest - span * max(0.0, bias)

    def select_idle(self, arms: Sequence[int]) -> Decision:
        """See `Policy.select_idle`."""
        return Decision(min(arms, default=None), "idle")

    def _learn(self, outcome: Outcome) -> None:
        self.state.activity = self._activity(outcome.window)

    def _activity(self, window: Window) -> float | None:
        compute_s = window.prefill_steps.time_s + window.unknown_steps.time_s
        busy_s = compute_s + window.decode_steps.time_s
        if busy_s <= 0:
            return None
        active_s = compute_s + self._config.decode_activity * window.decode_steps.time_s
        return active_s / busy_s

    def status(self) -> dict[str, Any]:
        """Figures for people."""
        return {"phase": "activity", "activity": self.state.activity}
