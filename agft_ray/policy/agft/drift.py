"""Change detection on prediction errors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PageHinkley:
    """Two-sided Page-Hinkley test (Page 1954, 'Continuous inspection schemes') around zero.

    Prediction errors have mean zero unless something changed, so the mean is not estimated.
    With `m_t = sum_i (x_i - tolerance)`, the upper sum is `m_t - min_{s<=t} m_s`; it raises the
    alarm once it exceeds `threshold`. The lower sum is the same of `-x`. A constant shift by s
    above the tolerance is found after `threshold / (s - tolerance)` values.
    """

    tolerance: float
    threshold: float
    upper: float = 0.0
    lower: float = 0.0

    def add(self, value: float) -> bool:
        """Take one value; True if the mean has moved."""
        self.upper = max(0.0, self.upper + value - self.tolerance)
        self.lower = max(0.0, self.lower - value - self.tolerance)
        return max(self.upper, self.lower) > self.threshold
