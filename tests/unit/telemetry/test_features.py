import math

import pytest

from agft_ray.telemetry.features import FEATURE_NAMES, FEATURE_SCHEMA, extract


def test_each_feature_by_hand(make_window):
    window = make_window(waiting=0.5, running=9.0, kv_cache_usage=0.3, request_rate_per_s=2.0)
    context = extract(window)
    values = dict(zip(FEATURE_NAMES, context.features, strict=True))
    assert context.schema == FEATURE_SCHEMA
    assert values["bias"] == 1.0
    assert values["has_queue"] == 1.0
    assert values["prefill_throughput"] == pytest.approx(math.log(1001) / math.log(2001))
    assert values["decode_throughput"] == pytest.approx(math.log(151) / math.log(1001))
    assert values["packing_efficiency"] == pytest.approx(math.log(29.75) / math.log(513))
    assert values["concurrency"] == pytest.approx(math.log(10) / math.log(65))
    assert values["kv_cache_usage"] == 0.3
    assert values["cache_hit_rate"] == 0.25
    assert values["request_rate"] == pytest.approx(math.log(3) / math.log(9))


def test_an_empty_window_has_finite_features(make_window):
    empty = make_window(
        iterations=0,
        iteration_tokens=0,
        running=0.0,
        prompt_tokens=0,
        generation_tokens=0,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
        request_rate_per_s=0.0,
        kv_cache_usage=0.0,
    )
    assert extract(empty).features == (1.0, *[0.0] * 8)


def test_non_finite_numbers_are_refused(make_window):
    with pytest.raises(ValueError, match="non-finite"):
        extract(make_window(kv_cache_usage=math.nan))
