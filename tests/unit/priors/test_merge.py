import numpy as np
import pytest

from agft_ray.errors import PriorError
from agft_ray.policy.experience import Experience
from agft_ray.policy.statistics import FEATURES, validate
from agft_ray.priors.merge import add


def of(arms, seed, d=FEATURES, windows=5):
    rng = np.random.default_rng(seed)
    x = np.concatenate(
        [np.ones((len(arms), windows, 1)), rng.random((len(arms), windows, d - 1))], 2
    )
    rewards = rng.uniform(-4, 4, (len(arms), windows))
    return Experience(
        tuple(arms),
        np.full(len(arms), float(windows)),
        np.einsum("kwi,kwj->kij", x, x),
        np.einsum("kw,kwi->ki", rewards, x),
    )


def assert_equal(a, b):
    assert a.arms_mhz == b.arms_mhz
    for name in ("counts", "grams", "responses"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12)


def test_arms_are_aligned_and_summed():
    a, b = of([0, 1230, 2100], 1), of([1500, 1230], 2)
    total = add([a, b])
    assert total.arms_mhz == (0, 1230, 1500, 2100)
    np.testing.assert_array_equal(total.counts, [5, 10, 5, 5])
    np.testing.assert_array_equal(total.grams[1], a.grams[1] + b.grams[1])
    np.testing.assert_array_equal(total.responses[2], b.responses[0])
    validate(total, features=FEATURES)


def test_commutative_associative_and_nothing_is_neutral():
    a, b, c = of([0, 1230], 1), of([1230, 900], 2), of([2100, 0, 900], 3)
    assert_equal(add([a, b, c]), add([c, a, b]))
    assert_equal(add([add([a, b]), c]), add([a, add([b, c])]))
    assert_equal(add([a, add([])]), a)
    assert add([]).grams.shape == (0, FEATURES, FEATURES)


def test_inputs_stay_as_they_are():
    a = of([0], 1)
    before = a.grams.copy()
    add([a, a])
    np.testing.assert_array_equal(a.grams, before)


def test_different_schemas_are_not_added():
    with pytest.raises(PriorError, match=r"\[5, 7\] features"):
        add([of([0], 1), of([0], 1, d=7)])
