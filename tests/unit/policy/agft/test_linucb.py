import json
import time

import numpy as np
import pytest

from agft_ray.policy.agft.linucb import DECAY_INTERVAL, LinUcb
from agft_ray.priors.merge import add

D = 9


def make(**changes):
    settings = {"features": D, "ridge": 0.3, "slope_ridge": 0.01, "forgetting": 1.0}
    return LinUcb(**(settings | changes))


def windows(seed, n=60, arms=(0, 900, 1200, 1500)):
    rng = np.random.default_rng(seed)
    return [
        (int(rng.choice(arms)), np.r_[1.0, rng.random(D - 1)], float(rng.normal(0, 0.5)))
        for _ in range(n)
    ]


def trained(bandit, *batches):
    for batch in batches:
        for key, x, reward in batch:
            bandit.learn(key, x, reward)
    return bandit


def textbook_baseline(batch, slope_ridge=0.01):
    """Slopes from windows centred on their arm's mean, then the intercept of default clocks."""
    gram, response = slope_ridge * np.eye(D - 1), np.zeros(D - 1)
    for arm in {key for key, _, _ in batch}:
        x = np.array([x[1:] for key, x, _ in batch if key == arm])
        r = np.array([r for key, _, r in batch if key == arm])
        gram += (x - x.mean(0)).T @ (x - x.mean(0))
        response += (x - x.mean(0)).T @ (r - r.mean())
    slopes = np.linalg.solve(gram, response)
    offsets = np.array([r - x[1:] @ slopes for _, x, r in batch])
    default = offsets[[key == 0 for key, _, _ in batch]]
    return np.r_[(default.sum() + offsets.mean()) / (len(default) + 1), slopes]


def test_an_untrained_arm_has_the_closed_form_bonus_and_the_baseline_as_mean():
    x = np.r_[1.0, np.linspace(0, 2, D - 1)]
    fresh = make().predict(x, [1230])
    assert fresh.means[0] == 0.0
    assert fresh.widths[0] == pytest.approx(np.linalg.norm(x) / np.sqrt(0.3))
    bandit = trained(make(), windows(1))
    untrained = bandit.predict(x, [2100])
    assert untrained.means[0] == pytest.approx(bandit.baseline @ x)
    assert untrained.widths[0] == pytest.approx(np.linalg.norm(x) / np.sqrt(0.3))


def test_baseline_and_arm_match_the_closed_form():
    batch = windows(2, n=200)
    bandit = trained(make(), batch)
    beta = textbook_baseline(batch)
    np.testing.assert_allclose(bandit.baseline, beta, atol=1e-9)
    gram = 0.3 * np.eye(D) + sum(np.outer(x, x) for key, x, _ in batch if key == 1200)
    pull = sum((r - x @ beta) * x for key, x, r in batch if key == 1200)
    x = batch[0][1]
    prediction = bandit.predict(x, [1200])
    assert prediction.means[0] == pytest.approx((beta + np.linalg.solve(gram, pull)) @ x)
    assert prediction.widths[0] == pytest.approx(np.sqrt(x @ np.linalg.solve(gram, x)))


def test_load_effects_are_learned_by_all_arms_for_all_arms():
    rng = np.random.default_rng(0)
    bandit = make()
    for _ in range(100):
        x = np.r_[1.0, rng.random(D - 1)]
        bandit.learn(1200, x, 0.5 - 2.0 * x[3])
        bandit.learn(0, np.r_[1.0, np.full(D - 1, 0.5)], -1.0)
    x = np.r_[1.0, np.full(D - 1, 0.5)]
    shift = np.zeros(D)
    shift[3] = 0.4
    near, far = (bandit.predict(at, [1500]).means[0] for at in (x, x + shift))
    assert near == pytest.approx(-1.0, abs=0.05)
    assert far - near == pytest.approx(-0.8, abs=0.02)


def test_inverses_stay_exact_when_few_directions_are_excited():
    bandit, rng = make(forgetting=0.995), np.random.default_rng(5)
    x = np.zeros(D)
    x[0] = 1.0
    for _ in range(20_000):
        x[1] = rng.random()
        bandit.learn(1230, x, rng.normal())
    grams = bandit._grams
    assert bandit.count(1230) == pytest.approx(200, rel=0.1)  # 1 / (1 - 0.995)
    np.testing.assert_array_equal(grams, np.swapaxes(grams, 1, 2))
    a = 0.3 * np.eye(D) + grams
    np.testing.assert_allclose(a @ bandit._inverses, np.broadcast_to(np.eye(D), a.shape), atol=1e-9)
    assert np.linalg.eigvalsh(a).min() >= 0.3 - 1e-9


def test_forgetting_decays_towards_the_prior_and_never_below_it():
    prior = trained(make(), windows(3, n=20)).experience()
    bandit = make(forgetting=0.9)
    bandit.merge(prior, max_windows=100.0)
    before = {key: bandit.count(key) for key in bandit.keys}
    for _ in range(40 * DECAY_INTERVAL):
        bandit.learn(2100, np.r_[1.0, np.zeros(D - 1)], 0.0)
    assert {key: bandit.count(key) for key in before} == pytest.approx(before)
    np.testing.assert_allclose(bandit.experience().counts.sum(), 16 / (0.9**-16 - 1))


