"""Which clocks a policy considers. Pure functions over the ascending list the GPU supports."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def nearest(arms: Sequence[int], sm_clock_mhz: float) -> int:
    """The clock of an ascending list closest to a frequency, the higher one of two as close."""
    above = bisect.bisect_left(arms, sm_clock_mhz)
    neighbours = arms[max(0, above - 1) : above + 1]
    return min(neighbours, key=lambda arm: (abs(arm - sm_clock_mhz), -arm))


def at_or_below(arms: Sequence[int], sm_clock_mhz: float) -> int:
    """The highest supported clock not above a frequency; the lowest if all are."""
    return arms[max(bisect.bisect_right(arms, sm_clock_mhz) - 1, 0)]


def midpoint(arms: Sequence[int]) -> float:
    """Halfway between the lowest and the highest clock: what GEOPM takes for the efficient clock
    of a GPU that nobody has characterised (github.com/geopm/geopm, src/GPUActivityAgent.cpp).
    """
    return (min(arms) + max(arms)) / 2


def grid(arms: Sequence[int], step_mhz: int) -> list[int]:
    """Every `step_mhz` from the highest clock down, snapped to the list, and the lowest clock.

    Ascending, without repetition, a part of `arms`; empty if there are none.
    """
    if not arms:
        return []
    targets = range(max(arms), min(arms) - 1, -step_mhz)
    return sorted({min(arms), *(nearest(arms, target) for target in targets)})


def refined(arms: Sequence[int], anchor_mhz: int, span_mhz: int) -> list[int]:
    """All supported clocks within `span_mhz` of the anchor, ascending: the GPU's own step."""
    low = bisect.bisect_left(arms, anchor_mhz - span_mhz)
    return list(arms[low : bisect.bisect_right(arms, anchor_mhz + span_mhz)])
