"""What a tuner says of itself."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any, Final

from agft_ray.types import Arm


class TunerState(enum.StrEnum):
    """What a tuner is doing. docs/safety.md says what each means for the clocks."""

    STARTING = "starting"
    UNAVAILABLE = "unavailable"
    OFF = "off"
    OBSERVING = "observing"
    TUNING = "tuning"
    HOLDOUT = "holdout"
    BLIND = "blind"
    THROTTLED = "throttled"
    COOLDOWN = "cooldown"
    PRESSURE = "pressure"
    HELD = "held"
    REFUSED = "refused"
    YIELDED = "yielded"
    FAULT = "fault"
    GPU_LOST = "gpu lost"
    STOPPED = "stopped"


class Unknown(enum.Enum):
    """What a figure is while it cannot be known; None says that there is none."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerStatus:
    """What a tuner says of itself, for people: the one list of the keys of `/agft/status`.

    The aggregator adds who the replica is and whether it lives (`ExperienceStore.statuses`).
    """

    rank: int | None
    role: str
    mode: str
    state: str
    """One of `TunerState`, as a plain string for whoever has no class of ours."""
    reason: str
    """Why clocks are not set, or what the last fault was."""
    tuner_pid: int
    guard_pid: int | None
    windows: int
    restored_windows: int
    loop_cpu_s: float

    # Of a tuner that has opened its GPU.
    policy: str | Unknown = UNKNOWN
    gpu_uuid: str | Unknown = UNKNOWN
    gpu_model: str | Unknown = UNKNOWN
    actuator: str | Unknown = UNKNOWN
    clock_changes: int | Unknown = UNKNOWN
    phase_changes: int | Unknown = UNKNOWN
    """Those of them within a plan."""
    phase_changes_put_off: int | Unknown = UNKNOWN
    """Phases whose clock had to wait: at most `MAX_CHANGES_PER_S` changes a second are made."""
    phase_delays: list[int] | Unknown = UNKNOWN
    """From a prompt's arrival to the GPU's having been called: counts by bin of `UPPER_MS`."""
    clock_change_s: float | Unknown | None = UNKNOWN
    """How long a change of the clock takes, the call included: the median of the last ones."""
    plan: tuple[Arm, Arm, Arm] | Unknown = UNKNOWN
    """The arms in force for prefill, decode and an empty engine; None: default clocks."""
    reset_due: bool | Unknown = UNKNOWN
    """The clocks have yet to be reset."""
    last_reward: float | Unknown | None = UNKNOWN
    last_decision: str | Unknown | None = UNKNOWN
    last_note: str | Unknown = UNKNOWN
    last_window: dict[str, Any] | Unknown | None = UNKNOWN
    policy_status: dict[str, Any] | Unknown = UNKNOWN
    energy_weight: float | Unknown = UNKNOWN
    energy_weight_problem: str | Unknown = UNKNOWN
    """Why it is 1 although a source is set, or why that could not be read of late."""

    # Of Ray Serve's metrics, while they are fresh.
    serve_request_rate_per_s: float | Unknown = UNKNOWN
    serve_latency_s: float | Unknown | None = UNKNOWN
    serve_in_flight: float | Unknown | None = UNKNOWN
    serve_metrics_age_s: float | Unknown = UNKNOWN

    # Of the newest reading of the GPU: energy and power belong to `t_s`.
    t_s: float | Unknown = UNKNOWN
    energy_j: float | Unknown = UNKNOWN
    energy_t_s: float | Unknown = UNKNOWN
    energy_source: str | Unknown = UNKNOWN
    power_w: float | Unknown = UNKNOWN
    power_source: str | Unknown = UNKNOWN
    sm_clock_mhz: int | Unknown = UNKNOWN
    locked_sm_clock_mhz: Arm | Unknown = UNKNOWN
    power_limit_w: Arm | Unknown = UNKNOWN
    """In place of a locked clock, where that is the actuator."""

    # Of the engine's newest statistics.
    running: int | Unknown = UNKNOWN
    waiting: int | Unknown = UNKNOWN
    prompt_tokens: int | Unknown = UNKNOWN
    generation_tokens: int | Unknown = UNKNOWN
    requests: int | Unknown = UNKNOWN
    engine_t_s: float | Unknown = UNKNOWN

    def as_dict(self) -> dict[str, Any]:
        """What is known, by name: what is not known is not there."""
        named = ((figure.name, getattr(self, figure.name)) for figure in fields(self))
        return {name: value for name, value in named if value is not UNKNOWN}
