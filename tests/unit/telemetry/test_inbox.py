import pytest

from agft_ray.errors import StaleMetricsError
from agft_ray.telemetry.inbox import CAPACITY, EngineInbox


def test_latest_since_and_late_deliveries(make_engine_sample):
    inbox = EngineInbox()
    with pytest.raises(StaleMetricsError, match="no statistics yet"):
        inbox.latest(0.0, 1.0)
    for t_s in (1.0, 2.0, 1.5, 3.0, 3.0):
        inbox.push(make_engine_sample(t_s))
    assert [s.t_s for s in inbox.since(2.0)] == [2.0, 3.0]
    assert inbox.latest(4.0, 1.0).t_s == 3.0
    with pytest.raises(StaleMetricsError, match=r"1\.5 s old, the limit is 1\.0"):
        inbox.latest(4.5, 1.0)


def test_memory_is_bounded(make_engine_sample):
    inbox = EngineInbox()
    for t_s in range(3 * CAPACITY):
        inbox.push(make_engine_sample(float(t_s)))
    assert len(inbox.since(0.0)) == CAPACITY
