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
        # One array each, the vector in the last column: half as many calls of NumPy.
        penalty = np.diag(np.asarray(penalties, dtype=float))
        pull = penalty @ np.asarray(guess, dtype=float)
        self._prior = np.column_stack((penalty, pull))
        self._forgetting = forgetting
        self._sums = np.zeros_like(self._prior)
        self._row = np.zeros(len(pull) + 1)
        self._theta: np.ndarray | None = None
        self.samples = 0
        """How many were learned, not discounted."""

    @property
    def theta(self) -> np.ndarray:
        """The weights (d,)."""
        if self._theta is None:
            total = self._sums + self._prior
            self._theta = np.linalg.solve(total[:, :-1], total[:, -1])
        return self._theta

    def learn(self, x: np.ndarray, y: float) -> None:
        """Add one sample, discounting those before it."""
        self._sums *= self._forgetting
        self._row[:-1], self._row[-1] = x, y
        self._sums += x[:, None] * self._row
        self.samples += 1
        self._theta = None

    def state(self) -> RidgeState:
        """All that it has learned."""
        return RidgeState(
            gram=self._sums[:, :-1].tolist(),
            response=self._sums[:, -1].tolist(),
            samples=self.samples,
        )

    def restore(self, state: RidgeState) -> None:
        """Continue from a state; raises `ValueError`, changing nothing, if it does not fit."""
        size = len(self._sums)
        empty = not state.gram and not state.response
        gram = np.zeros((size, size)) if empty else np.array(state.gram, dtype=float)
        response = np.zeros(size) if empty else np.array(state.response, float)
        if gram.shape != (size, size) or response.shape != (size,):
            raise ValueError(
                f"regression has shapes {gram.shape} and {response.shape}, expected "
                f"{(size, size)} and {(size,)}"
            )
        self._sums, self.samples = np.column_stack((gram, response)), state.samples
        self._theta = None
