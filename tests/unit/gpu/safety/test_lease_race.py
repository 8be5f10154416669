"""Processes that race for one GPU: never two writers, and nobody finds another's clocks."""

import itertools
import os
import random
import subprocess
import sys
import threading

from agft_ray.gpu.safety.lease import leases, sweep
from unit.gpu.safety.lease_tools import PATHS, make_gpu

LONG_S = 600.0
"""A turn syncs to the disk, which may be slow."""

RACER = """
import os, random, sys, time
sys.path[:0] = {paths!r}
from unit.gpu.safety.lease_tools import acquire, lock_clocks, locked_mhz
from agft_ray.errors import LeaseHeldError
from agft_ray.gpu.safety.restore import restore
directory, state, log, turns, dying = sys.argv[1:]
log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
pid = os.getpid()
generator = random.Random(pid)
for turn in range(int(turns)):
    while True:
        try:
            lease = acquire(directory, state)
            break
        except LeaseHeldError:
            pass
    os.write(log, f"begin {{pid}} {{locked_mhz(state)}}\\n".encode())
    lock_clocks(state)
    lease.check()
    if dying == "dying":
        os.write(log, f"end {{pid}}\\n".encode())
        os.kill(pid, 9)
    restore(lease._target)
    os.write(log, f"end {{pid}}\\n".encode())
    lease.release()
    time.sleep(generator.random() * 0.008)
"""


def racer(directory, path, log, turns, dying="living"):
    script = RACER.format(paths=PATHS)
    arguments = map(str, (directory, path, log, turns, dying))
    return subprocess.Popen([sys.executable, "-S", "-c", script, *arguments])


def assert_one_at_a_time(log):
    """Returns who had it, in order."""
    lines = [line.split() for line in log.read_text().splitlines()]
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert (begin[0], end[0]) == ("begin", "end")
        assert begin[1] == end[1], "two writers at once"
        assert begin[2] == "None", "another's clocks"
    return [line[1] for line in lines[::2]]


def test_two_processes_race_a_thousand_times(tmp_path):
    path, log = make_gpu(tmp_path / "gpu.json"), tmp_path / "log"
    racers = [racer(tmp_path / "leases", path, log, 500) for _ in range(2)]
    assert [each.wait(LONG_S) for each in racers] == [0, 0]
    turns = assert_one_at_a_time(log)
    assert sorted(turns.count(str(each.pid)) for each in racers) == [500, 500]
    changes = sum(a != b for a, b in itertools.pairwise(turns))
    print(f"{len(turns)} turns, {changes} changes of holder")
    assert changes > 1
    assert leases(tmp_path / "leases") == []


def test_owners_that_die_race_with_each_other_and_with_sweeps(tmp_path):
    path, log, directory = make_gpu(tmp_path / "gpu.json"), tmp_path / "log", tmp_path / "leases"
    ended = threading.Event()
    outcomes = []

    def sweep_often():
        generator = random.Random(2)
        while not ended.wait(generator.random() * 0.005):
            outcomes.extend(sweep(directory))

    sweeping = threading.Thread(target=sweep_often)
    sweeping.start()
    try:
        living = racer(directory, path, log, 40)
        for _ in range(8):
            dying = [racer(directory, path, log, 1, "dying") for _ in range(2)]
            assert [each.wait(LONG_S) for each in dying] == [-9, -9]
        assert living.wait(LONG_S) == 0
    finally:
        ended.set()
        sweeping.join()
    sweep(directory)
    assert len(assert_one_at_a_time(log)) == 40 + 16
    assert not [outcome for _, outcome in outcomes if isinstance(outcome, Exception)]
    assert leases(directory) == []
    assert os.listdir(directory) == ["GPU-0.lock"]
