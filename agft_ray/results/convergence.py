"""Learning curves against default clocks: when a policy has settled, and its worst window before.

Everything is of the fleet: a window is the sum over replicas of one span of the fixed time grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 20
"""Windows of which a mean is taken."""
TOLERANCE = 0.02
"""How far the block means may stray from the final value, relative to it."""


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


def windows_to_converge(run: FleetWindows, default: FleetWindows) -> int | None:
    """The first window from which the block EDP stays within `TOLERANCE` of its final value.

    Both are relative to default clocks under the same load; the final value is that of the run's
    last quarter as one block. None if it is not within throughout the last quarter, or if that is
    shorter than a block.
    """
    length = min(len(run), len(default))
    quarter = length // 4
    if quarter < BLOCK:
        return None
    final = float(block_edp_ratios(run, default, quarter)[-1])
    ratios = block_edp_ratios(run, default)
    outside = np.flatnonzero(np.abs(ratios / final - 1.0) > TOLERANCE)
    if not np.isfinite(final):
        return None
    first = int(outside[-1]) + 1 if outside.size else 0
    return first if first <= length - quarter else None


def worst_tpot_ratio(
    run: FleetWindows, default: FleetWindows, converged: int | None
) -> float | None:
    """Largest TPOT of a window before convergence, by that of default clocks in that window.

    The whole run counts if it never converged; None if there is no such window with tokens.
    """
    length = min(len(run), len(default))
    end = length if converged is None else min(converged, length)
    with np.errstate(divide="ignore", invalid="ignore"):
        own, base = (w.itl_sum_s[:end] / w.itl_count[:end] for w in (run, default))
        ratios = own / base
    known = ratios[np.isfinite(ratios)]
    return float(known.max()) if known.size else None
