"""The rule by which clocks are ruled out, as a table."""

import math

import pytest

from agft_ray.policy.agft.verdict import Verdict, verdict

RATIO = 4.0  # so a clock is slow below half the rival's, and a gap extreme above log 4
EXTREME, MILD = math.log(RATIO) + 0.1, math.log(RATIO) - 0.1
SIGNIFICANT, DROWNED = 0.5, 2.0
RIVAL_MHZ, SLOW_MHZ, FAST_MHZ = 1400, 699, 701

TABLE = [
    # gap, clock, confirmed, error
    (MILD, FAST_MHZ, True, SIGNIFICANT, Verdict.KEEP),
    (MILD, SLOW_MHZ, True, SIGNIFICANT, Verdict.KEEP),
    (-EXTREME, SLOW_MHZ, True, SIGNIFICANT, Verdict.KEEP),
    (EXTREME, FAST_MHZ, False, SIGNIFICANT, Verdict.KEEP),
    (EXTREME, FAST_MHZ, True, DROWNED, Verdict.KEEP),
    (EXTREME, FAST_MHZ, True, SIGNIFICANT, Verdict.PRUNE),
    (EXTREME, SLOW_MHZ, False, SIGNIFICANT, Verdict.SUSPECT),
    (EXTREME, SLOW_MHZ, True, DROWNED, Verdict.SUSPECT),
    (EXTREME, SLOW_MHZ, False, DROWNED, Verdict.SUSPECT),
    (EXTREME, SLOW_MHZ, True, SIGNIFICANT, Verdict.FLOOR),
]


def judged(gap: float, clock_mhz: int, confirmed: bool, error: float) -> Verdict:
    return verdict(
        gap=gap,
        error=error,
        clock_mhz=clock_mhz,
        rival_mhz=RIVAL_MHZ,
        extreme_edp_ratio=RATIO,
        confirmed=confirmed,
    )


@pytest.mark.parametrize(("gap", "clock_mhz", "confirmed", "error", "expected"), TABLE)
def test_the_table(
    gap: float, clock_mhz: int, confirmed: bool, error: float, expected: Verdict
) -> None:
    assert judged(gap, clock_mhz, confirmed, error) is expected


def test_the_bounds_themselves_are_neither_extreme_nor_slow_nor_significant() -> None:
    assert judged(math.log(RATIO), SLOW_MHZ, True, SIGNIFICANT) is Verdict.KEEP
    assert judged(EXTREME, RIVAL_MHZ // 2, True, SIGNIFICANT) is Verdict.PRUNE
    assert judged(EXTREME, SLOW_MHZ, True, EXTREME) is Verdict.SUSPECT
