import pytest

from agft_ray.telemetry.ray_metrics import ReplicaSeries, ServeMetrics, parse, to_sample
from agft_ray.types import ServeSample

TEXT = """\
# HELP ray_serve_deployment_request_counter_total x
ray_serve_deployment_request_counter_total{application="a",replica="r1",route="/v1/x"} 10.0
ray_serve_deployment_request_counter_total{application="a",replica="r1",route="/v1/y"} 5.0
ray_serve_deployment_request_counter_total{application="a",replica="r1",route="/agft/status"} 99.0
ray_serve_deployment_request_counter_total{application="a",replica="r2",route="/v1/x"} 2.0
ray_serve_deployment_processing_latency_ms_sum{replica="r1",route="/v1/x"} 3000.0
ray_serve_deployment_processing_latency_ms_count{replica="r1",route="/v1/x"} 10.0
ray_serve_deployment_processing_latency_ms_bucket{replica="r1",le="1"} 1.0
ray_serve_replica_processing_queries{replica="r1",odd="a\\"b}c"} 4.0
ray_serve_replica_processing_queries{replica="r2"} garbage
ray_node_cpu_utilization{replica="r1"} 50.0
"""


def test_only_the_replicas_own_series_are_kept_and_routes_summed():
    series = parse(TEXT.splitlines(keepends=True))
    assert series["r1"] == ReplicaSeries(15.0, 3.0, 10.0, 4.0)
    assert series["r2"] == ReplicaSeries(requests=2.0)


def test_wall_latencies_become_the_loops_seconds():
    sample = to_sample(ReplicaSeries(15.0, 3.0, 10.0, 4.0), t_s=100.0, speed=4.0)
    assert sample == ServeSample(100.0, 15.0, 12.0, 10.0, 4.0)


def sample(t_s, requests, latency_sum_s=None, count=None, in_flight=None):
    return ServeSample(t_s, requests, latency_sum_s, count, in_flight)


def test_rates_between_the_last_two_different_scrapes():
    metrics = ServeMetrics(max_age_s=10.0)
    assert metrics.window(0.0) is None
    metrics.push(sample(0.0, 1.0))
    metrics.push(sample(4.0, 10.0, 20.0, 10.0, 2.0))
    metrics.push(sample(4.0, 10.0, 20.0, 10.0, 2.0))
    metrics.push(sample(8.0, 18.0, 32.0, 14.0, 3.0))
    window = metrics.window(9.0)
    assert window.request_rate_per_s == pytest.approx(2.0)
    assert window.mean_latency_s == pytest.approx(3.0)
    assert (window.in_flight, window.age_s) == (3.0, 1.0)


def test_missing_stale_or_reset_is_unknown_not_zero():
    metrics = ServeMetrics(max_age_s=10.0)
    metrics.push(sample(0.0, 5.0))
    metrics.push(sample(4.0, None))
    assert metrics.window(4.0) is None
    metrics.push(sample(8.0, 9.0))
    assert metrics.window(8.0) is None
    metrics.push(sample(12.0, 2.0))
    assert metrics.window(12.0) is None
    metrics.push(sample(16.0, 2.0))
    assert metrics.window(16.0).request_rate_per_s == 0.0
    assert metrics.window(26.5) is None
