import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agft_ray.errors import (
    GpuArgumentError,
    GpuLostError,
    GpuPermissionError,
    GpuTransientError,
    LeaseHeldError,
    LeaseLostError,
)
from agft_ray.gpu.safety import lease as lease_module
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.lease import Lease, default_directory, force, leases, revoke, sweep
from agft_ray.gpu.safety.record import Paths, read_record, write_record
from unit.gpu.safety.lease_tools import (
    acquire,
    lock_clocks,
    locked_mhz,
    make_gpu,
    pass_time,
    simulated_target,
    within,
)


@pytest.fixture
def path(tmp_path):
    return make_gpu(tmp_path / "gpu.json")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def paths(directory):
    return Paths.of(directory, "GPU-0")


def leave(directory, path, **changes):
    """What a dead owner leaves: locked clocks and a record, perhaps changed."""
    lock_clocks(path)
    lease = acquire(directory, path, restore=lambda target: None)
    paths = Paths.of(directory, lease.uuid)
    record = read_record(paths)._replace(**changes)
    lock_clocks(path)
    lease.abandon()
    write_record(paths, record)
    return record


def is_free(paths):
    fd = os.open(paths.lock, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def fail(*_):
    raise GpuTransientError("driver is busy")


def test_a_lease_leaves_a_record_while_it_lasts(directory, path, paths):
    lease = acquire(directory, path)
    fields = json.loads(Path(lease.record_path).read_text())
    assert fields["format"] == "agft_ray lease 1"
    assert fields["target"] == simulated_target(path)
    assert fields["owner"] == "app#llm replica 1"
    assert (fields["pid"], fields["guard_pid"], fields["fence"]) == (os.getpid(), None, lease.fence)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in directory.iterdir()} == {0o600}
    lease.check()
    lease.release()
    lease.release()
    assert [each.name for each in directory.iterdir()] == ["GPU-0.lock"]
    assert is_free(paths)
    with pytest.raises(LeaseLostError):
        lease.check()


def test_one_holder_at_a_time_and_the_other_is_told_who_it_is(directory, path):
    lease = acquire(directory, path)
    who = rf"GPU-0: .* PID {os.getpid()} \(app#llm replica 1\)"
    with pytest.raises(LeaseHeldError, match=f"{who}.*`agft-ray reset --force GPU-0`"):
        acquire(directory, path)
    lease.check()
    lease.release()
    acquire(directory, path).release()


def test_a_reused_pid_is_not_taken_for_the_holder(directory, path, paths):
    lease = acquire(directory, path)
    record = read_record(paths)
    write_record(paths, record._replace(create_time=record.create_time - 1))
    with pytest.raises(LeaseHeldError, match=f"GPU-0: .* PID {record.pid} ") as refusal:
        acquire(directory, path)
    assert "--force" not in str(refusal.value), "that is for an owner that runs"
    assert leases(directory)[0].held
    assert not leases(directory)[0].owner_runs
    lease.release()


def test_a_holder_without_a_record_yet_is_told_as_such(directory, path, paths):
    lease = acquire(directory, path)
    os.unlink(paths.record)
    with pytest.raises(LeaseHeldError, match=r"^(lease: )?GPU-0: ") as refusal:
        acquire(directory, path)
    assert "PID" not in str(refusal.value), "nobody knows it"
    lease.release()


