import dataclasses

import numpy as np
import pytest

from agft_ray.clock import ManualClock
from agft_ray.errors import PriorError
from agft_ray.policy.experience import Experience, PriorKey
from agft_ray.policy.statistics import FEATURES as D
from agft_ray.priors.store import MAX_RETIRED, ExperienceStore, ReplicaReport

KEY = PriorKey("RTX A6000", "llama", 1, "mixed", "none", "edp", 2.0, 1, 1, "agft")


def experience(seed, arms=(0, 1230)):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (len(arms), 5, D))
    x[:, :, 0] = 1.0
    r = rng.uniform(-1, 1, (len(arms), 5))
    return Experience(
        arms,
        np.full(len(arms), 5.0),
        np.einsum("kni,knj->kij", x, x),
        np.einsum("kn,kni->ki", r, x),
    )


def report(replica, rank, seed=None, key=KEY, deployment="app#llm"):
    learned = None if seed is None else experience(seed)
    return ReplicaReport(replica, deployment, rank, key, learned, {"rank": rank})


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def store(clock):
    return ExperienceStore(clock=clock, expiry_s=6.0)


def test_a_prior_is_the_sum_of_the_others(store):
    store.report(report("a", 0, seed=1))
    store.report(report("b", 1, seed=2))
    prior = store.report(report("c", 2, seed=3)).prior
    assert prior.replicas == 2
    expected = experience(1).grams + experience(2).grams
    np.testing.assert_allclose(prior.experience.grams, expected, rtol=1e-12)
    np.testing.assert_allclose(prior.experience.counts, [10.0, 10.0])


def test_nothing_is_counted_twice_however_often_it_is_sent(store):
    for _ in range(5):
        store.report(report("a", 0, seed=1))
    prior = store.report(report("b", 1, seed=2)).prior
    np.testing.assert_array_equal(prior.experience.counts, experience(1).counts)


def test_the_version_tells_whether_the_prior_is_another_one(store, clock):
    store.report(report("a", 0, seed=1))
    first = store.report(report("b", 1, seed=2)).prior.version
    assert store.report(report("b", 1, seed=22)).prior.version == first, "its own is not in it"
    store.report(report("a", 0, seed=1))
    assert store.report(report("b", 1, seed=2)).prior.version == first
    store.report(report("a", 0, seed=3))
    second = store.report(report("b", 1, seed=2)).prior.version
    store.report(report("c", 2, seed=4))
    third = store.report(report("b", 1, seed=2)).prior.version
    store.report(report("c", 2, seed=4, key=dataclasses.replace(KEY, window_s=4.0)))
    fourth = store.report(report("b", 1, seed=2)).prior.version
    assert first < second < third < fourth
    clock.advance_to(100.0)
    again = ExperienceStore(clock=clock, expiry_s=6.0)
    again.report(report("a", 0, seed=1))
    assert again.report(report("b", 1, seed=2)).prior.version > fourth, "a later aggregator's"


def test_a_prior_that_a_replica_has_is_not_sent_again(store):
    store.report(report("a", 0, seed=1))
    first = store.report(report("b", 1))
    assert not first.keeps_prior
    asks_again = dataclasses.replace(report("b", 1), prior_version=first.prior.version)
    again = store.report(asks_again)
    assert (again.prior, again.keeps_prior) == (None, True)
    assert again.prior_after(first.prior) is first.prior
    store.report(report("a", 0, seed=2))
    newer = store.report(asks_again)
    assert newer.prior.version > first.prior.version
    assert newer.prior_after(first.prior) is newer.prior
    store.report(dataclasses.replace(report("a", 0), experience=None))
    gone = store.report(asks_again)
    assert gone.prior_after(first.prior) is None


def test_keys_are_kept_apart(store):
    store.report(report("a", 0, seed=1, key=dataclasses.replace(KEY, gpu_model="H100")))
    assert store.report(report("b", 1, seed=2)).prior is None


def test_malformed_experience_is_refused_and_the_previous_kept(store):
    store.report(report("a", 0, seed=1))
    bad = experience(9)
    bad.grams[0, 0, 0] = np.nan
    with pytest.raises(PriorError):
        store.report(dataclasses.replace(report("a", 0), experience=bad))
    prior = store.report(report("b", 1, seed=2)).prior
    np.testing.assert_array_equal(prior.experience.grams, experience(1).grams)


def test_order_by_rank_among_the_living(store, clock):
    for replica, rank in (("x", 3), ("y", 1), ("z", 2)):
        store.report(report(replica, rank))
    assert [store.report(report(r, k)).order for r, k in (("y", 1), ("z", 2), ("x", 3))] == [
        0,
        1,
        2,
    ]
    clock.advance_to(5.0)
    store.report(report("z", 2))
    clock.advance_to(7.0)
    reply = store.report(report("x", 3))
    assert (reply.order, reply.live) == (1, 2), "y has been silent too long"


def test_a_replacement_with_the_same_rank_takes_the_place_at_once(store):
    store.report(report("old", 0, seed=1))
    store.report(report("other", 1))
    reply = store.report(report("new", 0))
    assert (reply.order, reply.live) == (0, 2)
    assert reply.prior.replicas == 1, "the experience of the dead is lost"
    alive = {status["replica"]: status["alive"] for status in store.statuses("app#llm")}
    assert alive == {"old": False, "other": True, "new": True}


def test_unknown_ranks_come_last(store):
    store.report(report("a", None))
    store.report(report("b", None))
    assert store.report(report("c", 5)).order == 0


def test_deployments_have_ranks_of_their_own(store):
    store.report(report("a", 0))
    reply = store.report(report("b", 0, deployment="other#llm"))
    assert (reply.order, reply.live) == (0, 1)


def test_memory_is_bounded_and_the_experience_of_the_gone_stays(store, clock):
    total = 2 * MAX_RETIRED
    for index in range(total):
        clock.advance_to(10.0 * index)
        store.report(report(f"r{index}", 0, seed=index))
    assert len(store.statuses()) <= MAX_RETIRED + 1
    prior = store.report(report("last", 1)).prior
    assert prior.replicas == total
    expected = sum(experience(index).grams for index in range(total))
    np.testing.assert_allclose(prior.experience.grams, expected, rtol=1e-9)
    store.report(report("r0", 2, seed=0))
    again = store.report(report("last", 1)).prior
    np.testing.assert_allclose(again.experience.counts, prior.experience.counts)
