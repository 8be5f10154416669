"""A tuner's figures for people."""

from agft_ray.actors.tuner_status import window_figures


def test_a_window_says_between_which_moments_it_counted(make_window):
    window = make_window(
        start_s=10.0, end_s=12.0, prompt_tokens=80, generation_tokens=30, ttft_count=2, e2e_count=1
    )
    figures = window_figures(window)
    assert (figures["start_s"], figures["end_s"]) == (10.0, 12.0)
    assert (figures["prompt_tokens"], figures["generation_tokens"]) == (80, 30)
    assert (figures["first_tokens"], figures["requests"]) == (2, 1)
