import pytest

from agft_ray.policy.baselines.activity import ActivityConfig, ActivityPolicy
from agft_ray.types import StepTotals
from unit.policy.policy_tools import choice, outcome


def chosen(make_window, prefill_s, decode_s, unknown_s=0.0, **settings):
    policy = ActivityPolicy(ActivityConfig(**settings))
    steps = {
        name: StepTotals(1, 1, time_s)
        for name, time_s in (
            ("prefill_steps", prefill_s),
            ("decode_steps", decode_s),
            ("unknown_steps", unknown_s),
        )
    }
    policy.update(outcome(make_window(**steps), 1230))
    return choice(policy)


@pytest.mark.parametrize(
    ("prefill_s", "decode_s", "expected"),
    [(0.0, 1.0, 1155), (1.0, 0.0, 2100), (0.5, 0.5, 1635), (0.1, 0.1, 1635), (0.0, 0.0, 2100)],
)
def test_the_clock_follows_the_compute_bound_share_of_the_busy_time(
    make_window, prefill_s, decode_s, expected
):
    # (2100 - 1155) / 2 + 1155 = 1627.5, of two clocks as near the higher one
    assert chosen(make_window, prefill_s, decode_s) == expected


@pytest.mark.parametrize(
    ("phi", "lowest", "highest"),
    [(0.5, 1200, 2100), (1.0, 1200, 1200), (0.75, 1200, 1650), (0.25, 1650, 2100), (0, 2100, 2100)],
)
def test_phi_moves_the_two_clocks_as_in_geopm(make_window, phi, lowest, highest):
    settings = {"phi": float(phi), "efficient_mhz": 1200}
    assert chosen(make_window, 0.0, 1.0, **settings) == lowest
    assert chosen(make_window, 1.0, 0.0, **settings) == highest


def test_steps_of_unknown_kind_count_as_compute_bound(make_window):
    assert chosen(make_window, 0.0, 0.0, 1.0) == 2100


def test_decode_may_count_in_part(make_window):
    assert chosen(make_window, 0.0, 1.0, decode_activity=1.0) == 2100


def test_without_a_window_it_is_the_highest_clock():
    policy = ActivityPolicy(ActivityConfig())
    assert choice(policy) == 2100
