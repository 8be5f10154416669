"""What a tuner says of itself."""

from __future__ import annotations

import enum


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
    HELD = "held"
    REFUSED = "refused"
    YIELDED = "yielded"
    FAULT = "fault"
    GPU_LOST = "gpu lost"
    STOPPED = "stopped"
