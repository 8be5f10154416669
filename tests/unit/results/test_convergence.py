"""Learning curves made by hand."""

import numpy as np
import pytest

from agft_ray.results.convergence import (
    FleetWindows,
    block_edp_ratios,
    windows_to_converge,
    worst_tpot_ratio,
)


def windows(energy_j, tpot_s=0.03, tokens=100.0):
    energy_j = np.asarray(energy_j, dtype=float)
    tokens = np.broadcast_to(tokens, energy_j.shape).astype(float)
    return FleetWindows(energy_j, tokens * tpot_s, tokens)


def steps(*spans):
    """Energy by window: (windows, joules) in turn."""
    return np.concatenate([np.full(count, joules) for count, joules in spans])


DEFAULT = windows(np.full(200, 400.0))


def test_the_edp_of_a_block_by_hand():
    run = FleetWindows(np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.array([10.0, 20.0]))
    base = FleetWindows(np.array([2.0, 2.0]), np.array([1.0, 1.0]), np.array([10.0, 10.0]))
    # (4 x 6/30) / (4 x 2/20)
    assert block_edp_ratios(run, base, 2) == pytest.approx([2.0])


def test_a_static_policy_has_converged_from_the_start():
    assert windows_to_converge(DEFAULT, DEFAULT) == 0
    assert windows_to_converge(windows(np.full(200, 200.0)), DEFAULT) == 0


def test_a_step_is_passed_once_the_block_is_within_two_per_cent():
    # After the step at window 60, block i holds 60 - i windows of 400 J among 20: the mean is
    # within 2 % of 200 J when (60 - i) x 200 / 20 <= 4, so only from i = 60 on.
    assert windows_to_converge(windows(steps((60, 400.0), (140, 200.0))), DEFAULT) == 60
    # From 209 J it is (60 - i) x 9 / 20 <= 4: i = 52.
    assert windows_to_converge(windows(steps((60, 209.0), (140, 200.0))), DEFAULT) == 52


def test_changes_of_load_do_not_count():
    """Twice the energy in both runs: the ratio is what it was."""
    load = steps((100, 1.0), (100, 2.0))
    assert windows_to_converge(windows(200.0 * load), windows(400.0 * load)) == 0


def test_a_run_that_goes_astray_at_the_end_never_converges():
    energy_j = steps((170, 200.0), (30, 300.0))
    assert windows_to_converge(windows(energy_j), DEFAULT) is None


def test_too_few_windows_say_nothing():
    few = windows(np.full(79, 200.0))
    assert windows_to_converge(few, few) is None
    enough = windows(np.full(80, 200.0))
    assert windows_to_converge(enough, enough) == 0


def test_windows_without_tokens_are_passed_over():
    tokens = np.full(200, 100.0)
    tokens[100:140] = 0.0
    run = windows(np.full(200, 200.0), tokens=tokens)
    base = windows(np.full(200, 400.0), tokens=tokens)
    assert windows_to_converge(run, base) == 0
    silent = windows(np.full(200, 200.0), tokens=0.0)
    assert windows_to_converge(silent, silent) is None


def test_the_longer_of_two_runs_is_cut():
    longer = windows(np.full(300, 200.0))
    assert len(block_edp_ratios(longer, DEFAULT)) == 181


def test_the_worst_window_is_sought_before_convergence():
    tpot_s = np.full(200, 0.03)
    tpot_s[[5, 90]] = 0.06, 0.30
    run = windows(np.full(200, 200.0), tpot_s=tpot_s)
    assert worst_tpot_ratio(run, DEFAULT, 50) == pytest.approx(2.0)
    assert worst_tpot_ratio(run, DEFAULT, None) == pytest.approx(10.0)
    assert worst_tpot_ratio(run, DEFAULT, 0) is None
