"""Sufficient statistics of linear regression per arm: what is learned, kept, shared and checked."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agft_ray.errors import PriorError
from agft_ray.policy.experience import Experience
from agft_ray.policy.reward import MAX_REWARD
from agft_ray.telemetry.features import CLOCK_DRIVEN, FEATURE_NAMES
from agft_ray.types import DEFAULT_CLOCKS_KEY, Context, Outcome

CONTEXT_FEATURES = len(FEATURE_NAMES)
"""Length of a context: a bias that is always 1, then eight scaled features."""
LOAD_FEATURES = [i for i, name in enumerate(FEATURE_NAMES) if name not in CLOCK_DRIVEN]
"""Places in the context of what the regressions use. At equal concurrency, a clock so slow that
requests pile up looks no worse than another: what the clock itself drives must not explain the
reward away."""
FEATURES = len(LOAD_FEATURES)
"""d, the length of what the regressions use: the bias and four features of the load."""
MAX_ARMS = 1024
"""More arms than any GPU has clocks: a bound on what a prior may make us hold."""
TOLERANCE = 1e-6
"""Relative rounding error allowed in statistics that come from elsewhere."""


class Source(enum.IntEnum):
    """Where an arm's evidence is from. Only OWN is ever shared."""

    PRIOR = 0
    OWN = 1
    BORROWED = 2