def test_somebody_who_only_looks_is_waited_for(directory, path, paths, monkeypatch):
    monkeypatch.setattr(lease_module, "PATIENCE_S", 30.0)
    acquire(directory, path).release()
    fd = os.open(paths.lock, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    looking = threading.Timer(0.02, os.close, [fd])
    looking.start()
    acquire(directory, path).release()
    looking.join()


def test_what_a_dead_owner_left_is_reset_before_anything_else(directory, path, paths):
    old = leave(directory, path)
    order = []

    def make_target():
        order.append("target")
        return simulated_target(path)

    lease = Lease.acquire(
        directory, "GPU-0", make_target, owner="b", restore=lambda t: order.append(t)
    )
    assert order == [old.target, "target"]
    assert lease.fence > old.fence
    lease.release()


def test_the_reset_is_real(directory, path):
    leave(directory, path)
    acquire(directory, path).release()
    assert locked_mhz(path) is None


def test_what_cannot_be_reset_stays_recorded_and_is_not_taken(directory, path, paths):
    old = leave(directory, path)
    with pytest.raises(GpuTransientError, match="driver is busy"):
        acquire(directory, path, restore=fail)
    assert is_free(paths)
    assert read_record(paths) == old


def test_a_gpu_that_is_gone_needs_no_reset(directory, path, paths):
    def gone(target):
        raise GpuLostError("gone")

    leave(directory, path)
    acquire(directory, path, restore=gone).release()
    leave(directory, path)
    assert len(sweep(directory, restore=gone)) == 1
    assert read_record(paths) is None


def test_a_record_of_an_earlier_boot_needs_no_reset(directory, path, paths):
    leave(directory, path, boot_id="earlier", fence=2**50)
    lease = acquire(directory, path, restore=fail)
    assert lease.fence > 2**50
    lease.release()
    leave(directory, path, boot_id="earlier")
    [(uuid, outcome)] = sweep(directory, restore=fail)
    assert uuid == "GPU-0"
    assert not isinstance(outcome, Exception)
    assert read_record(paths) is None


def test_no_target_no_lease(directory, path, paths):
    with pytest.raises(GpuTransientError):
        Lease.acquire(directory, "GPU-0", fail, owner="a")
    with pytest.raises(GpuArgumentError, match=r"backend must be .*'x'"):
        Lease.acquire(
            directory, "GPU-0", lambda: simulated_target(path) | {"backend": "x"}, owner="a"
        )
    assert is_free(paths)
    assert read_record(paths) is None


@pytest.mark.parametrize("owner", ["a\nb", "x" * 201, "\ud800"])
def test_an_owner_that_cannot_be_printed_is_refused(directory, path, owner):
    with pytest.raises(GpuArgumentError, match="lease owner"):
        Lease.acquire(directory, "GPU-0", lambda: simulated_target(path), owner=owner)


@pytest.mark.parametrize("uuid", ["", "../GPU-0", "a/b", "x" * 97, "GPU 0", ".", "GPU-0\n", None])
def test_only_uuids_become_file_names(directory, uuid):
    with pytest.raises(GpuArgumentError, match="letters, digits"):
        Paths.of(directory, uuid)


def test_a_revoked_lease_is_lost_until_renewed(directory, path, paths):
    lease = acquire(directory, path)
    first = lease.fence
    assert revoke(paths) == simulated_target(path)
    revoked = read_record(paths).fence
    assert (first % 2, revoked % 2) == (0, 1)
    assert revoked > first
    assert lease.is_lost()
    with pytest.raises(LeaseLostError, match="renew the lease"):
        lease.check()
    lease.renew(guard_pid=7)
    lease.check()
    assert lease.fence > revoked
    assert read_record(paths).guard_pid == 7
    os.unlink(paths.record)
    assert lease.is_lost()
    lease.renew()
    assert read_record(paths).guard_pid == 7
    lease.release()


def test_fences_grow_whatever_the_clock_says(directory, path, paths, monkeypatch):
    lease = acquire(directory, path)
    monkeypatch.setattr(lease_record, "boottime_ns", lambda: 0)
    seen = [lease.fence]
    for _ in range(3):
        revoke(paths)
        seen.append(read_record(paths).fence)
        lease.renew()
        seen.append(lease.fence)
    assert seen == sorted(set(seen))
    assert [fence % 2 for fence in seen] == [0, 1, 0, 1, 0, 1, 0]
    lease.release()


def test_a_lock_file_removed_under_us_ends_the_lease(directory, path, paths):
    lease = acquire(directory, path)
    os.unlink(paths.lock)
    other = acquire(directory, path)
    assert lease.is_lost()
    with pytest.raises(LeaseHeldError, match=re.escape(paths.lock)):
        lease.renew()
    lease.release()
    other.check()
    other.release()


def test_abandoning_leaves_the_record_for_others(directory, path, paths):
    lease = acquire(directory, path)
    lock_clocks(path)
    lease.abandon()
    assert is_free(paths)
    assert [uuid for uuid, _ in sweep(directory)] == ["GPU-0"]
    assert locked_mhz(path) is None


def test_a_forked_child_does_not_keep_the_lease(directory, path, paths):
    lease = acquire(directory, path)
    child = os.fork()
    if child == 0:
        lease.release()  # not the child's to give back
        time.sleep(30)
        os._exit(0)
    try:
        assert not within(0.05, lambda: not os.path.exists(paths.record))
        lease.check()
        lease.release()
        assert within(1.0, lambda: is_free(paths))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_subprocess_does_not_keep_the_lease(directory, path, paths):
    lease = acquire(directory, path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        lease.release()
        assert is_free(paths)
        child.kill()


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("function", "replacement"),
    [("write", no_space), ("write", lambda fd, data: 3), ("fsync", no_space), ("rename", no_space)],
)
def test_no_space_no_lease_and_nothing_half_done(
    directory, path, paths, monkeypatch, function, replacement
):
    with monkeypatch.context() as patch:
        patch.setattr(lease_record.os, function, replacement)
        with pytest.raises(GpuTransientError, match=r"GPU-0\.json .*: No space"):
            acquire(directory, path)
    assert [each.name for each in directory.iterdir()] == ["GPU-0.lock"]
    assert is_free(paths)
    lease = acquire(directory, path)
    with monkeypatch.context() as patch:
        patch.setattr(lease_record.os, function, replacement)
        with pytest.raises(GpuTransientError):
            lease.renew()
    lease.check()
    lease.release()


def test_force_takes_a_gpu_from_its_living_owner(directory, path, paths, monkeypatch):
    lease = acquire(directory, path)
    lock_clocks(path)
    force(directory, "GPU-0", bar_s=60.0)
    assert locked_mhz(path) is None
    assert lease.is_lost()
    info = leases(directory)[0]
    assert info.revoked
    assert info.held
    assert 0 < info.barred_s <= 60.0
    with pytest.raises(LeaseHeldError, match="barred for another"):
        lease.renew()
    lease.abandon()
    with pytest.raises(LeaseHeldError, match="barred for another"):
        acquire(directory, path)
    pass_time(monkeypatch, 60.0)
    acquire(directory, path).release()


def test_force_removes_the_record_of_a_dead_owner(directory, path, paths):
    leave(directory, path)
    force(directory, "GPU-0")
    assert locked_mhz(path) is None
    assert read_record(paths) is None


def test_force_without_a_record_resets_by_nvml(directory):
    targets = []
    force(directory, "GPU-7", restore=targets.append)
    assert [(t["backend"], t["uuid"]) for t in targets] == [("nvml", "GPU-7")]


def test_a_failing_force_keeps_the_record(directory, path, paths):
    leave(directory, path)
    with pytest.raises(GpuTransientError):
        force(directory, "GPU-0", restore=fail)
    assert read_record(paths) is not None


@pytest.mark.parametrize("moment", ["before", "after"])
def test_force_beats_a_renewal_at_the_same_moment(directory, path, paths, monkeypatch, moment):
    lease = acquire(directory, path)

    def write_meanwhile(*arguments):
        monkeypatch.undo()
        if moment == "before":
            force(directory, "GPU-0")
        write_record(*arguments)
        if moment == "after":
            force(directory, "GPU-0")

    monkeypatch.setattr(lease_record, "write_record", write_meanwhile)
    with pytest.raises(LeaseHeldError, match="barred"):
        lease.renew()
    assert lease.is_lost()
    lease.release()


@pytest.mark.parametrize(
    "bar",
    [
        b"",
        b"[]",
        b"{}",
        b'{"boot_id": "BOOT", "until_ns": "soon"}',
        b'{"boot_id": "BOOT", "until_ns": 4611686018427387904}',
        b'{"boot_id": "earlier", "until_ns": UNTIL}',
        b"[" * 4000,
    ],
)
def test_a_bar_that_says_nothing_bars_nobody(directory, path, paths, bar):
    acquire(directory, path).release()
    until_ns = lease_record.boottime_ns() + 10**10
    boot_id = lease_record.boot_id().encode()
    Path(paths.bar).write_bytes(bar.replace(b"BOOT", boot_id).replace(b"UNTIL", b"%d" % until_ns))
    acquire(directory, path).release()


def test_a_bar_has_an_end(directory):
    for bar_s in (-1, 3601, float("nan"), float("inf")):
        with pytest.raises(GpuArgumentError, match=r"bar_s must be .*\b0\b.*\b3600 s"):
            force(directory, "GPU-0", bar_s=bar_s)


def test_a_sweep_resets_what_is_free_and_only_that(directory, tmp_path):
    gpus = [make_gpu(tmp_path / f"{k}.json", f"GPU-{k}") for k in range(4)]
    for gpu in gpus[:3]:
        leave(directory, gpu)
    living = acquire(directory, gpus[3])
    lock_clocks(gpus[3])
    gpus[1].write_bytes(gpus[1].read_bytes().replace(b'"clock_calls"', b'"clock_balls"'))
    outcomes = dict(sweep(directory))
    assert list(outcomes) == ["GPU-0", "GPU-1", "GPU-2"]
    assert isinstance(outcomes["GPU-1"], KeyError)
    assert [locked_mhz(gpu) for gpu in gpus] == [None, 900, None, 900]
    assert f"PID {os.getpid()} (app#llm replica 1)" in outcomes["GPU-0"]
    assert [info.uuid for info in leases(directory)] == ["GPU-1", "GPU-3"]
    assert [info.held for info in leases(directory)] == [False, True]
    living.check()
    living.release()


def test_where_there_is_no_directory_nothing_is_leased(directory):
    assert leases(directory) == []
    assert sweep(directory) == []
    assert not directory.exists()


@pytest.mark.parametrize("fault", ["mode", "owner", "link", "file", "parent mode", "parent owner"])
def test_a_directory_that_others_can_change_is_refused(tmp_path, path, fault):
    parent = tmp_path / "parent"
    directory = parent / "leases"
    parent.mkdir(mode=0o700)
    directory.mkdir(mode=0o700)
    if fault == "mode":
        directory.chmod(0o750)
    elif fault == "owner":
        own(directory, 65534)
    elif fault == "link":
        directory.rename(parent / "real")
        directory.symlink_to(parent / "real")
    elif fault == "file":
        directory.rmdir()
        directory.touch(0o600)
    elif fault == "parent mode":
        parent.chmod(0o777)
    else:
        own(parent, 65534)
    faulty = parent if fault.startswith("parent") else directory
    named = rf"{faulty} must be .*uid {os.geteuid()}\b.* AGFT_RAY_LEASE_DIR"
    for use in (lambda: acquire(directory, path), lambda: sweep(directory)):
        with pytest.raises(GpuPermissionError, match=named):
            use()


def own(path, uid):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, uid, -1)


def test_a_directory_that_cannot_be_made_is_told(tmp_path, path):
    directory = tmp_path / "a" / "b" / "c"
    with pytest.raises(GpuPermissionError, match=f"{directory} .*: No such file"):
        acquire(directory, path)


def test_the_default_directory(monkeypatch):
    monkeypatch.delenv("AGFT_RAY_LEASE_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory() == "/run/agft_ray"
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert default_directory() == "/run/user/7/agft_ray"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_directory().endswith("/agft_ray-7/leases")
    monkeypatch.setenv("AGFT_RAY_LEASE_DIR", "/somewhere")
    assert default_directory() == "/somewhere"
