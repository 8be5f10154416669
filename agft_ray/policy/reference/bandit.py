"""The bandit of the policy `agft_reference`: features, their z-scores, disjoint LinUCB, reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from agft_ray.types import Window

FEATURES = 7
RIDGE = 5.0
"""Lambda: 1 is configured, but the code takes max(lambda, 5)."""
INITIAL_ALPHA, ALPHA_DECAY, ALPHA_FLOOR = 10.0, 0.02, 0.1
CLIP = 3.0
HISTORY = 200
"""EDPs kept per arm; the reference's histories grow without bound."""
EMPTY_FEATURES = (0.0, 1e-3, 1e-3, 0.0, 0.0, 0.0, 0.0)
"""The raw features of a window in which nothing happened."""

Vector = Annotated[list[float], Field(min_length=FEATURES, max_length=FEATURES)]


def raw_features(window: Window) -> list[float]:
    """The seven features, amounts per window: has_queue, prefill and decode throughput, packing
    efficiency, concurrency, KV cache usage and prefix cache hit rate in per cent. No intercept."""
    return [
        1.0 if window.waiting > 0 else 0.0,
        max(float(window.prompt_tokens), 1e-3),
        max(float(window.generation_tokens), 1e-3),
        window.iteration_tokens / window.iterations if window.iterations else 0.0,
        window.running,
        100.0 * window.kv_cache_usage,
        100.0 * window.prefix_cache_hits / max(window.prefix_cache_queries, 1),
    ]


def reward_of(edp_j_s: float, baseline_j_s: float) -> float:
    """`2 (1 - min(2, EDP / B))`: 2 at best, 0 at the baseline B, -2 from twice of it."""
    return 2.0 * (1.0 - min(2.0, edp_j_s / baseline_j_s))


def alpha(rounds: int) -> float:
    """The exploration weight after so many updates."""
    return max(INITIAL_ALPHA * math.exp(-ALPHA_DECAY * rounds), ALPHA_FLOOR)


class Normaliser(BaseModel):
    """Welford's running mean and variance of every feature, over the policy's whole life."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    count: int = 0
    mean: Vector = [0.0] * FEATURES
    squares: Vector = [0.0] * FEATURES
    """Sums of squared deviations from the mean."""

    def add(self, raw: Sequence[float]) -> list[float]:
        """Take one vector, and return its z-scores, clipped at 3."""
        self.count += 1
        for i, value in enumerate(raw):
            before = value - self.mean[i]
            self.mean[i] += before / self.count
            self.squares[i] += before * (value - self.mean[i])
        return [self._scaled(i, value) for i, value in enumerate(raw)]

    def _scaled(self, i: int, value: float) -> float:
        deviation = math.sqrt(self.squares[i] / (self.count - 1)) if self.count > 1 else 1.0
        return max(-CLIP, min(CLIP, (value - self.mean[i]) / (deviation + 1e-8)))


class ReferenceArm(BaseModel):
    """What is known of one clock."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    gram: list[Vector] = Field(
        default_factory=lambda: (RIDGE * np.eye(FEATURES)).tolist(),
        min_length=FEATURES,
        max_length=FEATURES,
    )
    """A: the ridge plus the sum of x xᵀ."""
    response: Vector = [0.0] * FEATURES
    """b: the sum of reward * x."""
    visits: int = 0
    reward_sum: float = 0.0
    edps: list[float] = []
    """EDP of its windows in J s; 0.0 stands for one without tokens."""

    def learn(self, x: Sequence[float], reward: float, edp_j_s: float) -> None:
        """Add one sample."""
        self.gram = (np.array(self.gram) + np.outer(x, x)).tolist()
        self.response = (np.array(self.response) + reward * np.array(x)).tolist()
        self.visits += 1
        self.reward_sum += reward
        self.edps = [*self.edps, edp_j_s][-HISTORY:]

    @property
    def mean_reward(self) -> float:
        """Over all samples."""
        return self.reward_sum / max(1, self.visits)

    @property
    def mean_edp_j_s(self) -> float:
        """Of all its windows, those without tokens included as 0.0: they look excellent."""
        return sum(self.edps) / max(1, len(self.edps))


def predict(arms: Sequence[ReferenceArm], x: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Expected rewards `θᵀx` (K,) and widths `sqrt(xᵀ A⁻¹ x)` (K,)."""
    features = np.array(x)
    grams = np.array([arm.gram for arm in arms])
    responses = np.array([arm.response for arm in arms])
    spread = np.linalg.solve(grams, np.broadcast_to(features, responses.shape)[..., None])[..., 0]
    means: np.ndarray = (spread * responses).sum(axis=1)
    widths: np.ndarray = np.sqrt(np.maximum(spread @ features, 0.0))
    return means, widths
