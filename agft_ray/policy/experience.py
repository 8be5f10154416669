"""What policies learn and share: sums of regression by clock, and what they may be added under."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agft_ray.types import Actuator


@dataclass(frozen=True, slots=True)
class PriorKey:
    """What must agree before two replicas' experience may be added."""

    gpu_model: str
    engine_model: str
    tensor_parallel: int
    role: str
    quantization: str
    objective: str
    window_s: float
    feature_schema: int
    reward_schema: int
    policy: str
    actuator: str = Actuator.SM_CLOCK.value


@dataclass(frozen=True, slots=True)
class Experience:
    """Sufficient statistics of linear regression, one set an arm: sums over the arm's windows.

    `arms_mhz[k]` is the arm (DEFAULT_CLOCKS_KEY for default clocks), `counts[k]` the number of
    windows, `grams[k]` the sum of x xᵀ, `responses[k]` the sum of reward * x, x being the feature
    vector. Shapes (K,), (K,), (K, d, d), (K, d).
    """

    arms_mhz: tuple[int, ...]
    counts: np.ndarray
    grams: np.ndarray
    responses: np.ndarray


@dataclass(frozen=True, slots=True)
class Prior:
    """What the aggregator hands out: the experience of all other replicas under one key."""

    key: PriorKey
    version: int
    """Greater whenever the experience of one of those replicas is another one."""
    replicas: int
    """How many replicas' experience went into it."""
    experience: Experience
