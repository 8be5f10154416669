"""NVML that hangs for half a minute costs no request anything: real Ray and Serve, fake NVML."""

import statistics
import time

import pytest
from rig import running

pytestmark = pytest.mark.ray

HANG_S = 30.0
UNHURT_S = 5.0
"""What nothing that is asked of the replica may take, far less than the hang."""
HEARTBEAT_S = 5.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    with running("local", tmp_path_factory.mktemp("chaos")) as (driver, gpu, _):
        driver.deploy(gpu.lease_dir)
        yield driver, gpu
    assert gpu.is_untouched


def look(driver):
    """Whether the replica is healthy, and its tuner's status, both without delay."""
    start_s = time.monotonic()
    driver.call("check_health")
    status = driver.call("status")
    assert time.monotonic() - start_s < UNHURT_S
    return status


def test_requests_do_not_wait_for_nvml(rig):
    driver, gpu = rig
    holder, replica = gpu.wait_locked(), driver.call("ping")
    before_s = driver.latencies_s(3)
    hang_s = time.monotonic()
    for group in ("read", "set"):
        gpu.fake.gpu(0).delay(group, HANG_S)
    during_s = driver.latencies_s(4)
    assert "did not return" in look(driver)["reason"]
    reset = gpu.wait_reset("NVML hangs", holder, HEARTBEAT_S + 1, from_s=hang_s)
    assert reset.pid == holder.guard_pid, "its own process can reach NVML"
    during_s += driver.latencies_s(hang_s + HANG_S - time.monotonic())
    look(driver)
    for group in ("read", "set"):
        gpu.fake.gpu(0).delay(group, 0.0)

    ratio = statistics.median(during_s) / statistics.median(before_s)
    print(f"\nrequests during the hang: {ratio:.2f} times the median latency of before")
    print(f"the longest {max(during_s):.3f} s, before {max(before_s):.3f} s")
    assert max(during_s) < UNHURT_S
    assert driver.call("ping") == replica, "the replica was replaced"
    assert gpu.wait_locked().tuner == holder.tuner, "the tuner goes on"
    assert look(driver)["state"] == "tuning"
