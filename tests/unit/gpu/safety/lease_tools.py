"""What the tests of leases, restore and guard share: simulated GPUs, and owners in processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from polling import wait_until, within

from agft_ray.errors import LeaseHeldError
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.lease import Lease
from agft_ray.simulation.device_file import DeviceFile

ROOT = Path(__file__).parents[4]
PATHS = [str(ROOT), str(ROOT / "tests")]
"""What a script that uses these tools needs on its path."""

OWNER = """
import sys, time
sys.path[:0] = {paths!r}
from unit.gpu.safety.lease_tools import acquire, lock_clocks
from agft_ray.gpu.safety.guard import Guard
directory, heartbeat_s, *states = sys.argv[1:]
leases = [acquire(directory, state) for state in states]
guard = Guard.start(leases, heartbeat_s=float(heartbeat_s))
for state in states:
    lock_clocks(state)
print(guard.pid, flush=True)
while True:
    guard.beat()
    time.sleep(0.02)
"""


def make_gpu(path, uuid="GPU-0"):
    DeviceFile.create(path, uuid=uuid, profile="rtx_a6000", model="llama-3.1-8b")
    return path


def simulated_target(path, uuid="GPU-0"):
    return {
        "uuid": uuid,
        "backend": "simulated",
        "actuator": "sm_clock",
        "path": str(path),
        "index": None,
        "token_path": "",
        "restore_power_limit_w": None,
        "restore_sm_clocks_mhz": None,
    }


def uuid_of(path):
    return json.loads(Path(path).read_text())["uuid"]


def acquire(directory, path, **options):
    target = simulated_target(path, uuid_of(path))
    return Lease.acquire(
        directory, target["uuid"], lambda: target, owner="app#llm replica 1", **options
    )


def acquire_soon(directory, path):
    """Once the guard has let the lock go."""

    def attempt():
        try:
            return acquire(directory, path)
        except LeaseHeldError:
            return None

    return wait_until(attempt, what="a free lease")


def lock_clocks(path, mhz=900):
    with DeviceFile(path).transaction() as state:
        state["locked_sm_clock_mhz"] = mhz


def locked_mhz(path):
    return json.loads(Path(path).read_text())["locked_sm_clock_mhz"]


def replace_content(path, content):
    """In one step: a GPU whose file is half written would pass for one that is gone."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(path)


def pass_time(monkeypatch, seconds):
    """Let bars of this process see that so much time has passed."""
    boottime_ns = lease_record.boottime_ns
    monkeypatch.setattr(lease_record, "boottime_ns", lambda: boottime_ns() + int(seconds * 1e9))


def clock_calls(path):
    return json.loads(Path(path).read_text())["clock_calls"]


def stat_fields(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def runs(pid):
    try:
        return stat_fields(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Owner:
    """A process that holds leases, has locked the clocks, and beats."""

    def __init__(self, directory, *states, heartbeat_s=5.0, env=None):
        script = OWNER.format(paths=PATHS)
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, directory, str(heartbeat_s), *states],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.pid = self._process.pid
        self.guard_pid = int(self._process.stdout.readline())

    def kill(self, signum=signal.SIGKILL):
        self._process.send_signal(signum)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        if not within(2.0, lambda: not runs(self.guard_pid)):
            os.kill(self.guard_pid, signal.SIGKILL)
