import numpy as np
import pytest

from agft_ray.policy.ridge import Ridge, RidgeState

PENALTIES, GUESS = [0.5, 0.01, 2.0], [1.0, 0.0, -1.0]


def trained(samples, forgetting=1.0, seed=0):
    ridge, rng = Ridge(penalties=PENALTIES, guess=GUESS, forgetting=forgetting), None
    rng = np.random.default_rng(seed)
    xs, ys = rng.normal(size=(samples, 3)), rng.normal(size=samples)
    for x, y in zip(xs, ys, strict=True):
        ridge.learn(x, float(y))
    return ridge, xs, ys


def test_without_data_it_is_the_guess():
    np.testing.assert_allclose(trained(0)[0].theta, GUESS)


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_it_is_the_least_squares_solution_of_the_augmented_system(forgetting):
    """Each penalty is one more sample: sqrt(lambda) e_i with the value sqrt(lambda) guess_i."""
    ridge, xs, ys = trained(20, forgetting)
    weights = np.sqrt(forgetting ** np.arange(len(ys))[::-1])
    roots = np.sqrt(PENALTIES)
    rows = np.vstack([xs * weights[:, None], np.diag(roots)])
    values = np.concatenate([ys * weights, roots * GUESS])
    expected, *_ = np.linalg.lstsq(rows, values, rcond=None)
    np.testing.assert_allclose(ridge.theta, expected, rtol=1e-9)


def test_a_state_continues_identically_and_a_wrong_one_changes_nothing():
    ridge, xs, _ = trained(10, 0.9)
    copy = Ridge(penalties=PENALTIES, guess=GUESS, forgetting=0.9)
    copy.restore(RidgeState.model_validate_json(ridge.state().model_dump_json()))
    for each in (ridge, copy):
        each.learn(xs[0], 2.0)
    assert ridge.state() == copy.state()
    before = copy.state()
    with pytest.raises(ValueError, match="shapes"):
        copy.restore(RidgeState(gram=[[1.0]], response=[1.0], samples=1))
    assert copy.state() == before
