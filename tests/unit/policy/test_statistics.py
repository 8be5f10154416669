from dataclasses import replace

import numpy as np
import pytest

from agft_ray.errors import PriorError
from agft_ray.policy.experience import Experience
from agft_ray.policy.statistics import ArmStatistics, Source, features_of, validate
from agft_ray.types import Context


def honest(seed=0, windows=20):
    rng = np.random.default_rng(seed)
    statistics = ArmStatistics(9)
    for key in (0, 1230, 2100):
        row = statistics.row(key)
        for _ in range(windows):
            x, reward = np.r_[1.0, rng.random(8)], rng.choice([-4.0, 4.0])
            statistics.add(Source.OWN, row, np.outer(x, x), reward * x)
    return statistics.experience(Source.OWN)


def changed(name, change):
    experience = honest()
    array = getattr(experience, name).copy()
    change(array)
    return replace(experience, **{name: array})


def put(index, value):
    def change(array):
        array[index] = value

    return change


def test_what_windows_can_produce_is_accepted():
    validate(honest(), features=9)
    validate(honest(windows=1))
    validate(Experience((), np.zeros(0), np.zeros((0, 9, 9)), np.zeros((0, 9))), features=9)


@pytest.mark.parametrize(
    ("experience", "problem"),
    [
        (changed("counts", put(1, np.nan)), "counts .*not finite"),
        (changed("responses", put((0, 3), np.inf)), "responses .*not finite"),
        (changed("counts", put(1, -1.0)), "negative number"),
        (changed("grams", put((1, 2, 3), 9.0)), "not symmetric"),
        (changed("grams", put((1, 2, 2), -1.0)), "negative eigenvalue"),
        (changed("counts", put(1, 500.0)), "differs from counts"),
        (changed("responses", put((1, 0), 4.0 * 20 + 0.5)), "rewards outside"),
        (changed("responses", put((1, 5), 90.0)), "rewards outside"),
        (replace(honest(), arms_mhz=(0, 1230, 1230)), "must be different"),
        (replace(honest(), arms_mhz=(0, 1230, -15)), "not negative"),
        (replace(honest(), arms_mhz=(0, 1230)), "shapes are"),
        (replace(honest(), responses=np.zeros((3, 8))), "shapes are"),
    ],
)
def test_what_no_windows_can_produce_is_refused(experience, problem):
    with pytest.raises(PriorError, match=problem):
        validate(experience)


def test_features_must_be_as_many_as_expected():
    with pytest.raises(PriorError, match="expected"):
        validate(honest(), features=7)


@pytest.mark.parametrize("features", [(1.0,) * 8, (0.0,) * 9, (1.0,) * 8 + (np.nan,)])
def test_bad_contexts_are_refused(features):
    with pytest.raises(ValueError, match=r"context\.features"):
        features_of(Context(features, 1))


def test_cap_scales_count_and_sums_together():
    statistics = ArmStatistics(9)
    statistics.replace(Source.PRIOR, honest())
    statistics.cap(Source.PRIOR, 5.0)
    np.testing.assert_allclose(statistics.counts[Source.PRIOR], 5.0)
    np.testing.assert_allclose(statistics.grams[Source.PRIOR], honest().grams / 4)
    np.testing.assert_allclose(statistics.responses[Source.PRIOR], honest().responses / 4)
    statistics.cap(Source.PRIOR, 10.0)
    np.testing.assert_allclose(statistics.counts[Source.PRIOR], 5.0)


def test_replace_forgets_the_prior_before():
    statistics = ArmStatistics(9)
    statistics.replace(Source.PRIOR, honest())
    part = replace(
        honest(),
        arms_mhz=(900,),
        counts=honest().counts[:1],
        grams=honest().grams[:1],
        responses=honest().responses[:1],
    )
    statistics.replace(Source.PRIOR, part)
    assert statistics.experience(Source.PRIOR).arms_mhz == (900,)
    assert statistics.experience(Source.OWN).arms_mhz == ()
