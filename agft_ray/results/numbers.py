"""Numbers as people read them: one way for tables, pages and progress lines."""

from __future__ import annotations

import math
from typing import Literal

from agft_ray.results.spread import Spread

NO_VALUE = "—"
"""Stands where a figure does not exist."""
SIGNIFICANT = 4
"""Digits of a number that stands alone."""
SPREAD_SIGNIFICANT = 3
"""Digits of a number that has an interval beside it."""
HUGE_PERCENT = 1000.0
"""From here on a change is told as a multiple, without its interval."""

Verdict = Literal["better", "worse", "same"]


def decimals(value: float, significant: int = SIGNIFICANT) -> int:
    """Digits after the point, so that so many are significant; none of a larger number or zero."""
    magnitude = math.floor(math.log10(abs(value))) if value else significant
    return min(max(significant - 1 - magnitude, 0), 9)


def number(value: float | None, *, scale: float = 1.0) -> str:
    """Counts in full, other numbers to four digits at least; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if isinstance(value, int) and scale == 1.0:
        return f"{value:,}"
    scaled = value * scale
    return f"{scaled:,.{decimals(scaled) if scaled else SIGNIFICANT - 1}f}"


def spread_text(spread: Spread | None, *, scale: float = 1.0) -> str:
    """A mean and, where there is one, the half width of its interval: '12.3±0.4'."""
    if spread is None:
        return NO_VALUE
    mean = spread.mean * scale
    digits = decimals(mean, SPREAD_SIGNIFICANT)
    width = "" if spread.half_width is None else f"±{spread.half_width * scale:,.{digits}f}"
    return f"{mean:,.{digits}f}{width}"


def change_text(change: Spread | None) -> str:
    """A change in per cent, without the sign for it: '-12.3±0.4'. Whole where it is wide."""
    if change is None:
        return NO_VALUE
    if change.mean >= HUGE_PERCENT:
        return f"x{1.0 + change.mean / 100.0:.0f}"
    half = change.half_width
    digits = 0 if abs(change.mean) >= 100 or (half or 0.0) >= 10 else 1
    return f"{change.mean:+.{digits}f}" + ("" if half is None else f"±{half:.{digits}f}")


def verdict(change: Spread, *, judged: bool = True, visible_percent: float = 0.0) -> Verdict:
    """Whether less, which is better, is there beyond the interval and what can be seen."""
    if not judged or abs(change.mean) <= max(change.half_width or 0.0, visible_percent):
        return "same"
    return "better" if change.mean < 0 else "worse"
