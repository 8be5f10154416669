import math

import pytest

from agft_ray.policy.reward import MAX_REWARD, Reward


def test_difference_of_rewards_is_the_log_ratio_of_edps(make_window):
    a = make_window(mean_power_w=300.0, itl_sum_s=6.0, itl_count=300)
    b = make_window(mean_power_w=180.0, itl_sum_s=6.6, itl_count=300)
    expected = math.log(300.0 * 0.020) - math.log(180.0 * 0.022)
    assert Reward()(b) - Reward()(a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("exponent", "delay_weight"), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)])
def test_closed_form(make_window, exponent, delay_weight):
    window = make_window(mean_power_w=250.0, itl_sum_s=3.0, itl_count=100)
    expected = -(math.log(2.5) + delay_weight * math.log(0.03 / 0.05))
    assert Reward(exponent)(window) == pytest.approx(expected, rel=1e-12)


def test_no_token_no_reward(make_window):
    assert Reward()(make_window(itl_sum_s=0.0, itl_count=0)) is None
    assert Reward()(make_window(mean_power_w=0.0)) is None


def test_slo_excess_is_charged_twice_more(make_window):
    window = make_window(itl_sum_s=30.0, itl_count=300, ttft_sum_s=1.2, ttft_count=2)
    free, bound = Reward(), Reward(slo_tpot_s=0.08, slo_ttft_s=0.5)
    penalty = 2 * math.log(0.1 / 0.08) + 2 * math.log(0.6 / 0.5)
    assert free(window) - bound(window) == pytest.approx(penalty, rel=1e-12)
    assert bound.violates_slo(window)
    assert not free.violates_slo(window)
    assert not Reward(slo_tpot_s=0.2, slo_ttft_s=1.0).violates_slo(window)


def test_rewards_are_bounded(make_window):
    assert Reward()(make_window(mean_power_w=1e9)) == -MAX_REWARD
    assert Reward()(make_window(mean_power_w=1e-9)) == MAX_REWARD
