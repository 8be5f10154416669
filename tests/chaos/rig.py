"""What the chaos tests share: a Ray cluster on fake GPUs, and how to see from outside who locked
what. Nothing here asks our own code: the fake's state file and log, the lease records and /proc.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from processes import Process, Watch, is_guard, stat, wait_until

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "fake_nvml"))

from fake_nvml import FakeNvml, build  # noqa: E402

CLOCK_MHZ, PREFILL_MHZ = 1200, 1500
"""What the victim's tuner locks: the one, or both in turns, as the policy says."""
POLICIES = {
    "fixed": {"name": "fixed", "sm_clock_mhz": CLOCK_MHZ},
    "pair": {
        "name": "pair",
        "prefill_sm_clock_mhz": PREFILL_MHZ,
        "decode_sm_clock_mhz": CLOCK_MHZ,
    },
}
RECOVERY_S = 30.0
"""Within which Serve or Ray has replaced what was killed, and the clocks are locked again."""
GUARD_END_S = 15.0
TOKEN = "AGFT_CHAOS_TOKEN"


@dataclass(frozen=True)
class Holder:
    """Who has the lease of a GPU, as its record says."""

    tuner: Process
    guard_pid: int
    fence: int


class Driver:
    """A `driver.py` process, and what it is told to do."""

    def __init__(self, kind, environment, log):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "driver.py"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        )

    def wait_ready(self):
        self._answer(90)

    def __getattr__(self, name):
        return lambda *arguments, **settings: self._ask(name, arguments, settings)

    def start(self, name, *arguments, **settings):
        """Have it do something, without waiting for the end of it; then call `finish`."""
        self._process.stdin.write(json.dumps([name, arguments, settings]) + "\n")
        self._process.stdin.flush()

    def finish(self):
        return self._answer(90)

    def end(self):
        """As a script ends that has nothing left to do; killed if that takes too long."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self.kill()

    def kill(self):
        self._process.kill()
        self._process.wait()

    def _ask(self, name, arguments, settings):
        self.start(name, *arguments, **settings)
        return self.finish()

    def _answer(self, timeout_s):
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if readable else ""
        assert line, f"the driver gave no answer within {timeout_s} s: see its log"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


class Gpu:
    """A node's only GPU (a fake) and its lease."""

    def __init__(self, directory, library, name):
        self.fake = FakeNvml(directory / f"{name}.nvml", gpus=1)
        self.lease_dir = str(directory / f"{name}-leases")
        self.env_vars = self.fake.env(library) | {"AGFT_RAY_LEASE_DIR": self.lease_dir}
        self._owners = {}  # of the guards seen
        self._watches = {}  # of the tuners seen

    @property
    def locked_mhz(self):
        """What is locked, lowest and highest being the same; None for default clocks."""
        locked = self.fake.gpu(0).locked_mhz
        assert locked is None or locked[0] == locked[1]
        return locked and locked[0]

    @property
    def holder(self):
        """By the lease record; None if there is none."""
        path = Path(self.lease_dir, f"{self.fake.gpu(0).uuid}.json")
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        tuner = Process(record["pid"], record["create_time"])
        if record["guard_pid"] is not None:
            self._owners[record["guard_pid"]] = tuner.pid
        return Holder(tuner, record["guard_pid"], record["fence"])

    @property
    def is_untouched(self):
        return self.locked_mhz is None and self.holder is None

    def wait_locked(self, mhz=CLOCK_MHZ, *, after=None, timeout_s=RECOVERY_S):
        """Who holds the lease, once a living and guarded owner, not `after`'s, has locked `mhz`."""

        def locked():
            holder = self.holder
            return (
                self.locked_mhz == mhz
                and holder is not None
                and holder.guard_pid is not None
                and holder.tuner.runs
                and holder.fence % 2 == 0
                and (after is None or holder.tuner != after.tuner)
                and holder
            )

        holder = wait_until(locked, timeout_s, f"{mhz} MHz locked, and by the right owner")
        if holder.tuner not in self._watches:
            self._watches[holder.tuner] = Watch(holder.tuner.pid)
        return holder

    def wait_reset(self, row, holder, bound_s, *, from_s=None):
        """Wait for the reset after the holder's last lock; assert that it came in time.

        The bound counts from the tuner's end, or from `from_s` for one that lives on.
        """
        watch = self._watches[holder.tuner]
        if from_s is None:
            from_s = wait_until(lambda: watch.ended_s, RECOVERY_S, f"{row}: the tuner's end")
        entry = wait_until(lambda: self._reset_after_lock(holder), bound_s + 5, f"{row}: reset")
        took_s = entry.t_ns * 1e-9 - from_s
        print(f"\n{row}: reset {took_s:+.3f} s (bound {bound_s:g} s), by {self._role(entry)}")
        assert took_s <= bound_s, f"{row}: reset only after {took_s:.3f} s"
        return entry

    def wait_let_go(self, holder, timeout_s=1.0):
        """Wait until no record says any more that this very holder has the lease."""
        wait_until(
            lambda: (now := self.holder) is None or now.fence != holder.fence,
            timeout_s,
            f"the lease record of PID {holder.tuner.pid} gone",
        )

    def writes(self):
        return [entry for entry in self.fake.log() if entry.rc == 0]

    def check_writers(self):
        """No two wrote in turns: one is done, and the clocks are reset, before the next begins."""
        spans, last_lock = {}, None
        for number, entry in enumerate(self.writes()):
            owner = self._owners.get(entry.pid, entry.pid)
            first, _ = spans.get(owner, (number, number))
            spans[owner] = first, number
            if is_reset(entry):
                last_lock = None
            else:
                assert last_lock in (None, entry.pid), f"{entry.pid} locked over {last_lock}'s lock"
                last_lock = entry.pid
        end = -1
        for first, last in sorted(spans.values()):
            assert first > end, f"one set clocks before its predecessor was done: {spans}"
            end = last

    def _reset_after_lock(self, holder):
        found = None
        for entry in self.writes():
            if not is_reset(entry) and entry.pid == holder.tuner.pid:
                found = None
            elif is_reset(entry):
                found = found or entry
        return found

    def _role(self, entry):
        return f"the guard {entry.pid}" if entry.pid in self._owners else f"process {entry.pid}"


