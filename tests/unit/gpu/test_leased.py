"""Clocks are set under a lease and a guard, or not at all."""

import json
import os
import shutil
import signal

import pytest

from agft_ray.clock import ManualClock
from agft_ray.clock_control import ClockControl
from agft_ray.errors import GpuPermissionError, GpuTransientError, LeaseHeldError, LeaseLostError
from agft_ray.gpu.group import GpuGroup
from agft_ray.gpu.leased import LeasedGpu
from agft_ray.gpu.safety.guard import Guard
from agft_ray.gpu.safety.lease import Lease, force, leases
from agft_ray.gpu.simulated import SimulatedGpu
from agft_ray.simulation.device_file import DeviceFile
from agft_ray.types import Plan
from unit.gpu.safety.lease_tools import pass_time, runs, within


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def paths(tmp_path):
    files = [tmp_path / f"gpu-{k}.json" for k in range(2)]
    for k, path in enumerate(files):
        DeviceFile.create(path, uuid=f"GPU-{k}", profile="rtx_a6000", model="llama-3.1-8b")
    return files


@pytest.fixture
def make(paths, directory):
    made = []

    def make(indices=(0, 1), owner="a test"):
        gpus = [SimulatedGpu(paths[k]) for k in indices]
        made.append(LeasedGpu(gpus, directory=directory, owner=owner))
        return made[-1]

    yield make
    for gpu in made:
        gpu.reset()
        gpu.release()


def locked_mhz(paths):
    return [json.loads(path.read_text())["locked_sm_clock_mhz"] for path in paths]


def test_nothing_is_set_without_a_lease(make, paths):
    gpu = make()
    with pytest.raises(LeaseLostError, match="without a lease"):
        gpu.lock(900)
    assert locked_mhz(paths) == [None, None]
    assert gpu.guard_pid is None


def test_claim_lock_reset_release(make, paths, directory):
    gpu = make()
    gpu.claim()
    assert [lease.uuid for lease in leases(directory)] == ["GPU-0", "GPU-1"]
    pid = gpu.guard_pid
    gpu.claim()
    assert gpu.guard_pid == pid, "a second claim starts nothing"
    gpu.lock(900)
    assert locked_mhz(paths) == [900, 900]
    gpu.reset()
    gpu.release()
    assert leases(directory) == []
    assert locked_mhz(paths) == [None, None]
    assert gpu.guard_pid is None


def test_the_leases_of_a_group_are_all_or_none(make, directory):
    first, both = make((1,), owner="the first"), make()
    first.claim()
    with pytest.raises(LeaseHeldError, match="the first"):
        both.claim()
    assert [lease.uuid for lease in leases(directory)] == ["GPU-1"]
    first.release()
    both.claim()
    assert len(leases(directory)) == 2


def test_a_killed_guard_is_replaced_by_the_next_claim(make):
    gpu = make()
    gpu.claim()
    pid = gpu.guard_pid
    os.kill(pid, signal.SIGKILL)
    assert within(10.0, lambda: gpu.claim() or gpu.guard_pid != pid)
    gpu.lock(900)


def test_a_forced_reset_takes_the_lease_and_bars_the_owner_for_a_while(
    make, paths, directory, monkeypatch
):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    force(str(directory), "GPU-0", bar_s=60.0)
    assert locked_mhz(paths)[0] is None
    with pytest.raises(LeaseLostError):
        gpu.lock(1200)
    with pytest.raises(LeaseHeldError):
        gpu.claim()
    pass_time(monkeypatch, 60.0)
    gpu.claim()
    gpu.lock(1200)
    assert locked_mhz(paths)[0] == 1200


def busy(*_):
    raise GpuTransientError("busy")


def test_an_owner_that_is_barred_resets_what_the_forced_reset_could_not(make, paths, directory):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    with pytest.raises(GpuTransientError):
        force(str(directory), "GPU-0", restore=busy)
    assert locked_mhz(paths)[0] == 900
    with pytest.raises(LeaseHeldError, match="barred"):
        gpu.claim()
    assert locked_mhz(paths)[0] is None
    assert leases(directory) == []


def test_an_owner_whose_lease_directory_is_removed_resets_and_starts_afresh(make, paths, directory):
    gpu = make()
    gpu.claim()
    gpu.lock(900)
    shutil.rmtree(directory)  # as a cleaner of /tmp does, or a log-out of /run/user/UID
    with pytest.raises(LeaseHeldError, match="removed"):
        gpu.claim()
    assert locked_mhz(paths) == [None, None]
    gpu.claim()
    gpu.lock(1200)
    assert locked_mhz(paths) == [1200, 1200]


def test_an_owner_whose_lock_file_another_has_replaced_leaves_their_gpu_alone(
    make, paths, directory
):
    gpu, other = make(), make((0,), owner="another")
    gpu.claim()
    gpu.lock(900)
    (directory / "GPU-0.lock").unlink()
    other.claim()
    other.lock(1200)
    with pytest.raises(LeaseHeldError):
        gpu.claim()
    assert locked_mhz(paths) == [1200, None], "only the one that is ours yet is reset"
    other.lock(1500)


def test_without_a_lease_a_reset_touches_nothing(make, paths):
    other, gpu = make((0,), owner="another"), make((0,))
    other.claim()
    other.lock(900)
    gpu.reset()
    assert locked_mhz(paths)[0] == 900


