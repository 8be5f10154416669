"""From an arrival in the replica's process to the GPU's being called in the tuner's: how long."""

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agft_ray.actors.phase_socket import phase_path
from agft_ray.serve.live_switch import LiveSwitch
from agft_ray.simulation.device_file import DeviceFile

FOLLOWER = Path(__file__).with_name("phase_follower.py")
ARRIVALS = 60


class Follower:
    """The tuner's process, and the locks it tells of."""

    def __init__(self, device):
        command = [sys.executable, str(FOLLOWER), str(device)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.locks = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            t_s, arm = line.split()
            self.locks.put((float(t_s), int(arm)))

    def next(self, arm, timeout_s=20.0):
        """When this clock was set, of all that come."""
        others, deadline_s = [], time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                t_s, found = self.locks.get(timeout=left_s)
                if found == arm:
                    return t_s
                others.append(found)
        state = "lives" if self.process.poll() is None else "has ended"
        raise AssertionError(
            f"within {timeout_s} s {arm} MHz was not set, but {others}; the tuner's process {state}"
        )

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()


@pytest.fixture
def device(tmp_path):
    path = tmp_path / "gpu"
    DeviceFile.create(path, uuid="GPU-1", profile="rtx_a6000", model="llama-3.1-8b")
    return path


@pytest.fixture
def follower(device):
    follower = Follower(device)
    yield follower
    follower.end()


@pytest.fixture
def switch(device):
    switch = LiveSwitch()
    switch.connect(phase_path(device.parent / "leases", "r"))
    return switch


def histogram(delays_ms):
    counts, edges = np.histogram(delays_ms, bins=[0, 0.5, 1, 2, 3, 5, 10, 20, 50, 1e4])
    return "\n".join(
        f"{low:5g} .. {high:5g} ms  {'#' * count}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    )


def test_the_gpu_is_called_within_milliseconds_of_an_arrival(follower, switch, capsys):
    follower.next(1500)  # the plan is in force, and nothing is known of phases
    delays_ms = []
    for _ in range(ARRIVALS):
        switch.on_step(0)
        follower.next(1200)
        time.sleep(0.06)  # no more changes a second than the pace allows
        arrived_s = time.monotonic()
        switch.on_arrival()
        delays_ms.append(1000 * (follower.next(1500) - arrived_s))
    with capsys.disabled():
        print(f"\narrival to lock, median {np.median(delays_ms):.2f} ms\n{histogram(delays_ms)}")
    assert np.median(delays_ms) < 10.0


def test_a_switch_that_is_silent_while_prompts_come_leaves_their_clock(follower, switch):
    follower.next(1500)
    switch.on_empty()
    follower.next(210)
    switch._switch.on_arrival = lambda: 1 / 0
    switch.on_arrival()
    switch.repeat()
    assert follower.next(1500)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_tuner_that_dies_or_hangs_leaves_the_clocks_to_its_guard_and_the_replica_unharmed(
    device, follower, switch, how
):
    follower.next(1500)
    switch.on_step(0)
    follower.next(1200)
    follower.process.send_signal(how)
    start_s = time.monotonic()
    for _ in range(1000):
        switch.on_arrival()
        switch.on_step(0)
    assert time.monotonic() - start_s < 2.0
    deadline_s = time.monotonic() + 15.0
    while time.monotonic() < deadline_s:
        with DeviceFile(device).transaction() as state:
            if state["locked_sm_clock_mhz"] is None:
                return
        time.sleep(0.1)
    raise AssertionError("the clocks stayed locked")
