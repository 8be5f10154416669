"""Work of a window's steps as features, and sums over windows by clock that models are fitted to.

A step's time at default clocks is taken to be linear in its work. Over the steps of a window it is
linear in the sums, so windows teach it as single steps do:
    decode:  steps, tokens (one a sequence), steps x KV cache usage (their context)
    prefill: steps, tokens, tokens above 256 and above 1024 a step (GPUs fill up, attention grows)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from agft_ray.types import DEFAULT_CLOCKS_KEY, Arm, StepTotals, Window

FEATURES = 4
PREFILL_BENDS = (256.0, 1024.0)
TOKENS = 1024.0
"""Unit of tokens in the features, so that all are of about one size."""
SEQUENCES = 16.0
KEPT_WINDOWS = 12.0
"""Windows at default clocks that are not forgotten."""


def decode_work(window: Window) -> np.ndarray:
    """Features (4,) of the decode steps, summed over them."""
    steps, tokens = window.decode_steps.steps, window.decode_steps.tokens
    return np.array([steps, tokens / SEQUENCES, steps * window.kv_cache_usage, 0.0])


def prefill_work(window: Window) -> np.ndarray:
    """Features (4,) of the steps with prefill, summed over them."""
    return prefill_features(window.prefill_steps)


def prefill_features(totals: StepTotals) -> np.ndarray:
    """Features (4,) of steps with prefill, as if all had the same number of tokens."""
    if not totals.steps:
        return np.zeros(FEATURES)
    each = totals.tokens / totals.steps
    bends = [totals.steps * max(0.0, each - bend) / TOKENS for bend in PREFILL_BENDS]
    return np.array([totals.steps, totals.tokens / TOKENS, *bends])


def key_of(arm: Arm) -> int:
    """How an arm is written."""
    return DEFAULT_CLOCKS_KEY if arm is None else arm


class WorkSums:
    """By clock: steps, windows, sum of w wᵀ (4, 4) and of w t (4,), each weighted by 1/t².

    w is a window's work and t its time, in s: so relative errors count. Plain sums, which may be
    added over replicas.
    """

    def __init__(self) -> None:
        self.keys: dict[int, int] = {DEFAULT_CLOCKS_KEY: 0}
        self.steps = np.zeros(1)
        self.windows = np.zeros(1)
        self.grams = np.zeros((1, FEATURES, FEATURES))
        self.responses = np.zeros((1, FEATURES))

    def add(
        self, key: int, work: np.ndarray, time_s: float, steps: int, weight: float = 1.0
    ) -> None:
        """Count a window's steps at a clock; of times that are known less well, a share."""
        row = self._row(key)
        scaled = work / time_s
        self.steps[row] += weight * steps
        self.windows[row] += weight
        self.grams[row] += weight * np.outer(scaled, scaled)
        self.responses[row] += weight * scaled

    def scale(self, factor: float) -> None:
        """Multiply all evidence by a factor."""
        for name in _ARRAYS:
            getattr(self, name)[:] *= factor

    def forget(self, factor: float) -> None:
        """The same, save that some evidence of default clocks, which are seldom seen, stays."""
        kept = {n: getattr(self, n)[0].copy() for n in _ARRAYS}
        self.scale(factor)
        if kept["windows"] <= KEPT_WINDOWS:
            for name, values in kept.items():
                getattr(self, name)[0] = values

    def merge(self, other: WorkSums) -> None:
        """Add the evidence of another replica."""
        for key, theirs in other.keys.items():
            mine = self._row(key)
            for name in _ARRAYS:
                getattr(self, name)[mine] += getattr(other, name)[theirs]

    def default_steps(self) -> float:
        """Steps at default clocks, discounted."""
        return float(self.steps[0])

    def with_top(self, top_mhz: int) -> WorkSums:
        """The same with evidence of the highest clock as that of default clocks: no clock is
        faster, so it is their like."""
        row = self.keys.get(top_mhz)
        if row is None:
            return self
        sums = WorkSums()
        keys = [key for key in self.keys if key != top_mhz]
        sums.keys = {key: i for i, key in enumerate(keys)}
        for name in _ARRAYS:
            array = getattr(self, name)
            rest = np.delete(array, row, axis=0)
            rest[0] += array[row]
            setattr(sums, name, rest)
        return sums

    def clocks(self, arms_mhz: float) -> np.ndarray:
        """The clocks by row; default clocks count as the highest, `arms_mhz`."""
        return np.array([key or arms_mhz for key in self.keys], dtype=float)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able, floats exact."""
        return {"keys": list(self.keys)} | {n: getattr(self, n).tolist() for n in _ARRAYS}

    @classmethod
    def restored(cls, snapshot: Mapping[str, Any]) -> WorkSums:
        """The sums of a snapshot; raises `ValueError` if they are malformed."""
        sums = cls()
        keys = [int(key) for key in snapshot["keys"]]
        arrays = {name: np.array(snapshot[name], dtype=float) for name in _ARRAYS}
        shapes = (len(keys),), (len(keys),), (len(keys), FEATURES, FEATURES), (len(keys), FEATURES)
        if keys[:1] != [DEFAULT_CLOCKS_KEY] or len(set(keys)) != len(keys):
            raise ValueError(f"sums of steps have clocks {keys}, the first must be 0")
        for (name, array), shape in zip(arrays.items(), shapes, strict=True):
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"sums of steps: {name} is not {shape} finite numbers")
            setattr(sums, name, array)
        sums.keys = {key: row for row, key in enumerate(keys)}
        return sums

    def _row(self, key: int) -> int:
        if key not in self.keys:
            self.keys[key] = len(self.keys)
            for name in _ARRAYS:
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array[:1])]))
        return self.keys[key]


_ARRAYS = ("steps", "windows", "grams", "responses")


def total(each: Iterable[WorkSums]) -> WorkSums:
    """The sums of several replicas."""
    result = WorkSums()
    for sums in each:
        result.merge(sums)
    return result
