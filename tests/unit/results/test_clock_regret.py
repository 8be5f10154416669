"""Regret by window, made by hand."""

import numpy as np
import pytest

from agft_ray.results.clock_regret import ClockRegret, windows_to_low_regret


def windows_to_low(*spans, best_j=100.0):
    """Of spans (windows, regret relative to the best)."""
    relative = np.concatenate([np.full(count, share) for count, share in spans])
    return windows_to_low_regret(best_j * relative, np.full(len(relative), best_j))


def test_good_clocks_are_good_from_the_start():
    assert windows_to_low((200, 0.0)) == 0
    assert windows_to_low((200, 0.019)) == 0


def test_bad_clocks_never_become_good():
    assert windows_to_low((200, 0.021)) is None
    assert windows_to_low((1, 0.5)) is None
    assert windows_to_low_regret(np.empty(0), np.empty(0)) is None


def test_what_comes_after_learning_counts_anew():
    """However long the run, its first windows are not diluted by the others."""
    for rest in (1, 100, 10_000):
        assert windows_to_low((60, 0.1), (rest, 0.0)) == 60
        assert windows_to_low((60, 0.1), (rest, 0.01)) == 60


def test_a_bad_window_among_good_ones_is_forgiven_while_the_sum_stays_low():
    # 2 % of 21 windows is 42 J; the bad one has less.
    assert windows_to_low((20, 0.0), (1, 0.41), (20, 0.0)) == 0
    # 43 J is too much: regret is low again only after it.
    assert windows_to_low((20, 0.0), (1, 0.43), (20, 0.0)) == 21


def test_a_relapse_counts():
    assert windows_to_low((60, 0.1), (20, 0.0), (60, 0.1), (20, 0.0)) == 140


def test_the_definition_by_exhaustive_search():
    rng = np.random.default_rng(0)
    for _ in range(50):
        best_j = rng.uniform(50.0, 150.0, 30)
        regret_j = best_j * rng.exponential(0.02, 30) * rng.uniform(0.2, 1.5)
        found = [
            k
            for k in range(30)
            if all(regret_j[k:n].sum() < 0.02 * best_j[k:n].sum() for n in range(k + 1, 31))
        ]
        assert windows_to_low_regret(regret_j, best_j) == (found[0] if found else None)


def test_a_run_in_a_few_numbers():
    regret = ClockRegret.of(np.array([30.0, 0.0]), np.array([100.0, 200.0]), over_bound=1, busy=4)
    assert regret == ClockRegret(30.0, pytest.approx(0.1), 0.25, 1)
    idle = ClockRegret.of(np.array([5.0]), np.array([100.0]), over_bound=0, busy=0)
    assert idle.over_bound is None
    assert ClockRegret.of(np.empty(0), np.empty(0), over_bound=0, busy=0).relative is None
