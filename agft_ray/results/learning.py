"""Learning curves against default clocks, and the worst window of learning.

Everything is of the fleet: a window is the sum over replicas of one span of the fixed time grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 20
"""Windows of which a mean is taken."""


@dataclass(frozen=True, slots=True)
class FleetWindows:
    """Sums over the fleet by window of the grid: equally long arrays."""

    energy_j: np.ndarray
    itl_sum_s: np.ndarray
    itl_count: np.ndarray

    def __len__(self) -> int:
        return len(self.energy_j)


def block_edp_ratios(run: FleetWindows, default: FleetWindows, block: int = BLOCK) -> np.ndarray:
    """EDP of each `block` successive windows relative to default clocks in the same windows.

    Entry i is that of the windows i to i + block - 1; NaN where either emitted no second token.
    The EDP of a block is its energy times its mean inter-token latency.
    """
    length = min(len(run), len(default))
    if length < block:
        return np.empty(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: np.ndarray = _block_edp(run, length, block) / _block_edp(default, length, block)
    return ratios


def _block_edp(windows: FleetWindows, length: int, block: int) -> np.ndarray:
    columns = (windows.energy_j, windows.itl_sum_s, windows.itl_count)
    energy_j, itl_s, tokens = (_block_sums(column[:length], block) for column in columns)
    edp: np.ndarray = energy_j * itl_s / np.where(tokens > 0, tokens, np.nan)
    return edp


def _block_sums(values: np.ndarray, block: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    blocks: np.ndarray = sums[block:] - sums[:-block]
    return blocks


def worst_tpot_ratio(run: FleetWindows, default: FleetWindows, learned: int | None) -> float | None:
    """Largest TPOT of a window before `learned`, by that of default clocks in that window.

    With None for `learned`, of the whole run. None if there is no such window with tokens.
    """
    length = min(len(run), len(default))
    end = length if learned is None else min(learned, length)
    with np.errstate(divide="ignore", invalid="ignore"):
        own, base = (w.itl_sum_s[:end] / w.itl_count[:end] for w in (run, default))
        ratios = own / base
    known = ratios[np.isfinite(ratios)]
    return float(known.max()) if known.size else None
