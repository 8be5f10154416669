"""The search over plans of three clocks, against tables that are searched in full."""

import itertools
import math

import numpy as np
import pytest

from agft_ray.study.plan_search import search

SIZES = (20, 28, 33)


def table(rng, *, ttft, tpot, sizes=SIZES):
    """Scores of a smooth world: latencies fall with every clock, energy has one valley for each."""
    prefill, decode, idle = np.meshgrid(*(np.linspace(0.2, 1.0, n) for n in sizes), indexing="ij")
    governor = sizes[2] - 1
    idle[..., governor] = idle[..., governor - 1]
    lag, share, cost = rng.uniform(0.0, 0.03), rng.uniform(0.02, 0.3), rng.uniform(0.0, 0.1)
    ttft_s = 1.0 / prefill + lag * (1.0 / idle) + 0.03 / decode
    tpot_s = (1.0 - share) / decode + share / prefill
    energy_j = (
        rng.uniform(0.1, 0.4) * (prefill**2 + rng.uniform(0.01, 0.2) / prefill)
        + decode**2
        + rng.uniform(0.01, 0.2) / decode
        + cost * idle
    )
    energy_j[..., governor] += rng.uniform(-0.05, 0.05)
    at_top_s = ttft_s[-1, -1, -1], tpot_s[-1, -1, -1]
    allowed = (ttft_s <= at_top_s[0] * (1 + ttft)) & (tpot_s <= at_top_s[1] * (1 + tpot))
    return np.where(allowed, energy_j, math.inf)


class Asked:
    """A table as a score; counts what is asked, and refuses to be asked twice."""

    def __init__(self, scores):
        self.scores, self.points = scores, []

    def __call__(self, points):
        self.points += points
        assert len(set(self.points)) == len(self.points), "asked twice"
        return [float(self.scores[point]) for point in points]


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_what_a_full_search_finds(seed):
    rng = np.random.default_rng(seed)
    scores = table(rng, ttft=rng.uniform(0.03, 0.6), tpot=rng.uniform(0.03, 0.6))
    asked = Asked(scores)
    assert scores[search(asked, SIZES)] == scores.min()
    assert len(asked.points) < scores.size / 50


@pytest.mark.parametrize("seed", range(20))
def test_no_neighbour_is_better_however_rough_the_bounds_are(seed):
    """A tenth of the plans breaks a bound by chance."""
    rng = np.random.default_rng(seed)
    scores = table(rng, ttft=0.3, tpot=0.2)
    scores[rng.random(SIZES) < 0.1] = math.inf
    scores[SIZES[0] - 1, SIZES[1] - 1, 0] = 5.0
    place = search(Asked(scores), SIZES)
    for steps in itertools.product((-1, 0, 1), repeat=3):
        other = tuple(np.clip(np.add(place, steps), 0, np.array(SIZES) - 1))
        assert scores[place] <= scores[other]


def test_default_clocks_while_idle_are_tried_beside_every_neighbour():
    scores = np.full(SIZES, 2.0)
    scores += np.linspace(0.0, 1.0, SIZES[0])[:, None, None]
    scores[..., SIZES[2] - 1] -= 1.0
    assert search(Asked(scores), SIZES) == (0, 0, SIZES[2] - 1)


def test_an_idle_clock_that_rescues_ttft_is_found():
    """The lowest idle clocks break a bound whatever the others are."""
    scores = table(np.random.default_rng(0), ttft=0.3, tpot=0.3)
    scores[..., :7] = math.inf
    assert search(Asked(scores), SIZES)[2] == 7


def test_without_a_plan_within_the_bounds_there_is_none():
    assert search(Asked(np.full(SIZES, math.inf)), SIZES) is None


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 3, 2), (2, 1, 3), (3, 2, 4)])
def test_the_smallest_grids(sizes):
    scores = np.random.default_rng(1).uniform(size=sizes)
    scores[sizes[0] - 1, sizes[1] - 1, 0] = 0.5
    assert scores[search(Asked(scores), sizes)] <= 0.5