def test_a_claim_that_fails_in_whatever_way_keeps_no_lease(make, directory, monkeypatch):
    gpu = make()
    acquire = Lease.acquire

    def fail_at_the_second(directory, uuid, *args, **options):
        if uuid == "GPU-1":
            raise OSError("of any kind")
        return acquire(directory, uuid, *args, **options)

    monkeypatch.setattr(Lease, "acquire", fail_at_the_second)
    for _ in range(2):
        with pytest.raises(OSError, match="of any kind"):
            gpu.claim()
        assert leases(directory) == []


def test_nodes_are_tuned_together_or_not_at_all(make, paths, directory):
    """Two nodes' GPUs under leases of their own, as for an engine that spans both."""
    first, second = make((0,), owner="node A"), make((1,), owner="node B")
    control = ClockControl(GpuGroup([first, second]), ManualClock())
    assert control.take(0.0)
    control.set(Plan.of(900), 0.0)
    assert locked_mhz(paths) == [900, 900]
    force(str(directory), "GPU-0")
    assert not control.take(0.0)
    assert control.state == "held"
    assert locked_mhz(paths) == [None, None]
    assert leases(directory) == []


@pytest.mark.parametrize("taken_back", [("GPU-0",), ("GPU-1",), ("GPU-0", "GPU-1")])
def test_leases_taken_back_on_any_node_are_renewed_on_all(make, paths, directory, taken_back):
    group = GpuGroup([make((0,), owner="node A"), make((1,), owner="node B")])
    control = ClockControl(group, ManualClock())
    assert control.take(0.0)
    control.set(Plan.of(900), 0.0)
    for uuid in taken_back:
        force(str(directory), uuid, bar_s=0.0)
    assert control.take(0.0)
    assert locked_mhz(paths) == [None, None]
    control.set(Plan.of(1200), 0.0)
    assert locked_mhz(paths) == [1200, 1200]


def test_a_lock_under_a_lease_that_was_lost_meanwhile_is_undone(make, paths, directory):
    gpu = make((0,))
    gpu.claim()
    inner = gpu._gpu
    original = inner.lock

    def slow_lock(arm):
        force(str(directory), "GPU-0", bar_s=0.0)  # while this process was stopped, as it were
        original(arm)

    inner.lock = slow_lock
    with pytest.raises(LeaseLostError):
        gpu.lock(900)
    assert locked_mhz(paths)[0] is None


def test_a_revoked_lease_is_renewed_once_and_said_so(make, paths, directory):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    force(str(directory), "GPU-0", bar_s=0.0)
    with pytest.raises(LeaseLostError, match="was taken back"):
        gpu.claim()
    gpu.claim()
    gpu.lock(1200)
    assert locked_mhz(paths)[0] == 1200


def test_no_beat_while_a_reset_is_due_and_has_failed(make, monkeypatch):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    beats = []
    monkeypatch.setattr(Guard, "beat", lambda self: beats.append(1))
    gpu.beat()
    assert len(beats) == 1

    def fail():
        raise GpuTransientError("busy")

    monkeypatch.setattr(gpu._gpu, "reset", fail)
    with pytest.raises(GpuTransientError):
        gpu.reset()
    gpu.beat()
    assert len(beats) == 1
    monkeypatch.undo()
    gpu.reset()


def test_what_could_not_be_reset_is_left_to_the_guard(make, paths, directory, monkeypatch):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    pid = gpu.guard_pid
    monkeypatch.setattr(gpu._gpu, "reset", busy)
    with pytest.raises(GpuTransientError):
        gpu.reset()
    gpu.release()
    assert gpu.guard_pid is None
    assert within(5.0, lambda: locked_mhz(paths)[0] is None)
    assert within(5.0, lambda: not runs(pid) and leases(directory) == [])
    monkeypatch.undo()
    gpu.claim()


def test_and_without_a_guard_to_whoever_can(make, paths, directory, monkeypatch):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    os.kill(gpu.guard_pid, signal.SIGKILL)
    monkeypatch.setattr(gpu._gpu, "reset", busy)
    with pytest.raises(GpuTransientError):
        gpu.reset()
    gpu.release()
    assert within(5.0, lambda: not leases(directory)[0].held)
    monkeypatch.undo()
    gpu.sweep()
    assert locked_mhz(paths)[0] is None
    assert leases(directory) == []


def test_a_refused_reset_of_what_was_never_locked_leaves_nothing(make, directory, monkeypatch):
    gpu = make((0,))
    gpu.claim()

    def refuse():
        raise GpuPermissionError("may not")

    monkeypatch.setattr(gpu._gpu, "reset", refuse)
    with pytest.raises(GpuPermissionError):
        gpu.reset()
    gpu.release()
    assert leases(directory) == []
    monkeypatch.undo()


def test_a_yielded_gpu_is_given_back_without_a_reset(make, paths, directory):
    gpu = make((0,))
    gpu.claim()
    gpu.lock(900)
    gpu.release()
    assert leases(directory) == []
    assert locked_mhz(paths)[0] == 900


def test_a_directory_that_others_can_write_to_is_refused_by_claim_only(make, directory):
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    gpu = make((0,))
    gpu.sweep()
    assert gpu.read().power_w > 0
    with pytest.raises(GpuPermissionError, match="0700"):
        gpu.claim()
    directory.chmod(0o700)
    gpu.claim()
