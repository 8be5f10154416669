"""What a policy is asked for: what is to be least, and which latencies are to be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Objective = Literal["energy", "edp", "ed2p"]
Statistic = Literal["mean", "p99"]

DELAY_EXPONENTS = {"energy": 0.0, "edp": 1.0, "ed2p": 2.0}


@dataclass(frozen=True, slots=True)
class Goals:
    """Settings that may change at any time, and say nothing of how a GPU or an engine behaves."""

    objective: Objective | None = None
    """What is to be least: energy x latency^m with m = 0, 1 or 2; None: the policy's own."""
    bound: float = 0.10
    """How much longer TTFT, TPOT and E2E may be than at default clocks, as a share."""
    ttft_s: float | None = None
    """TTFT in s that takes the place of its relative bound."""
    tpot_s: float | None = None
    """The same for TPOT."""
    e2e_s: float | None = None
    """The same for a whole request."""
    statistic: Statistic = "mean"
    """What of those latencies must keep the bounds in seconds."""
    energy_weight: float = 1.0
    """What energy counts for now, 1 being usual: its price, or its carbon."""
