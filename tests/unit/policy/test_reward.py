import math

import pytest

from agft_ray.policy.reward import MAX_REWARD, PROMPT_TOKENS, Reward
from agft_ray.types import StepTotals

DECODING = {
    "running": 4.0, "waiting": 0.0,
    "prefill_steps": StepTotals(), "decode_steps": StepTotals(75, 300, 1.9),
}  # fmt: skip
"""4 requests get 75 tokens each in 2 s: one in 26.7 ms."""


def test_while_all_decode_a_difference_is_the_log_ratio_of_energy_times_tpot(
    make_window,
):
    a = make_window(**DECODING, mean_power_w=300.0)
    b = make_window(**DECODING | {"decode_steps": StepTotals(75, 270, 1.9)}, mean_power_w=180.0)
    expected = math.log(300.0 / 300) - math.log(180.0 / 270)
    assert Reward()(b) - Reward()(a) == pytest.approx(expected, rel=1e-12)
    assert Reward()(a) == pytest.approx(-math.log(3.0) - math.log(8.0 / 300 / 0.05), rel=1e-12)


@pytest.mark.parametrize(("exponent", "delay_weight"), [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)])
def test_closed_form(make_window, exponent, delay_weight):
    window = make_window(mean_power_w=250.0)
    delay_s = 4.0 * 2.2 / (300 + 2000 / PROMPT_TOKENS)
    expected = -(math.log(2.5) + delay_weight * math.log(delay_s / 0.05))
    assert Reward(exponent)(window) == pytest.approx(expected, rel=1e-12)


def test_a_window_of_prompts_alone_has_one_and_a_long_step_counts_with_all_its_time(make_window):
    prompts = {"running": 1.0, "decode_steps": StepTotals()}
    quick = make_window(**prompts, prefill_steps=StepTotals(4, 8192, 1.8))
    slow = make_window(**prompts, prefill_steps=StepTotals(1, 2048, 5.0))
    ratio = (2.0 / 8192) / (5.0 / 2048)
    assert Reward()(quick) - Reward()(slow) == pytest.approx(-math.log(ratio), rel=1e-12)


def test_requests_that_wait_make_it_worse(make_window):
    waiting = make_window(waiting=12.0)
    assert Reward()(make_window()) - Reward()(waiting) == pytest.approx(math.log(4.0))
    assert Reward(0.0)(waiting) == Reward(0.0)(make_window())


def test_an_engine_that_does_not_tell_its_steps_counts_prompts_by_their_tokens(make_window):
    steps = {"prefill_steps": StepTotals(), "decode_steps": StepTotals()}
    untold = make_window(**steps, unknown_steps=StepTotals(80, 2300, 2.2))
    assert Reward()(untold) == Reward()(make_window())


def test_nothing_done_no_reward(make_window):
    steps = {"decode_steps": StepTotals(), "prefill_steps": StepTotals()}
    nothing = {"itl_count": 0, "prompt_tokens": 0, **steps}
    assert Reward()(make_window(**nothing)) is None
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
    assert Reward()(make_window(mean_power_w=1e12)) == -MAX_REWARD
    assert Reward()(make_window(mean_power_w=1e-12)) == MAX_REWARD
