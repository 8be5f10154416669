import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agft_ray.errors import GpuError
from agft_ray.gpu.guard import Guard
from agft_ray.gpu.simulated import SimulatedGpu
from agft_ray.simulation.device_file import DeviceFile

OWNER = """
import sys, time
from agft_ray.gpu.guard import Guard
from agft_ray.gpu.simulated import SimulatedGpu
paths = sys.argv[1:]
guard = Guard.start(paths)
for path in paths:
    SimulatedGpu(path).lock(900)
print(guard.pid, flush=True)
time.sleep(60)
"""


def make(path):
    DeviceFile.create(path, uuid="GPU-0", profile="rtx_a6000", model="llama-3.1-8b")
    return path


@pytest.fixture
def path(tmp_path):
    return make(tmp_path / "gpu.json")


@pytest.fixture
def guard(path):
    guard = Guard.start([path])
    yield guard
    guard.release()
    assert within_1_s(lambda: not runs(guard.pid))


def locked_mhz(path):
    return json.loads(path.read_text())["locked_sm_clock_mhz"]


def stat_fields(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def runs(pid):
    try:
        return stat_fields(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def within_1_s(condition):
    deadline_s = time.monotonic() + 1.0
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True


def test_the_owner_killed_means_a_reset_of_all_its_gpus(path, tmp_path):
    paths = [path, make(tmp_path / "second.json")]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *map(str, paths)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        guard_pid = int(owner.stdout.readline())
        assert [locked_mhz(p) for p in paths] == [900, 900]
        assert runs(guard_pid)
        os.kill(owner.pid, signal.SIGKILL)
        assert within_1_s(lambda: [locked_mhz(p) for p in paths] == [None, None])
    assert within_1_s(lambda: not runs(guard_pid))


def test_the_clock_really_returns(path):
    guard = Guard.start([path])
    gpu = SimulatedGpu(path)
    gpu.lock(900)
    assert within_1_s(lambda: gpu.read().sm_clock_mhz == 900)
    os.kill(guard.pid, signal.SIGTERM)
    assert within_1_s(lambda: gpu.read().sm_clock_mhz > 900)
    assert within_1_s(lambda: not guard.is_alive)
    guard.release()


def test_release_ends_it_without_a_reset(path, guard):
    SimulatedGpu(path).lock(900)
    guard.release()
    guard.release()
    assert within_1_s(lambda: not runs(guard.pid))
    assert locked_mhz(path) == 900
    assert not guard.is_alive


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_guard_that_is_stopped_resets_first(path, guard, signum):
    SimulatedGpu(path).lock(900)
    os.kill(guard.pid, signum)
    assert within_1_s(lambda: locked_mhz(path) is None)


def test_a_killed_guard_is_noticed(path, guard):
    assert guard.is_alive
    os.kill(guard.pid, signal.SIGKILL)
    assert within_1_s(lambda: not guard.is_alive)


def test_it_is_nobodys_child_and_in_its_own_session(guard):
    parent, session = (int(stat_fields(guard.pid)[k]) for k in (1, 3))
    assert parent != os.getpid()
    assert session not in (os.getsid(0), 0)
    with pytest.raises(ChildProcessError):
        os.waitpid(guard.pid, os.WNOHANG)


def test_it_is_small_and_holds_nothing_of_its_owner(guard, tmp_path):
    fds = Path(f"/proc/{guard.pid}/fd")
    targets = [os.readlink(fd) for fd in fds.iterdir()]
    assert all(target.startswith("pipe:") or target == os.devnull for target in targets), targets
    status = Path(f"/proc/{guard.pid}/status").read_text()
    rss_kb = int(status.partition("VmRSS:")[2].split()[0])
    assert rss_kb < 16_000


def test_a_forked_child_of_the_owner_does_not_keep_the_pipe_open(path):
    guard = Guard.start([path])
    SimulatedGpu(path).lock(900)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        guard._close()
        assert within_1_s(lambda: locked_mhz(path) is None)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lost_gpu_does_not_keep_the_others_locked(path, tmp_path):
    gone = make(tmp_path / "a-gone.json")
    guard = Guard.start([gone, path])
    SimulatedGpu(path).lock(900)
    gone.unlink()
    os.kill(guard.pid, signal.SIGTERM)
    assert within_1_s(lambda: locked_mhz(path) is None)
    guard.release()


def test_a_guard_that_cannot_start_says_why(path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GpuError, match="did not start: it said nothing"):
        Guard.start([path])
