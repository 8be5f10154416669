"""Mean power of a window: `sum over phases of (share of time) x P_phase(clock)`.

Energy is measured by window only, so what each phase draws at each clock is told apart by
regression on exposures, the shares of time. P of prefill and of decode is piecewise linear in f,
with second differences penalised (P-spline, see `step_time`), and a level of its own at default
clocks, where a power cap may hold the clock down; P of decode has a term in the logarithm of the
batch. Below the lowest clock f measured, P is taken to fall as `(f'/f)^1.5`, so that walking down
goes on through clocks between which a power cap leaves no difference. P of an empty engine is a
level each for default clocks, the lowest clock, and the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agft_ray.types import Arm

KNOTS = np.arange(200.0, 2601.0, 100.0)
"""In MHz."""
CURVE = len(KNOTS) + 1
"""Values of a phase: one a knot, and at default clocks."""
PREFILL, DECODE, BATCH, IDLE = 0, CURVE, 2 * CURVE, 2 * CURVE + 1
IDLE_DEFAULT, IDLE_LOWEST, IDLE_LAST = range(3)
FEATURES = IDLE + 3
ROUGHNESS = 0.02
"""Penalty on second differences of P in units of windows."""
RIDGE = 1e-3
"""Pull to the guess where nothing is known, in windows."""


IDLE_SHARE, IDLE_PULL = 0.6, 0.1
"""An empty engine is taken to draw that share of the mean power, as if so many windows had shown
it: where it is hardly ever empty nothing can be learned of it."""
HOPES = 0.5, 0.7
"""Power of the lowest and the last clock while empty, against default clocks, before it is seen."""
_EXPONENT = 1.5
"""P below the lowest clock measured goes as f to this power: hope, so that it is measured."""


class PowerSums:
    """Sums of x xᵀ (56, 56) and x P (56,) over windows: P in W, x the exposures.

    Plain sums, which may be added over replicas.
    """

    def __init__(self) -> None:
        self.gram = np.zeros((FEATURES, FEATURES))
        self.response = np.zeros(FEATURES)
        self.idle_s = np.zeros(3)
        """Time seen empty, by kind of idle clock."""

    def add(self, exposure: np.ndarray, power_w: float, idle_s: float) -> None:
        """Count a window."""
        self.gram += np.outer(exposure, exposure)
        self.response += exposure * power_w
        self.idle_s += idle_s * (exposure[IDLE:] > 0)

    def scale(self, factor: float) -> None:
        """Multiply all evidence by a factor."""
        for array in (self.gram, self.response, self.idle_s):
            array *= factor

    def merge(self, other: PowerSums) -> None:
        """Add the evidence of another replica."""
        self.gram += other.gram
        self.response += other.response
        self.idle_s += other.idle_s

    def snapshot(self) -> dict[str, Any]:
        """JSON-able, floats exact."""
        return {
            "gram": self.gram.tolist(),
            "response": self.response.tolist(),
            "idle_s": self.idle_s.tolist(),
        }

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any]) -> PowerSums:
        """The sums of a snapshot; raises `ValueError` if they are malformed."""
        sums = cls()
        for name, shape in (
            ("gram", (FEATURES, FEATURES)),
            ("response", (FEATURES,)),
            ("idle_s", (3,)),
        ):
            array = np.array(snapshot[name], dtype=float)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"sums of power: {name} is not {shape} finite numbers")
            setattr(sums, name, array)
        return sums


@dataclass(frozen=True, slots=True)
class Powers:
    """A fitted model."""

    values: np.ndarray
    """(56,), in W."""
    log_batch: float
    """Of late."""
    lowest_mhz: tuple[float, float]
    """Clocks of prefill and decode below which nothing was measured."""

    def prefill_w(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """Mean power during steps with prefill at locked clocks."""
        return self._at(PREFILL, clocks_mhz, self.lowest_mhz[0])

    def decode_w(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """Mean power during decode steps at locked clocks, for the batch of late."""
        batch = self.values[BATCH] * self.log_batch * clocks_mhz / KNOTS[-1]
        return np.asarray(self._at(DECODE, clocks_mhz, self.lowest_mhz[1]) + batch)

    @property
    def idle_w(self) -> np.ndarray:
        """Of an empty engine, by kind of idle clock (3,)."""
        return np.asarray(np.maximum(self.values[IDLE:], 0.0))

    def _at(self, phase: int, clocks_mhz: np.ndarray, lowest_mhz: float) -> np.ndarray:
        curve = self.values[phase : phase + len(KNOTS)]
        inside = np.interp(np.maximum(clocks_mhz, lowest_mhz), KNOTS, curve)
        falls = np.minimum(clocks_mhz / lowest_mhz, 1.0) ** _EXPONENT
        return np.asarray(np.maximum(inside, 1.0) * falls)


def exposure(
    shares: Sequence[float], clocks: tuple[Arm, Arm], idle_kind: int, batch: float
) -> np.ndarray:
    """x of a window: shares of time in prefill, decode and idle, the clocks of the first two."""
    x = np.zeros(FEATURES)
    for phase, share, clock in zip((PREFILL, DECODE), shares, clocks, strict=False):
        if clock is None:
            x[phase + CURVE - 1] = share
        else:
            x[phase : phase + len(KNOTS)] = share * _hats(clock)
    u = 1.0 if clocks[1] is None else clocks[1] / KNOTS[-1]
    x[BATCH] = shares[1] * np.log(max(batch, 1.0)) * u
    x[IDLE + idle_kind] = shares[2]
    return x


def fit(
    sums: PowerSums, top_mhz: float, log_batch: float, lowest_mhz: tuple[float, float]
) -> Powers:
    """The model from its sums."""
    seen = np.diagonal(sums.gram)
    everything = float(sums.response.sum() / max(float(sums.gram.sum()), 1e-9))
    guess = np.full(FEATURES, everything)
    guess[BATCH] = 0.0
    guess[IDLE:] = IDLE_SHARE * everything
    pull = np.full(FEATURES, 10.0 * RIDGE)
    pull[IDLE:] = IDLE_PULL
    rough = np.linalg.solve(sums.gram + _SMOOTH + np.diag(pull), sums.response + pull * guess)
    falls = np.minimum(KNOTS / top_mhz, 1.0) ** _EXPONENT
    for phase in (PREFILL, DECODE):
        level = rough[phase + CURVE - 1] if seen[phase + CURVE - 1] > 0 else everything
        guess[phase : phase + len(KNOTS)] = level * falls
    # A kind of idle clock not yet seen is hoped to be cheaper, so that it is tried.
    idle_w = rough[IDLE + IDLE_DEFAULT]
    guess[IDLE + IDLE_DEFAULT] = idle_w
    guess[IDLE + IDLE_LOWEST], guess[IDLE + IDLE_LAST] = HOPES[0] * idle_w, HOPES[1] * idle_w
    pull[:IDLE] = RIDGE
    values = np.linalg.solve(sums.gram + _SMOOTH + np.diag(pull), sums.response + pull * guess)
    for phase in (PREFILL, DECODE):
        curve = slice(phase, phase + len(KNOTS))
        values[curve] = _rising(values[curve])
    return Powers(values, log_batch, lowest_mhz)


def _rising(curve: np.ndarray) -> np.ndarray:
    """Without the falls that noise leaves: no higher clock draws less. Midway between the nearest
    such curves above and below."""
    above = np.maximum.accumulate(curve)
    below = np.minimum.accumulate(curve[::-1])[::-1]
    return np.asarray((above + below) / 2.0)


def _hats(sm_clock_mhz: float) -> np.ndarray:
    step = KNOTS[1] - KNOTS[0]
    clock = min(max(sm_clock_mhz, KNOTS[0]), KNOTS[-1])
    return np.asarray(np.maximum(0.0, 1.0 - np.abs(clock - KNOTS) / step))


def _smoothness() -> np.ndarray:
    second = np.diff(np.eye(len(KNOTS)), 2, axis=0)
    result = np.zeros((FEATURES, FEATURES))
    for phase in (PREFILL, DECODE):
        at = slice(phase, phase + len(KNOTS))
        result[at, at] = ROUGHNESS * second.T @ second
    return result


_SMOOTH = _smoothness()
