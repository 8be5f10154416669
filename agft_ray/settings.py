"""A tuner's settings: what `user_config` of a tuned deployment holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from agft_ray.config import Count, NonNegative, Positive, Share, StrictModel
from agft_ray.policy.baselines.fixed import FixedConfig
from agft_ray.policy.baselines.pair import PairConfig
from agft_ray.policy.goals import Goals, Objective, Statistic
from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.registry import PolicyConfig
from agft_ray.telemetry.energy_weight import EnergyWeightConfig
from agft_ray.types import Actuator

MIN_PUSH_INTERVAL_S, MAX_PUSH_INTERVAL_S = 0.1, 0.25
"""Wall time between pushes of engine statistics from the replica to its tuner: each costs either
about 2 ms of a core; and a replica that is silent for seconds is taken to hang."""
PUSHES_PER_WINDOW, MIN_PUSHES_PER_WINDOW = 8, 2
STALE_AFTER_S = 2.0
STALE_PUSHES = 5


class SloConfig(StrictModel):
    """Latencies that should not be exceeded, in seconds of the engine's clock."""

    ttft_s: Positive | None = None
    """Time to first token."""
    tpot_s: Positive | None = None
    """Time per output token."""
    e2e_s: Positive | None = None
    """Time of a whole request."""
    statistic: Statistic = "mean"
    """What of them should not: their mean, or their 99th percentile over requests."""

    @model_validator(mode="after")
    def _plausible(self) -> SloConfig:
        for name, longest_s in (("ttft_s", 600), ("tpot_s", 600), ("e2e_s", 36_000)):
            value = getattr(self, name)
            if value is not None and value > longest_s:
                raise ValueError(
                    f"{name} is {value:g} s, more than {longest_s / 60:g} minutes; it is in "
                    f"seconds, did you mean {value / 1000:g}?"
                )
        return self


