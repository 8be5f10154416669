"""The shipped configs for real GPUs, by `serve run`, with fakes of NVML and of zeusd."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serve_app import running_app, shipped_config, wait_until

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.ray

GPUS = 1

QUICK = {"window_s": 0.5, "settle_s": 0.1, "policy": {"name": "fixed", "sm_clock_mhz": 1200}}


@pytest.fixture
def gpu(fake):
    gpu = fake.gpu(0)
    yield gpu
    wait_until(lambda: gpu.locked_mhz is None, 2, "the reset at the end")


@contextlib.contextmanager
def running_zeusd(directory):
    socket = directory / "zeusd.sock"
    command = [sys.executable, str(TESTS / "fake_zeusd.py"), "--socket", str(socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().strip() == "ready"
            yield socket, process.pid
        finally:
            process.kill()


def replica_in(app, state):
    seen = []

    def found():
        seen[:] = app.alive()
        return next((r for r in seen if r.get("state") == state), None)

    try:
        return wait_until(found, 90, state)
    except AssertionError as error:
        raise AssertionError(f"{error}; last seen: {seen}") from error


def with_user_config(content, **changes):
    (application,) = content["applications"]
    application["deployments"][0]["user_config"] |= changes
    return content


def test_nvml_observes_without_touching_anything_and_controls_when_told(directory, fake, gpu):
    content = shipped_config("nvml.yaml", user_config=QUICK)
    with running_app(directory, content) as app:
        replica = replica_in(app, "observing")
        wait_until(lambda: replica_in(app, "observing")["windows"] > 2, 20, "windows")
        assert replica["gpu_uuid"] == gpu.uuid
        assert replica["energy_source"] == "counter"
        assert fake.log() == [], "observe has set something"
        assert not (directory / "leases").exists()

        app.deploy(with_user_config(content, mode="control"))
        wait_until(lambda: gpu.locked_mhz == (1200, 1200), 20, "the lock")
        controlled = replica_in(app, "tuning")
        assert controlled["tuner_pid"] == replica["tuner_pid"], "replaced for a user_config"
        assert {entry.pid for entry in fake.log()} == {controlled["tuner_pid"]}
        assert [p.name for p in (directory / "leases").glob("*.json")] == [f"{gpu.uuid}.json"]

        gpu.fail("set", 4)
        gpu.fail("reset", 4)
        with_user_config(content, policy={"name": "fixed", "sm_clock_mhz": 900})
        app.deploy(content)
        refused = replica_in(app, "refused")
        assert "CAP_SYS_ADMIN" in refused["reason"]
        writes = len(fake.log())
        windows = refused["windows"]
        wait_until(lambda: replica_in(app, "refused")["windows"] > windows + 3, 20, "windows")
        assert len(fake.log()) == writes, "it tries for ever"
        gpu.fail("set", 0)
        gpu.fail("reset", 0)
        app.deploy(with_user_config(content, idle_windows=4))
        wait_until(lambda: gpu.locked_mhz == (900, 900), 20, "control again")
    wait_until(lambda: gpu.locked_mhz is None, 2, "the reset after the end")
    assert list((directory / "leases").glob("*.json")) == []


def test_zeusd_sets_the_clocks_of_a_replica_that_may_not(directory, fake, gpu):
    written = len(fake.log())
    with running_zeusd(directory) as (socket, zeusd_pid):
        content = shipped_config("zeusd.yaml", gpu={"socket_path": str(socket)}, user_config=QUICK)
        with running_app(directory, content) as app:
            wait_until(lambda: gpu.locked_mhz == (1200, 1200), 40, "the lock")
            assert replica_in(app, "tuning")["guard_pid"] is not None
        wait_until(lambda: gpu.locked_mhz is None, 2, "the reset after the end")
        assert {entry.pid for entry in fake.log()[written:]} == {zeusd_pid}


def test_power_limits_are_set_and_the_one_found_is_put_back(directory, fake, gpu):
    gpu.power_limit_w = 650.5
    policy = {"name": "fixed", "power_limit_w": 400}
    content = shipped_config(
        "nvml.yaml",
        gpu={"actuator": "power_limit"},
        user_config=QUICK | {"mode": "control", "policy": policy},
    )
    with running_app(directory, content) as app:
        wait_until(lambda: gpu.power_limit_w == 400, 40, "the limit")
        wait_until(lambda: replica_in(app, "tuning").get("power_limit_w") == 400, 20, "its status")
        assert gpu.locked_mhz is None
    wait_until(lambda: gpu.power_limit_w == 650.5, 2, "the limit that was found")


def test_a_lost_gpu_has_its_replica_replaced(directory, fake, gpu):
    content = shipped_config("nvml.yaml", user_config=QUICK | {"mode": "control"})
    with running_app(directory, content) as app:
        wait_until(lambda: gpu.locked_mhz == (1200, 1200), 20, "the lock")
        replica = replica_in(app, "tuning")
        gpu.fail("any", 15)

        def is_gone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(replica["replica_pid"], 0)
                return False
            return True

        wait_until(is_gone, 40, "the end of a replica without its GPU")
        gpu.locked_mhz = None  # as the reset or reboot does that brings a lost GPU back
        gpu.fail("any", 0)
        wait_until(lambda: gpu.locked_mhz == (1200, 1200), 60, "its replacement tuning")