def test_merging_equals_training_on_the_union():
    ours, theirs, others = windows(1), windows(2), windows(3)
    shared = add([trained(make(), batch).experience() for batch in (theirs, others)])
    bandit = make()
    bandit.merge(shared, max_windows=1e9)
    trained(bandit, ours)
    union = trained(make(), others, ours, theirs)
    x, keys = np.r_[1.0, np.full(D - 1, 0.7)], [0, 900, 1200, 1500, 2100]
    np.testing.assert_allclose(bandit.baseline, union.baseline, atol=1e-9)
    a, b = bandit.predict(x, keys), union.predict(x, keys)
    np.testing.assert_allclose(a.means, b.means, atol=1e-9)
    np.testing.assert_allclose(a.widths, b.widths, atol=1e-9)


def test_a_merged_prior_is_replaced_capped_and_never_handed_on():
    first, second = (trained(make(), windows(seed)).experience() for seed in (1, 2))
    bandit = trained(make(), windows(3, n=5))
    own = bandit.experience()
    bandit.merge(first, max_windows=4.0)
    bandit.merge(second, max_windows=4.0)
    only = trained(make(), windows(3, n=5))
    only.merge(second, max_windows=4.0)
    assert max(bandit.count(key) for key in bandit.keys) <= 4.0 + 5.0
    np.testing.assert_allclose(bandit.baseline, only.baseline, atol=1e-12)
    np.testing.assert_array_equal(bandit.experience().grams, own.grams)


def test_borrowing_follows_the_nearest_explored_arm_and_is_not_experience():
    bandit = make(borrow_windows=2.0, borrow_span_mhz=45.0)
    x = np.r_[1.0, np.zeros(D - 1)]
    for _ in range(50):
        bandit.learn(1200, x, 1.0)
        bandit.learn(0, x, 0.0)
    mean, far = bandit.predict(x, [1230, 1260]).means
    beta = bandit.baseline @ x
    assert mean == pytest.approx(beta + 2.0 * (1.0 - beta) / 2.3)  # two windows against the ridge
    assert far == pytest.approx(beta)
    before = bandit.predict(x, [1230])
    bandit.learn(1230, x, float(before.means[0]))
    assert bandit.predict(x, [1230]).means[0] == pytest.approx(before.means[0], abs=0.02)
    experience = bandit.experience()
    assert experience.counts[experience.arms_mhz.index(1230)] == 1.0


@pytest.mark.parametrize(
    ("x", "reward"),
    [
        (np.r_[1.0, np.full(D - 1, np.nan)], 0.0),
        (np.r_[1.0, np.zeros(D - 1)], np.inf),
        (np.r_[1.0, np.zeros(D - 2)], 0.0),
        (np.zeros(D), 0.0),
    ],
)
def test_bad_numbers_change_nothing(x, reward):
    bandit = trained(make(), windows(1))
    before, baseline = json.dumps(bandit.snapshot()), bandit.baseline.tobytes()
    for key in (1200, 2100):
        with pytest.raises(ValueError, match="features"):
            bandit.learn(key, x, reward)
    assert json.dumps(bandit.snapshot()) == before
    assert bandit.baseline.tobytes() == baseline


def test_surprise_has_unit_scale_and_forgives_unseen_loads():
    bandit = make()
    rng = np.random.default_rng(1)
    for _ in range(200):
        bandit.learn(1200, np.r_[1.0, 0.5 + 0.02 * rng.standard_normal(D - 1)], 0.1 * rng.normal())
    at = np.r_[1.0, np.full(D - 1, 0.5)]
    errors = [bandit.surprise(1200, at, 0.1 * rng.normal()) for _ in range(400)]
    assert np.std(errors) == pytest.approx(0.1, rel=0.15)
    unseen = at + np.r_[0.0, 1.5, np.zeros(D - 2)]
    assert abs(bandit.surprise(1200, unseen, -1.0)) < 0.5 * abs(bandit.surprise(1200, at, -1.0))


def test_snapshot_continues_identically_and_nonsense_is_refused():
    bandit = trained(make(forgetting=0.99), windows(1))
    copy = make(forgetting=0.99)
    copy.restore(json.loads(json.dumps(bandit.snapshot())))
    for each in (bandit, copy):
        trained(each, windows(2))
    assert json.dumps(copy.snapshot()) == json.dumps(bandit.snapshot())
    nonsense = bandit.snapshot()
    nonsense["statistics"]["counts"][1][1] = -1.0
    for bad in ({}, {"learned": 3}, {"learned": 3, "statistics": {"arms_mhz": [5]}}, nonsense):
        with pytest.raises(ValueError, match="snapshot"):
            copy.restore(bad)


def test_choice_and_update_are_fast_with_130_arms():
    keys, rng = list(range(165, 2101, 15)), np.random.default_rng(0)
    bandit = trained(make(forgetting=0.998), windows(0, n=400, arms=keys))
    times_s = []
    for _ in range(300):
        x = np.r_[1.0, rng.random(D - 1)]
        start_s = time.perf_counter()
        prediction = bandit.predict(x, keys)
        bandit.learn(keys[int(np.argmax(prediction.means + 0.1 * prediction.widths))], x, -0.1)
        times_s.append(time.perf_counter() - start_s)
    assert np.median(times_s) < 3e-3  # 0.3 ms on an idle core; ten times that on a busy one