class TunerConfig(StrictModel):
    """How a replica's frequency tuner works. All of it may be changed on live replicas."""

    mode: Literal["off", "observe", "control"] = "control"
    """off: no tuner work at all; observe: measure and recommend; control: set SM clocks."""
    policy: PolicyConfig = Field(default_factory=PhasesConfig)
    """Which policy chooses the clock, and its parameters."""
    objective: Objective | None = None
    """What is to be least: energy x latency^m with m = 0, 1 or 2. None: the policy's own, which is
    `energy` of `phases`, and `edp` of all that learn from rewards."""
    bound: Annotated[float, Field(gt=0, le=1)] = 0.10
    """How much longer mean TTFT, TPOT and E2E may be than at default clocks, as a share, for
    policies that can tell."""
    slo: SloConfig = Field(default_factory=SloConfig)
    """Bounds in seconds, each in the place of its relative one; beyond them a window is penalised,
    and a lasting violation resets clocks."""
    energy_weight: EnergyWeightConfig | None = None
    """What energy counts for over time; None: always 1. For policies that can tell."""
    window_s: float = Field(default=2.0, ge=0.5)
    """Length of one observation window."""
    settle_s: NonNegative = 0.2
    """Time after a clock change that no window covers."""
    min_sm_clock_mhz: Count | None = None
    """Lowest SM clock a policy may choose; None: the GPU's lowest."""
    max_sm_clock_mhz: Count | None = None
    """Highest SM clock a policy may choose; None: the GPU's highest."""
    min_power_limit_w: Count | None = None
    """Lowest power limit a policy may choose where that is the actuator; None: the GPU's lowest."""
    max_power_limit_w: Count | None = None
    """Highest power limit a policy may choose; None: the GPU's highest."""
    idle_windows: Count = 3
    """Empty windows in a row after which the policy's idle clock is set."""
    stale_after_s: Positive | None = None
    """Age beyond which the engine's statistics count as missing; None: 2 s, or five pushes if
    those take longer."""
    stale_windows: Count = 2
    """Windows in a row without statistics (or throttled) after which clocks are reset."""
    slo_windows: Count = 2
    """Windows in a row beyond an SLO after which clocks are reset for a while."""
    cooldown_windows: Count = 10
    """How many windows default clocks are kept after such a reset."""
    high_kv_cache_usage: Share = 0.8
    """KV cache usage above which default clocks are set, as they are after preemptions."""
    long_queue: NonNegative = 4.0
    """Waiting requests, in the mean of a window, above which a longer queue than before sets
    default clocks."""
    calm_windows: Count = 5
    """Windows in a row without any of that, the queue no longer than so, before it is over."""
    holdout_replicas: int = Field(default=0, ge=0)
    """How many live replicas, by order of rank, stay at default clocks as the baseline."""
    share_experience: bool = True
    """Report experience to the fleet's aggregator and take its priors."""

    @model_validator(mode="after")
    def _consistent(self) -> TunerConfig:
        problems = []
        for name in ("sm_clock_mhz", "power_limit_w"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                problems.append(
                    f"min_{name} ({low}) must not exceed max_{name} ({high}); swap them"
                )
        if self.settle_s >= self.window_s:
            problems.append(
                f"settle_s ({self.settle_s:g}) must be smaller than window_s ({self.window_s:g}); "
                "lengthen the window"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def goals_at(self, energy_weight: float = 1.0) -> Goals:
        """What the policy is asked for while energy counts for so much."""
        slo = self.slo.model_dump()
        return Goals(self.objective, self.bound, **slo, energy_weight=energy_weight)

    def push_interval_s(self, speed: float) -> float:
        """Wall time between pushes of the engine's statistics, at a clock that runs `speed` times
        faster: eight in a window, within bounds."""
        interval_s = self.window_s / (speed * PUSHES_PER_WINDOW)
        return min(max(interval_s, MIN_PUSH_INTERVAL_S), MAX_PUSH_INTERVAL_S)

    def stale_limit_s(self, speed: float) -> float:
        """`stale_after_s`, or its default at a clock that runs `speed` times faster."""
        pushes_s = STALE_PUSHES * self.push_interval_s(speed) * speed
        return self.stale_after_s or max(STALE_AFTER_S, pushes_s)

    def arms(
        self, supported: Sequence[int], actuator: Actuator = Actuator.SM_CLOCK
    ) -> tuple[int, ...]:
        """What a policy may choose of what a GPU supports; a GPU that supports nothing can be
        observed.

        Raises `ValueError` if nothing is left within the bounds, or for a policy that sets
        something else.
        """
        if isinstance(self.policy, PairConfig | PhasesConfig) and actuator is not Actuator.SM_CLOCK:
            raise ValueError(
                f"policy {self.policy.name} sets SM clocks, and the GPU's actuator is "
                f"{actuator.value}: use policy agft, which sets {_BOUNDS[actuator][2]}s as well"
            )
        if isinstance(self.policy, FixedConfig) and self.policy.actuator is not actuator:
            raise ValueError(
                f"policy fixed sets {_BOUNDS[self.policy.actuator][0]}, and the GPU's actuator is "
                f"{actuator.value}: give it {_BOUNDS[actuator][0]}"
            )
        if not supported:
            return ()
        name, unit, what = _BOUNDS[actuator]
        low = getattr(self, f"min_{name}") or supported[0]
        high = getattr(self, f"max_{name}") or supported[-1]
        arms = tuple(arm for arm in supported if low <= arm <= high)
        if not arms:
            raise ValueError(
                f"no supported {what} lies between min_{name}={low} and max_{name}={high}; this "
                f"GPU supports {supported[0]}..{supported[-1]} {unit}"
            )
        return arms


_BOUNDS = {
    Actuator.SM_CLOCK: ("sm_clock_mhz", "MHz", "SM clock"),
    Actuator.POWER_LIMIT: ("power_limit_w", "W", "power limit"),
}


def check_pushes(config: TunerConfig, *, speed: float) -> None:
    """Refuse a speed at which a window would hold fewer than two engine pushes, or the engine's
    statistics would be stale before the next push.

    Pushes are apart in wall time, `config.window_s` is the loop's time, which runs `speed` times
    faster. Raises `ValueError`.
    """
    interval_s = config.push_interval_s(speed)
    pushes = config.window_s / (speed * interval_s)
    if pushes < MIN_PUSHES_PER_WINDOW:
        fastest = config.window_s / (MIN_PUSHES_PER_WINDOW * interval_s)
        shortest_s = speed * interval_s * MIN_PUSHES_PER_WINDOW
        raise ValueError(
            f"speed {speed:g} leaves {pushes:.2g} engine pushes ({interval_s:g} s of wall "
            f"time apart) in a window of {config.window_s:g} s, at least {MIN_PUSHES_PER_WINDOW} "
            f"are needed; use a speed of at most {fastest:g} or a window_s of at least "
            f"{shortest_s:g}"
        )
    push_s = speed * interval_s
    if config.stale_limit_s(speed) < 2 * push_s:
        raise ValueError(
            f"stale_after_s ({config.stale_after_s:g}) is less than two engine pushes at speed "
            f"{speed:g}, which are {2 * push_s:g} s: statistics would never be fresh; use at least "
            "that, or leave it out"
        )
