"""Online ridge regression around a prior guess, with forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict


class RidgeState(BaseModel):
    """Sufficient statistics: discounted sums of x xᵀ (d, d) and x y (d,), JSON-able."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    gram: list[list[float]] = []
    response: list[float] = []
    samples: int = 0


class Ridge:
    """`theta = (S + Lambda)^-1 (b + Lambda theta0)`: a diagonal penalty around a guess theta0.

    A feature with a large penalty keeps its guess until the data speak against it; of features
    that always move together, the one with the smaller penalty takes the blame.
    """

    def __init__(
        self, *, penalties: Sequence[float], guess: Sequence[float], forgetting: float
    ) -> None:
        self._penalties = np.diag(np.asarray(penalties, dtype=float))
        self._pull = self._penalties @ np.asarray(guess, dtype=float)
        self._forgetting = forgetting
        self._gram = np.zeros_like(self._penalties)
        self._response = np.zeros(len(guess))
        self._theta: np.ndarray | None = None
        self.samples = 0
        """How many were learned, not discounted."""

    @property
    def theta(self) -> np.ndarray:
        """The weights (d,)."""
        if self._theta is None:
            self._theta = np.linalg.solve(self._gram + self._penalties, self._response + self._pull)
        return self._theta

    def learn(self, x: np.ndarray, y: float) -> None:
        """Add one sample, discounting those before it."""
        self._gram *= self._forgetting
        self._gram += x[:, None] * x
        self._response *= self._forgetting
        self._response += y * x
        self.samples += 1
        self._theta = None

    def state(self) -> RidgeState:
        """All that it has learned."""
        return RidgeState(
            gram=self._gram.tolist(), response=self._response.tolist(), samples=self.samples
        )

    def restore(self, state: RidgeState) -> None:
        """Continue from a state; raises `ValueError`, changing nothing, if it does not fit."""
        empty = not state.gram and not state.response
        gram = np.zeros_like(self._gram) if empty else np.array(state.gram, dtype=float)
        response = np.zeros_like(self._response) if empty else np.array(state.response, float)
        if gram.shape != self._gram.shape or response.shape != self._response.shape:
            raise ValueError(
                f"regression has shapes {gram.shape} and {response.shape}, expected "
                f"{self._gram.shape} and {self._response.shape}"
            )
        self._gram, self._response, self.samples = gram, response, state.samples
        self._theta = None
