"""Learning curves made by hand."""

import numpy as np
import pytest

from agft_ray.results.learning import (
    FleetWindows,
    block_edp_ratios,
    worst_tpot_ratio,
)


def windows(energy_j, tpot_s=0.03, tokens=100.0):
    energy_j = np.asarray(energy_j, dtype=float)
    tokens = np.broadcast_to(tokens, energy_j.shape).astype(float)
    return FleetWindows(energy_j, tokens * tpot_s, tokens)


DEFAULT = windows(np.full(200, 400.0))


def test_the_edp_of_a_block_by_hand():
    run = FleetWindows(np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.array([10.0, 20.0]))
    base = FleetWindows(np.array([2.0, 2.0]), np.array([1.0, 1.0]), np.array([10.0, 10.0]))
    # (4 x 6/30) / (4 x 2/20)
    assert block_edp_ratios(run, base, 2) == pytest.approx([2.0])


def test_changes_of_load_do_not_count():
    """Twice the energy in both runs: the ratio is what it was."""
    load = np.repeat([1.0, 2.0], 100)
    ratios = block_edp_ratios(windows(200.0 * load), windows(400.0 * load))
    assert ratios == pytest.approx(np.full(181, 0.5))


def test_windows_without_tokens_have_no_edp():
    tokens = np.full(200, 100.0)
    tokens[100:140] = 0.0
    run = windows(np.full(200, 200.0), tokens=tokens)
    base = windows(np.full(200, 400.0), tokens=tokens)
    silent = np.flatnonzero(np.isnan(block_edp_ratios(run, base)))
    assert silent.tolist() == list(range(100, 121))


def test_the_longer_of_two_runs_is_cut():
    longer = windows(np.full(300, 200.0))
    assert len(block_edp_ratios(longer, DEFAULT)) == 181


def test_the_worst_window_is_sought_before_the_end_of_learning():
    tpot_s = np.full(200, 0.03)
    tpot_s[[5, 90]] = 0.06, 0.30
    run = windows(np.full(200, 200.0), tpot_s=tpot_s)
    assert worst_tpot_ratio(run, DEFAULT, 50) == pytest.approx(2.0)
    assert worst_tpot_ratio(run, DEFAULT, None) == pytest.approx(10.0)
    assert worst_tpot_ratio(run, DEFAULT, 0) is None
