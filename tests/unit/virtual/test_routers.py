import collections

import pytest

from agft_ray.virtual.routers import build_router, fewest


def test_round_robin_takes_turns_and_asks_nobody():
    router = build_router("round_robin", 3, seed=0)
    assert [fewest(router.candidates(), pytest.fail) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_power_of_two_takes_the_one_with_fewer_of_two_random_ones():
    loads, asked = [5, 1, 3, 0], []

    def ongoing(replica):
        asked.append(replica)
        return loads[replica]

    router, chosen = build_router("power_of_two", 4, seed=1), collections.Counter()
    for _ in range(3000):
        asked.clear()
        choice = fewest(router.candidates(), ongoing)
        assert len(set(asked)) == 2
        assert choice == min(asked, key=loads.__getitem__)
        chosen[choice] += 1
    # Of six pairs the least loaded wins three, the next two, the next one, the last none.
    assert chosen[0] == 0
    for replica, pairs in ((3, 3), (1, 2), (2, 1)):
        assert chosen[replica] == pytest.approx(3000 * pairs / 6, rel=0.1)


def test_power_of_two_is_seeded_and_fair_among_equals():
    def choices(seed):
        router = build_router("power_of_two", 3, seed)
        return [fewest(router.candidates(), lambda replica: 0) for _ in range(3000)]

    assert choices(1) == choices(1) != choices(2)
    assert all(n == pytest.approx(1000, rel=0.1) for n in collections.Counter(choices(1)).values())


def test_one_replica_needs_no_choice():
    assert build_router("power_of_two", 1, seed=0).candidates() == (0,)
