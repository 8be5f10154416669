"""The shipped configs for real GPUs, by `serve run`, with fakes of NVML and of zeusd.

One `serve run` for all: what a test has served is deleted after it, before the next one's comes.
"""

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
    return fake.gpu(0)


def exists(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


class Serving:
    """A `serve run` under way, which began with the content."""

    def __init__(self, app, content):
        self._app, self._content = app, content
        self._http_options = content["http_options"]

    def serve(self, content):
        """Have it serve this, and nothing that it has served before."""
        content["http_options"] = self._http_options
        if content != self._content:
            self.delete()
            self._app.deploy(content)
            wait_until(self._app.alive, 90, "a replica of it")
        self._content = content
        return self._app

    def delete(self):
        """Returns once replica and tuner have ended."""
        pids = [r[f"{name}_pid"] for r in self._app.alive() for name in ("replica", "tuner")]
        self._app.deploy({"applications": []})
        self._content = None
        wait_until(lambda: not any(map(exists, pids)), 40, f"the end of {pids}")


@pytest.fixture(scope="module")
def serving(directory, fake):
    content = shipped_config("nvml.yaml", user_config=QUICK)
    with running_app(directory, content) as app:
        yield Serving(app, content)
    wait_until(lambda: is_let_go(directory, fake.gpu(0)), 2, "the reset after the end")


def leases(directory):
    return [path.name for path in (directory / "leases").glob("*.json")]


def is_let_go(directory, gpu):
    return gpu.locked_mhz is None and leases(directory) == []


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


def test_nvml_observes_without_touching_anything_and_controls_when_told(
    serving, directory, fake, gpu
):
    content = shipped_config("nvml.yaml", user_config=QUICK)
    app = serving.serve(content)
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
    assert leases(directory) == [f"{gpu.uuid}.json"]

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
    serving.delete()
    wait_until(lambda: is_let_go(directory, gpu), 2, "the reset after the end")


def test_zeusd_sets_the_clocks_of_a_replica_that_may_not(serving, directory, fake, gpu):
    written = len(fake.log())
    with running_zeusd(directory) as (socket, zeusd_pid):
        content = shipped_config("zeusd.yaml", gpu={"socket_path": str(socket)}, user_config=QUICK)
        app = serving.serve(content)
        wait_until(lambda: gpu.locked_mhz == (1200, 1200), 40, "the lock")
        assert replica_in(app, "tuning")["guard_pid"] is not None
        serving.delete()
        wait_until(lambda: gpu.locked_mhz is None, 2, "the reset after the end")
        assert {entry.pid for entry in fake.log()[written:]} == {zeusd_pid}


def test_power_limits_are_set_and_the_one_found_is_put_back(serving, gpu):
    gpu.power_limit_w = 650.5
    policy = {"name": "fixed", "power_limit_w": 400}
    content = shipped_config(
        "nvml.yaml",
        gpu={"actuator": "power_limit"},
        user_config=QUICK | {"mode": "control", "policy": policy},
    )
    app = serving.serve(content)
    wait_until(lambda: gpu.power_limit_w == 400, 40, "the limit")
    wait_until(lambda: replica_in(app, "tuning").get("power_limit_w") == 400, 20, "its status")
    assert gpu.locked_mhz is None
    serving.delete()
    wait_until(lambda: gpu.power_limit_w == 650.5, 2, "the limit that was found")


def test_a_lost_gpu_has_its_replica_replaced(serving, gpu):
    content = shipped_config("nvml.yaml", user_config=QUICK | {"mode": "control"})
    app = serving.serve(content)
    wait_until(lambda: gpu.locked_mhz == (1200, 1200), 20, "the lock")
    replica = replica_in(app, "tuning")
    gpu.fail("any", 15)
    wait_until(
        lambda: not exists(replica["replica_pid"]), 40, "the end of a replica without its GPU"
    )
    gpu.locked_mhz = None  # as the reset or reboot does that brings a lost GPU back
    gpu.fail("any", 0)
    wait_until(lambda: gpu.locked_mhz == (1200, 1200), 60, "its replacement tuning")