class ArmStatistics:
    """Growing arrays of (count, sum of x xᵀ, sum of reward x) for every source and arm.

    Shapes (3, K), (3, K, d, d), (3, K, d); row 0 is always default clocks. Sums are raw, so they
    can be added over replicas.
    """

    def __init__(self, features: int) -> None:
        self.features = features
        self.rows: dict[int, int] = {DEFAULT_CLOCKS_KEY: 0}
        self.counts = np.zeros((3, 1))
        self.grams = np.zeros((3, 1, features, features))
        self.responses = np.zeros((3, 1, features))

    def row(self, key: int) -> int:
        """The row of an arm, which is added if it is new."""
        if key not in self.rows:
            self.rows[key] = len(self.rows)
            for name, array in self._arrays().items():
                empty = np.zeros_like(array[:, :1])
                setattr(self, name, np.concatenate([array, empty], axis=1))
        return self.rows[key]

    def add(self, source: Source, row: int, gram: np.ndarray, response: np.ndarray) -> None:
        """Count one window: `gram` is x xᵀ (d, d) and `response` reward * x (d,)."""
        self.counts[source, row] += 1.0
        self.grams[source, row] += gram
        self.responses[source, row] += response

    def scale(self, source: Source, factors: np.ndarray | float) -> None:
        """Multiply a source's evidence: count and sums of an arm (all arms) by one factor."""
        factors = np.broadcast_to(np.asarray(factors, dtype=float), self.counts[source].shape)
        self.counts[source] *= factors
        self.grams[source] *= factors[:, None, None]
        self.responses[source] *= factors[:, None]

    def cap(self, source: Source, windows: float) -> None:
        """Scale every arm's evidence down to a weight of at most `windows` windows."""
        self.scale(source, windows / np.maximum(self.counts[source], windows))

    def replace(self, source: Source, experience: Experience) -> None:
        """Put validated experience in place of whatever the source held."""
        rows = [self.row(key) for key in experience.arms_mhz]
        self.scale(source, 0.0)
        self.counts[source, rows] = experience.counts
        self.grams[source, rows] = experience.grams
        self.responses[source, rows] = experience.responses

    def experience(self, source: Source) -> Experience:
        """A copy of one source's evidence, of the arms that have any."""
        rows = [row for row in self.rows.values() if self.counts[source, row] > 0]
        everything = Experience(
            tuple(self.rows), self.counts[source], self.grams[source], self.responses[source]
        )
        return part_of(everything, rows)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able, floats exact."""
        arrays = {name: array.tolist() for name, array in self._arrays().items()}
        return {"arms_mhz": list(self.rows), **arrays}

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any], features: int) -> ArmStatistics:
        """The statistics of a snapshot; raises `ValueError` if they are not a possible state."""
        statistics = cls(features)
        try:
            keys = [int(key) for key in snapshot["arms_mhz"]]
            arrays = {name: np.array(snapshot[name], float) for name in statistics._arrays()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"snapshot of statistics is malformed: {error!r}") from None
        if keys[:1] != [DEFAULT_CLOCKS_KEY]:
            raise ValueError(f"snapshot starts with arm {keys[:1]}, it must start with 0")
        for source in Source:
            evidence = (arrays[name][source] for name in ("counts", "grams", "responses"))
            try:
                validate(Experience(tuple(keys), *evidence), features=features)
            except PriorError as error:
                raise ValueError(f"snapshot of statistics: {error}") from None
        statistics.rows = {key: row for row, key in enumerate(keys)}
        for name, array in arrays.items():
            setattr(statistics, name, array)
        return statistics

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts, "grams": self.grams, "responses": self.responses}


def features_of(context: Context) -> np.ndarray:
    """The bias and the load out of a context, as an array (d,).

    Raises `ValueError` unless the context is finite, of the right length, and begins with 1.
    """
    x = np.asarray(context.features, dtype=float)
    if x.shape != (CONTEXT_FEATURES,) or not np.isfinite(x).all() or x[0] != 1.0:
        raise ValueError(
            f"context.features {context.features} is not {CONTEXT_FEATURES} finite numbers of "
            f"which the first is 1.0; skip this window"
        )
    load: np.ndarray = x[LOAD_FEATURES]
    return load


def is_evidence(outcome: Outcome) -> bool:
    """Whether the window emitted tokens, so that its reward means anything.

    Raises `ValueError` if the context or the reward is not finite.
    """
    reward = outcome.reward
    if not all(map(math.isfinite, (reward, *outcome.context.features))):
        raise ValueError(
            f"reward {reward} or context {outcome.context.features} is not finite; skip this window"
        )
    return outcome.window.generation_tokens > 0 and outcome.window.tpot_s is not None


def part_of(experience: Experience, rows: Sequence[int]) -> Experience:
    """The experience of some of its arms, given by place."""
    return Experience(
        tuple(experience.arms_mhz[row] for row in rows),
        experience.counts[list(rows)],
        experience.grams[list(rows)],
        experience.responses[list(rows)],
    )


def validate(experience: Experience, *, features: int | None = None) -> None:
    """Raise `PriorError` unless some windows with |reward| <= MAX_REWARD could have led to this.

    With a bias of 1, `grams[k, 0, 0]` is the count, and with R the sum of squared rewards, at most
    MAX_REWARD² * count, the matrix [[gram, response], [responseᵀ, R]] is a sum of outer products
    and so positive semi-definite. That bounds every prediction the statistics can lead to.
    """
    counts, grams, responses = experience.counts, experience.grams, experience.responses
    _check_shapes(experience, features)
    for name, array in (("counts", counts), ("grams", grams), ("responses", responses)):
        _require(bool(np.isfinite(array).all()), f"{name} holds a number that is not finite")
    _require(bool((counts >= 0).all()), f"counts holds a negative number, {counts.min(initial=0)}")
    transposed = np.swapaxes(grams, 1, 2)
    scale = 1.0 + np.abs(grams).max(axis=(1, 2), initial=0.0)
    slack = TOLERANCE * scale
    asymmetry = np.abs(grams - transposed).max(axis=(1, 2), initial=0.0)
    _require(bool((asymmetry <= slack).all()), "grams holds a matrix that is not symmetric")
    lowest = np.linalg.eigvalsh(grams).min(axis=1, initial=0.0)
    _require(bool((lowest >= -slack).all()), "grams holds a matrix with a negative eigenvalue")
    bias = np.abs(grams[:, 0, 0] - counts)
    _require(bool((bias <= slack).all()), "grams[k, 0, 0] differs from counts[k]")
    bordered = np.block(
        [
            [grams, responses[:, :, None]],
            [responses[:, None, :], MAX_REWARD**2 * counts[:, None, None]],
        ]
    )
    lowest = np.linalg.eigvalsh(bordered).min(axis=1, initial=0.0)
    _require(
        bool((lowest >= -slack * MAX_REWARD**2).all()),
        f"responses would need rewards outside [-{MAX_REWARD:g}, {MAX_REWARD:g}]",
    )


def _check_shapes(experience: Experience, features: int | None) -> None:
    keys, counts, grams = experience.arms_mhz, experience.counts, experience.grams
    arms, d = len(keys), grams.shape[-1] if features is None else features
    _require(arms <= MAX_ARMS, f"arms_mhz has {arms} arms, at most {MAX_ARMS} are taken")
    _require(
        len(set(keys)) == arms and all(key >= 0 for key in keys),
        f"arms_mhz {keys} must be different and not negative",
    )
    shapes = counts.shape, grams.shape, experience.responses.shape
    expected = (arms,), (arms, d, d), (arms, d)
    _require(d > 0 and shapes == expected, f"shapes are {shapes}, expected {expected}")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise PriorError(f"experience refused: {problem}; it is ignored as a whole")
