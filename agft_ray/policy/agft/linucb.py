"""Disjoint LinUCB (Li et al. 2010, arXiv 1003.0146), shrunk to a load-matched baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agft_ray.policy.experience import Experience
from agft_ray.policy.statistics import ArmStatistics, Source

DECAY_INTERVAL = 16
"""Own evidence is discounted once in so many learned windows, all arms in one batch."""
BORROWED_SHARE = 0.9
"""At most this share of a lender's evidence is borrowed, however little it has."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Expected reward (K,) and width sqrt(xᵀ A_k⁻¹ x) (K,) of arms in one context.

    With noise of standard deviation sigma, the error of a mean is about sigma * width.
    """

    means: np.ndarray
    widths: np.ndarray


class LinUcb:
    """Ridge regressions of the reward, one an arm, each shrunk to a common baseline.

    `theta_k = beta + (ridge I + S_k)⁻¹ (b_k - S_k beta)` with S_k and b_k the arm's sums of x xᵀ
    and reward x over its prior and its own windows. `beta` is what default clocks are expected to
    bring at this load: slopes of the load that all arms have in common (within-arm ridge
    regression, so that they are not confounded with the arms) and the intercept of default clocks.
    An arm without evidence is therefore assumed to be as good as default clocks at this load.

    An arm without evidence within `borrow_span_mhz` of one that has some borrows from the nearest,
    with a weight of at most `borrow_windows` windows; what is borrowed is never shared.
    `forgetting` discounts own and borrowed evidence per learned window.
    """

    def __init__(
        self,
        *,
        features: int,
        ridge: float,
        slope_ridge: float,
        forgetting: float,
        borrow_windows: float = 0.0,
        borrow_span_mhz: float = 0.0,
    ) -> None:
        self._ridge = ridge * np.eye(features)
        self._slope_ridge = slope_ridge * np.eye(features - 1)
        self._forgetting = forgetting
        self._borrow_windows = borrow_windows
        self._borrow_span_mhz = borrow_span_mhz
        self._learned = 0
        self._put(ArmStatistics(features))

    def predict(self, x: np.ndarray, keys: Sequence[int]) -> Prediction:
        """Predictions for the arms `keys` (K,) at the features `x` (d,). Pure."""
        rows, weights = self._lookup(keys)
        inverses = self._inverses[rows]
        borrowing = weights < 1.0
        if borrowing.any():
            grams = weights[borrowing, None, None] * self._grams[rows[borrowing]]
            inverses[borrowing] = self._inverted(grams)
        spread = _times(inverses, x)
        surplus = self._responses[rows] - _times(self._grams[rows], self.baseline)
        means = x @ self.baseline + weights * (spread * surplus).sum(axis=1)
        return Prediction(means, np.sqrt(np.maximum(spread @ x, 0.0)))

    def learn(self, key: int, x: np.ndarray, reward: float) -> None:
        """Add one window to an arm. Raises `ValueError`, changing nothing, on bad numbers."""
        if x.shape != (self._statistics.features,) or x[0] != 1.0:
            raise ValueError(f"features {x} must be {self._statistics.features}, the first 1.0")
        if not (np.isfinite(x).all() and np.isfinite(reward)):
            raise ValueError(f"features {x} and reward {reward} must be finite; skip this window")
        row, gram, response = self._row(key), np.outer(x, x), reward * x
        self._statistics.add(Source.OWN, row, gram, response)
        self._learned += 1
        if self._learned % DECAY_INTERVAL == 0 and self._forgetting < 1.0:
            self._decay(self._forgetting**DECAY_INTERVAL)
        else:
            self._add(row, x, gram, response)

    def merge(self, experience: Experience, *, max_windows: float) -> None:
        """Take validated experience as the prior, each arm's weight capped."""
        self._statistics.replace(Source.PRIOR, experience)
        self._statistics.cap(Source.PRIOR, max_windows)
        self._refresh()

    def contradicts(self, experience: Experience, row: int, *, error: float) -> bool:
        """Whether own evidence contradicts experience (of its arm in place `row`).

        Compared are the mean rewards, corrected for the loads they were measured under; `error` is
        the allowed difference between two single windows under one load.
        """
        statistics = self._statistics
        own = statistics.rows.get(experience.arms_mhz[row])
        n, own_n = (
            experience.counts[row],
            0.0 if own is None else statistics.counts[Source.OWN, own],
        )
        if own is None or min(n, own_n) <= 0.0:
            return False
        distance = experience.grams[row, 0] / n - statistics.grams[Source.OWN, own, 0] / own_n
        gap = experience.responses[row, 0] / n - statistics.responses[Source.OWN, own, 0] / own_n
        width = math.hypot(n**-0.5, own_n**-0.5, self.load_width(distance))
        return bool(abs(gap - distance[1:] @ self.baseline[1:]) > error * width)

    def discount(self, max_windows: float) -> None:
        """Let no arm's evidence of any source weigh more than `max_windows` windows."""
        for source in Source:
            self._statistics.cap(source, max_windows)
        self._refresh()

    def experience(self) -> Experience:
        """Own evidence, discounted as it is."""
        return self._statistics.experience(Source.OWN)

    @property
    def keys(self) -> list[int]:
        """Arms with evidence, own or of the prior."""
        return [key for key, row in self._statistics.rows.items() if self._counts[row] > 0]

    def count(self, key: int, source: Source | None = None) -> float:
        """Windows of evidence about an arm: of one source, or own and prior together."""
        row = self._statistics.rows.get(key)
        if row is None:
            return 0.0
        return float(self._counts[row] if source is None else self._statistics.counts[source, row])

    def counts(self, keys: Sequence[int]) -> np.ndarray:
        """Windows of evidence, own and prior, about each arm (K,)."""
        rows = np.array([self._statistics.rows.get(key, -1) for key in keys], dtype=int)
        counts: np.ndarray = np.where(rows < 0, 0.0, self._counts[rows])
        return counts

    def mean_context(self, key: int) -> np.ndarray:
        """Mean features (d,) of an arm's windows; of all windows for an arm without any."""
        row = self._statistics.rows.get(key)
        if row is not None and self._counts[row] > 0:
            own: np.ndarray = self._shared_grams[row, 0] / self._counts[row]
            return own
        mean: np.ndarray = self._shared_grams[:, 0].sum(axis=0) / max(self._counts.sum(), 1e-9)
        return mean

    def load_width(self, distance: np.ndarray) -> float:
        """Width of the common slopes over a difference of features (d,): sqrt(uᵀ A_slope⁻¹ u)."""
        u = distance[1:]
        return float(np.sqrt(max(u @ self._slope_inverse @ u, 0.0)))

    def surprise(self, key: int, x: np.ndarray, reward: float) -> float:
        """Prediction error in units that make its variance sigma², the reward noise's.

        The error is divided by sqrt(1 + width² + load width²): in a load never seen before, a
        large error is no surprise.
        """
        mean, squared_width = self._predict_one(x, key)
        u = (x - self.mean_context(key))[1:]
        return float((reward - mean) / math.sqrt(1.0 + squared_width + u @ self._slope_inverse @ u))

    def _predict_one(self, x: np.ndarray, key: int) -> tuple[float, float]:
        """`predict` for one arm, faster if it has evidence: mean and squared width."""
        row = self._statistics.rows.get(key)
        if row is None:
            prediction = self.predict(x, [key])
            return float(prediction.means[0]), float(prediction.widths[0]) ** 2
        spread = self._inverses[row] @ x
        surplus = self._responses[row] - self._grams[row] @ self.baseline
        return float(x @ self.baseline + spread @ surplus), float(spread @ x)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"learned": self._learned, "statistics": self._statistics.snapshot()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot; raises `ValueError`, changing nothing, if it is malformed."""
        learned = snapshot.get("learned")
        if not isinstance(learned, int) or learned < 0:
            raise ValueError(f"snapshot: learned {learned!r} must be a count")
        self._put(ArmStatistics.restored(snapshot.get("statistics", {}), self._statistics.features))
        self._learned = learned

    # -- evidence ------------------------------------------------------------------------------

    def _put(self, statistics: ArmStatistics) -> None:
        self._statistics = statistics
        self._refresh()

    def _row(self, key: int) -> int:
        """The arm's row; a new arm takes over, for good, what it has been borrowing so far."""
        if key not in self._statistics.rows:
            (lender,), (weight,) = self._lookup([key])
            row, statistics = self._statistics.row(key), self._statistics
            for array in (statistics.counts, statistics.grams, statistics.responses):
                array[Source.BORROWED, row] = weight * array[:, lender].sum(axis=0)
            self._refresh()
        return self._statistics.rows[key]

    def _lookup(self, keys: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """For every arm the row to predict from and its weight (below 1: borrowed)."""
        rows = np.array([self._statistics.rows.get(key, -1) for key in keys], dtype=int)
        weights = np.ones(len(keys))
        unknown = rows < 0
        if unknown.any():
            rows[unknown], weights[unknown] = self._lenders(np.array(keys)[unknown])
        return rows, weights

    def _lenders(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of the nearest clock with evidence, and how much of that to borrow (K,)."""
        clocks, rows = self._known_clocks
        if not clocks.size:
            return np.zeros(keys.shape, int), np.zeros(keys.shape)
        above = np.searchsorted(clocks, keys).clip(1, max(1, clocks.size - 1))
        below = above - 1
        above = np.minimum(above, clocks.size - 1)
        nearest = np.where(keys - clocks[below] < clocks[above] - keys, below, above)
        lenders = rows[nearest]
        weights = self._borrow_windows / self._statistics.counts[:, lenders].sum(axis=0)
        near = np.abs(clocks[nearest] - keys) <= self._borrow_span_mhz
        weights = np.where(near, np.minimum(weights, BORROWED_SHARE), 0.0)
        return np.where(near, lenders, 0), weights

    def _decay(self, factor: float) -> None:
        self._statistics.scale(Source.OWN, factor)
        self._statistics.scale(Source.BORROWED, factor)
        self._refresh()

    # -- solution ------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Recompute everything that follows from the statistics."""
        shared = slice(0, Source.BORROWED)
        statistics = self._statistics
        self._counts = statistics.counts[shared].sum(axis=0)
        self._shared_grams = statistics.grams[shared].sum(axis=0)
        self._shared_responses = statistics.responses[shared].sum(axis=0)
        self._total_gram = self._shared_grams.sum(axis=0)
        self._total_response = self._shared_responses.sum(axis=0)
        self._grams = statistics.grams.sum(axis=0)
        self._responses = statistics.responses.sum(axis=0)
        self._inverses = self._inverted(self._grams)
        self._find_known_clocks()
        self._solve_baseline()

    def _find_known_clocks(self) -> None:
        """Clocks with evidence, ascending, and their rows."""
        known = sorted((key, self._statistics.rows[key]) for key in self.keys if key)
        clocks, rows = zip(*known, strict=True) if known else ((), ())
        self._known_clocks = np.array(clocks, dtype=int), np.array(rows, dtype=int)

    def _add(self, row: int, x: np.ndarray, gram: np.ndarray, response: np.ndarray) -> None:
        """The same after one more window of one arm; its inverse by Sherman-Morrison."""
        is_new = self._counts[row] == 0.0
        self._counts[row] += 1.0
        self._shared_grams[row] += gram
        self._shared_responses[row] += response
        self._total_gram += gram
        self._total_response += response
        self._grams[row] += gram
        self._responses[row] += response
        spread = self._inverses[row] @ x
        self._inverses[row] -= np.outer(spread, spread) / (1.0 + x @ spread)
        if is_new:
            self._find_known_clocks()
        self._solve_baseline()

    def _inverted(self, grams: np.ndarray) -> np.ndarray:
        inverses = np.linalg.inv(self._ridge + grams)
        half: np.ndarray = 0.5 * (inverses + np.swapaxes(inverses, -1, -2))
        return half

    def _solve_baseline(self) -> None:
        """Slopes from within-arm sums of squares, then the intercept of default clocks.

        The intercept is shrunk, with the weight of one window, to the mean over all windows,
        which stands in for it where default clocks were never measured.
        """
        counts, rewards = self._counts, self._shared_responses[:, 0]
        sums = self._shared_grams[:, 1:, 0]
        means = (sums / np.maximum(counts, 1e-9)[:, None]).T
        within = self._total_gram[1:, 1:] - means @ sums
        response = self._total_response[1:] - means @ rewards
        self._slope_inverse = np.linalg.inv(within + self._slope_ridge)
        slopes = self._slope_inverse @ response
        overall = self._total_response[0] - self._total_gram[0, 1:] @ slopes
        overall /= max(self._total_gram[0, 0], 1.0)
        intercept = (rewards[0] - sums[0] @ slopes + overall) / (counts[0] + 1.0)
        self.baseline = np.concatenate(([intercept], slopes))


def _times(matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(K, d, d) times (d,): one matrix product, faster than K small ones."""
    product: np.ndarray = (matrices.reshape(-1, len(x)) @ x).reshape(-1, len(x))
    return product