def is_reset(entry):
    return entry.function.startswith("nvmlDeviceReset")


@contextlib.contextmanager
def running(kind, directory):
    """(driver, GPU, function that makes more GPUs), on a Ray of its own; checks what it left."""
    library = build(directory)
    ray_dir, token = tempfile.mkdtemp(prefix="agft-"), secrets.token_hex(16)
    gpu = Gpu(directory, library, "gpu")
    environment = _environment(ray_dir, token) | (gpu.env_vars if kind == "local" else {})
    with (directory / "driver.log").open("wb") as log:
        driver = Driver(kind, environment, log)
        try:
            driver.wait_ready()
            yield driver, gpu, lambda name: Gpu(directory, library, name)
        finally:
            driver.end()
            _sweep(ray_dir, token)
            shutil.rmtree(ray_dir, ignore_errors=True)


def _environment(ray_dir, token):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited.pop("CUDA_VISIBLE_DEVICES", None)
    return inherited | {
        TOKEN: token,
        "PYTHONPATH": str(HERE),
        "RAY_TMPDIR": ray_dir,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }


def _sweep(ray_dir, token):
    """Kill what is left of the cluster; its guards must end by themselves."""

    def left(*, guards):
        return [pid for pid in _ours(ray_dir, token) if is_guard(pid) == guards]

    for pid in left(guards=False):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        wait_until(lambda: not left(guards=True), GUARD_END_S, "all guards ended")
        wait_until(lambda: not left(guards=False), 5, "all of Ray ended")
    finally:
        for pid in left(guards=True):
            os.kill(pid, signal.SIGKILL)


def _ours(ray_dir, token):
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with contextlib.suppress(OSError):
            of_ray = any(os.readlink(fd).startswith(ray_dir) for fd in (directory / "fd").iterdir())
            marked = f"{TOKEN}={token}\0".encode() in (directory / "environ").read_bytes()
            if (of_ray or marked) and stat(pid)[0] not in "ZX":
                yield pid
