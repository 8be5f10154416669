"""`agft-ray bench decision`: that it measures what it says."""

from agft_ray.bench.decision import bench_decision


def test_each_part_is_timed():
    timings = bench_decision(arms=20, steps=30, seed=0)
    assert [timing.what.split()[0].rstrip(":") for timing in timings] == [
        "agft",
        "LinUCB",
        "phases",
        "switch",
    ]
    assert all(0 < timing.median_ms <= timing.p99_ms for timing in timings)
