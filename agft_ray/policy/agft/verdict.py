"""What is to become of a clock that is worse than the best one: the rule, and nothing else."""

from __future__ import annotations

import math
from enum import StrEnum


class Verdict(StrEnum):
    """On one clock. Any of them ends an earlier suspicion."""

    KEEP = "keep"
    SUSPECT = "suspect"
    """It is to be measured again; the clocks below it wait."""
    PRUNE = "prune"
    """It alone is ruled out."""
    FLOOR = "floor"
    """It is ruled out with all below it: there, delay grows faster than power falls."""


def verdict(
    *,
    gap: float,
    error: float,
    clock_mhz: int,
    rival_mhz: int,
    extreme_edp_ratio: float,
    confirmed: bool,
) -> Verdict:
    """The verdict on `clock_mhz`, whose reward lies `gap` (a logarithm of EDP) below its rival's.

    Args:
        gap: may be negative, if the clock is the better one.
        error: what `gap` must exceed to be significant.
        clock_mhz: the clock that is judged.
        rival_mhz: the best clock.
        extreme_edp_ratio: how many times the best clock's EDP counts as extremely bad.
        confirmed: whether more than one measurement stands behind `gap`.

    Only what is extreme, confirmed and significant is certain:

                            not certain    certain
        not extreme         keep
        extreme, not slow   keep           prune
        extreme, and slow   suspect        floor
    """
    extreme = gap > math.log(extreme_edp_ratio)
    certain = extreme and confirmed and gap > error
    # EDP grows hardly faster than the square of the slowdown, so a clock is not slow unless the
    # square explains the verdict.
    slow = clock_mhz * math.sqrt(extreme_edp_ratio) < rival_mhz
    if certain:
        return Verdict.FLOOR if slow else Verdict.PRUNE
    return Verdict.SUSPECT if extreme and slow else Verdict.KEEP
