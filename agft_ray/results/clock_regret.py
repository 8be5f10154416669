"""What a run's clocks cost beyond the best ones, by window, and from when on they are good."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOW = 0.02
"""Regret, relative to the energy at the best clocks, below which clocks are good."""


@dataclass(frozen=True, slots=True)
class ClockRegret:
    """Of a fleet's run."""

    energy_j: float
    """Energy beyond that at the best clocks, of all windows."""
    relative: float | None
    """The same by the energy at the best clocks; None without windows."""
    over_bound: float | None
    """Share of the windows with steps in which steps took longer than they may; None without."""
    windows_to_low: int | None
    """See `windows_to_low_regret`."""

    @classmethod
    def of(
        cls, regret_j: np.ndarray, best_energy_j: np.ndarray, *, over_bound: int, busy: int
    ) -> ClockRegret:
        """From sums over the fleet by window, and of how many busy windows exceeded a bound."""
        energy_j, best_j = float(regret_j.sum()), float(best_energy_j.sum())
        return cls(
            energy_j=energy_j,
            relative=energy_j / best_j if best_j else None,
            over_bound=over_bound / busy if busy else None,
            windows_to_low=windows_to_low_regret(regret_j, best_energy_j),
        )


def windows_to_low_regret(regret_j: np.ndarray, best_energy_j: np.ndarray) -> int | None:
    """After how many windows regret stays below `LOW`; None if it never does.

    The least k so that regret cumulated from window k on is below `LOW` after each later window n:
    `sum_k^n regret < LOW sum_k^n best`. So the sum up to k of `regret - LOW best` exceeds all that
    follow: k is where that sum is highest, the last such place.
    """
    excess_j = np.concatenate([[0.0], np.cumsum(regret_j - LOW * best_energy_j)])
    k = len(excess_j) - 1 - int(np.argmax(excess_j[::-1]))
    return k if k < len(regret_j) else None
