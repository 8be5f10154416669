import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agft_ray.errors import GpuError, GpuPermissionError, LeaseHeldError
from agft_ray.gpu.safety import guard as guard_module
from agft_ray.gpu.safety import lock as lease_lock
from agft_ray.gpu.safety import record as lease_record
from agft_ray.gpu.safety.guard import Guard
from agft_ray.gpu.safety.lease import force, leases, sweep
from unit.gpu.safety.lease_tools import (
    Owner,
    acquire,
    acquire_soon,
    clock_calls,
    lock_clocks,
    locked_mhz,
    make_gpu,
    replace_content,
    runs,
    stat_fields,
    within,
)


@pytest.fixture
def path(tmp_path):
    return make_gpu(tmp_path / "gpu.json")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def lease(directory, path):
    lease = acquire(directory, path)
    yield lease
    lease.release()


@pytest.fixture
def guard(lease):
    guard = Guard.start([lease])
    yield guard
    with contextlib.suppress(ProcessLookupError):
        os.kill(guard.pid, signal.SIGCONT)
    guard.release()
    assert within(1.0, lambda: not runs(guard.pid))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_owner_gone_means_a_reset_of_all_its_gpus(path, directory, tmp_path, signum):
    paths = [path, make_gpu(tmp_path / "second.json", "GPU-1")]
    with Owner(directory, *paths) as owner:
        assert [locked_mhz(p) for p in paths] == [900, 900]
        assert runs(owner.guard_pid)
        owner.kill(signum)
        assert within(1.0, lambda: [locked_mhz(p) for p in paths] == [None, None])
        assert within(1.0, lambda: not runs(owner.guard_pid))
    assert sorted(os.listdir(directory)) == ["GPU-0.lock", "GPU-1.lock"]


HEARTBEAT_S = 2.0
"""Eight times the least time between two beats: an owner that is slowed down must not miss it."""
SLACK_S = 3.0
"""On top of a heartbeat, which is the promise on a machine that has time for the guard."""


def test_a_hanging_owner_loses_clocks_and_lease_but_not_the_lock(path, directory):
    hangs_s = HEARTBEAT_S + SLACK_S
    with Owner(directory, path, heartbeat_s=HEARTBEAT_S) as owner:
        assert not within(1.3 * HEARTBEAT_S, lambda: locked_mhz(path) != 900), "though it beats"
        owner.kill(signal.SIGSTOP)
        assert within(hangs_s, lambda: locked_mhz(path) is None)
        assert leases(directory)[0].revoked
        with pytest.raises(LeaseHeldError, match=rf"PID {owner.pid} \(app#llm replica 1\)"):
            acquire(directory, path)
        lock_clocks(path)  # the write that it was stopped before
        assert within(hangs_s, lambda: locked_mhz(path) is None), "reset again while it hangs"
        owner.kill(signal.SIGCONT)
        assert runs(owner.guard_pid)
        beats_again_s = time.monotonic() + 0.5 * HEARTBEAT_S
        assert within(5.0, lambda: time.monotonic() > beats_again_s)
        lock_clocks(path)
        assert not within(1.3 * HEARTBEAT_S, lambda: locked_mhz(path) != 900), "it beats again"
        owner.kill(signal.SIGSTOP)
        assert within(hangs_s, lambda: locked_mhz(path) is None), "armed again"


def test_an_owner_that_hung_notices_and_renews(path, lease):
    guard = Guard.start([lease], heartbeat_s=0.5)
    lock_clocks(path)
    assert not lease.is_lost()
    assert within(10.0, lambda: lease.is_lost() and locked_mhz(path) is None)

    def renew():
        lease.renew()
        guard.beat()
        return not lease.is_lost()

    assert within(10.0, renew)
    guard.release()


def test_the_first_beat_counts_from_the_start(path, lease):
    asked_s = time.monotonic()
    guard = Guard.start([lease], heartbeat_s=0.4)
    lock_clocks(path)
    assert within(0.4 + SLACK_S, lambda: locked_mhz(path) is None), "no beat was needed to arm it"
    assert time.monotonic() - asked_s >= 0.4
    guard.release()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_guard_that_is_stopped_resets_and_tells_the_owner(path, lease, guard, signum):
    lock_clocks(path)
    os.kill(guard.pid, signum)
    assert within(1.0, lambda: locked_mhz(path) is None)
    assert within(1.0, lambda: not guard.is_alive)
    assert lease.is_lost()
    assert os.path.exists(lease.record_path), "the owner may lock again before it looks"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_guard_and_owner_killed_means_a_reset_by_the_next_owner(path, directory, signum):
    with Owner(directory, path) as owner:
        os.kill(owner.guard_pid, signum)
        assert within(1.0, lambda: not runs(owner.guard_pid))
        lock_clocks(path)
        with pytest.raises(LeaseHeldError):
            acquire(directory, path)
        owner.kill()
        acquire_soon(directory, path).release()
    assert locked_mhz(path) is None


def test_release_ends_it_without_a_reset_and_frees_the_lease(path, directory, lease, guard):
    lock_clocks(path)
    guard.release()
    guard.release()
    lease.release()
    assert not leases(directory)
    assert not lease_lock.is_held(lease_record.Paths.of(directory, "GPU-0"))
    assert locked_mhz(path) == 900
    assert not guard.is_alive
    guard.beat()
    assert within(1.0, lambda: not runs(guard.pid))


def test_release_waits_for_the_guards_end(guard):
    os.kill(guard.pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, os.kill, [guard.pid, signal.SIGCONT])
    started_s = time.monotonic()
    timer.start()
    guard.release()
    assert 0.15 < time.monotonic() - started_s < 0.9
    timer.join()


def test_the_lock_is_the_guards_until_it_has_reset(path, directory, lease):
    guard = Guard.start([lease])
    os.kill(guard.pid, signal.SIGSTOP)
    try:
        lock_clocks(path)
        guard._close()
        lease.abandon()
        with pytest.raises(LeaseHeldError):
            acquire(directory, path)
        assert sweep(directory) == []
    finally:
        os.kill(guard.pid, signal.SIGCONT)
    acquire_soon(directory, path).release()
    assert locked_mhz(path) is None


def test_its_pid_is_in_the_record(directory, guard):
    assert leases(directory)[0].guard_pid == guard.pid


def test_a_barred_gpu_gets_no_guard(path, directory, lease):
    force(directory, "GPU-0")
    with pytest.raises(LeaseHeldError, match="barred for another 60 s"):
        Guard.start([lease])


def test_beats_never_block(guard):
    os.kill(guard.pid, signal.SIGSTOP)
    started_s = time.monotonic()
    for _ in range(100_000):
        guard._next_beat_s = 0.0
        guard.beat()
    assert time.monotonic() - started_s < 5.0
    assert guard.is_alive


def test_a_killed_guard_is_noticed(path, guard):
    assert guard.is_alive
    os.kill(guard.pid, signal.SIGKILL)
    assert within(1.0, lambda: not guard.is_alive)
    guard.beat()


def test_it_is_nobodys_child_and_in_its_own_session(guard):
    parent, session = (int(stat_fields(guard.pid)[k]) for k in (1, 3))
    assert parent != os.getpid()
    assert session not in (os.getsid(0), 0)
    with pytest.raises(ChildProcessError):
        os.waitpid(guard.pid, os.WNOHANG)


def test_it_is_small_and_holds_nothing_of_its_owner_but_the_lock(guard, directory):
    descriptors = Path(f"/proc/{guard.pid}/fd")
    held = {os.readlink(each) for each in descriptors.iterdir()}
    held -= {os.devnull, str(directory / "GPU-0.lock")}
    assert all(target.startswith("pipe:") for target in held), held
    status = Path(f"/proc/{guard.pid}/status").read_text()
    rss_kb = int(status.partition("VmRSS:")[2].split()[0])
    print(f"the guard's resident memory: {rss_kb} kB")
    assert rss_kb < 12_000


def test_a_forked_child_of_the_owner_does_not_keep_the_pipe_open(path, directory, lease):
    guard = Guard.start([lease])
    lock_clocks(path)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        guard._close()
        lease.abandon()
        assert within(1.0, lambda: locked_mhz(path) is None)
        acquire_soon(directory, path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lost_gpu_does_not_keep_the_others_locked(path, directory, tmp_path, lease):
    gone = make_gpu(tmp_path / "a-gone.json", "GPU-gone")
    other = acquire(directory, gone)
    guard = Guard.start([other, lease])
    lock_clocks(path)
    gone.unlink()
    guard._close()
    assert within(1.0, lambda: locked_mhz(path) is None)
    assert within(1.0, lambda: not runs(guard.pid)), "gone is as good as reset"
    assert os.listdir(directory).count("GPU-gone.json") == 0
    other.release()


def test_a_failing_reset_is_tried_again(path, directory, tmp_path, lease):
    other_path = make_gpu(tmp_path / "other.json", "GPU-1")
    other = acquire(directory, other_path)
    guard = Guard.start([lease, other])
    for each in (path, other_path):
        lock_clocks(each)
    content = path.read_bytes()
    replace_content(path, content.replace(b'"pending_clock_changes"', b'"pending_clock_chances"'))
    guard._close()
    assert within(1.0, lambda: locked_mhz(other_path) is None)
    time.sleep(0.3)
    assert locked_mhz(path) == 900
    assert runs(guard.pid)
    replace_content(path, content)
    assert within(2.0, lambda: locked_mhz(path) is None)
    assert within(1.0, lambda: not runs(guard.pid))
    other.release()


def test_what_the_owner_leaves_is_reset_by_the_guard_and_then_free(path, directory, lease):
    guard = Guard.start([lease])
    lock_clocks(path)
    content = path.read_bytes()
    replace_content(path, content.replace(b'"pending_clock_changes"', b'"pending_clock_chances"'))
    lease.abandon()
    guard.leave()
    with pytest.raises(LeaseHeldError):
        acquire(directory, path)
    replace_content(path, content)
    acquire_soon(directory, path).release()
    assert locked_mhz(path) is None
    assert within(2.0, lambda: not runs(guard.pid))


def test_a_refused_reset_is_left_to_whoever_may(lease, monkeypatch):
    guarded = guard_module._Guarded(f"{lease.fd}:{lease.record_path}")
    attempts = []

    def refuse(target):
        attempts.append(target)
        raise GpuPermissionError("root only")

    monkeypatch.setattr(guard_module, "undo", refuse)
    assert guard_module._reset_all([guarded], owner_is_gone=True)
    assert len(attempts) == 1, "it tries in vain"
    assert os.path.exists(lease.record_path)


def test_a_dead_owners_clocks_do_not_wait_for_the_disk(path, lease, monkeypatch):
    """The record of a dead owner is not written, so not synced, before the reset."""
    guarded = guard_module._Guarded(f"{lease.fd}:{lease.record_path}")
    lock_clocks(path)
    synced_while = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced_while.append(locked_mhz(path)))
    assert guard_module._reset_all([guarded], owner_is_gone=True)
    assert set(synced_while) == {None}
    assert not os.path.exists(lease.record_path)


def test_a_gpu_that_another_has_taken_by_a_new_lock_file_is_let_alone(path, directory, lease):
    guard = Guard.start([lease])
    os.unlink(lease.record_path.replace(".json", ".lock"))
    other = acquire(directory, path)
    lock_clocks(path, 1200)
    lease.abandon()
    guard._close()
    assert within(2.0, lambda: not runs(guard.pid))
    assert locked_mhz(path) == 1200
    other.release()


def test_the_kernel_does_not_kill_it_for_memory_as_it_does_rays_workers(lease):
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    own.write_text("500")
    try:
        guard = Guard.start([lease])
        score = Path(f"/proc/{guard.pid}/oom_score_adj")
        assert within(5.0, lambda: score.read_text() == "0\n")
        guard.release()
    finally:
        own.write_text(before)


def test_guards_that_are_over_leave_nothing_behind(lease):
    before = set(guard_module._open_guards)
    for _ in range(3):
        Guard.start([lease]).release()
    assert guard_module._open_guards == before


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_without_a_record_it_resets_by_what_it_knew(path, lease, damage):
    guard = Guard.start([lease])
    lock_clocks(path)
    if damage == "missing":
        os.unlink(lease.record_path)
    else:
        Path(lease.record_path).write_text("{}")
    guard._close()
    assert within(1.0, lambda: locked_mhz(path) is None)


def test_a_guard_that_cannot_start_says_why(lease, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GpuError, match="guard did not start"):
        Guard.start([lease])


def test_a_guard_without_a_record_does_not_start(lease):
    os.unlink(lease.record_path)
    with pytest.raises(GpuError, match=r"no lease record .*GPU-0\.json"):
        Guard.start([lease])


def node_guard(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "agft_ray.gpu.safety.guard", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_nodes_guard_resets_what_dead_ones_left_and_nothing_else(path, directory, tmp_path):
    living_path = make_gpu(tmp_path / "living.json", "GPU-1")
    living = acquire(directory, living_path)
    lock_clocks(living_path)
    with node_guard("--node", "--lease-dir", directory, "--interval-s", 0.1) as node:
        for _ in range(2):
            with Owner(directory, path) as owner:
                os.kill(owner.guard_pid, signal.SIGKILL)
                owner.kill()
                assert within(2.0, lambda: locked_mhz(path) is None)
                assert within(1.0, lambda: len(leases(directory)) == 1)
        broken = make_gpu(tmp_path / "broken.json", "GPU-2")
        content = broken.read_bytes()
        dying = acquire(directory, broken)
        replace_content(broken, content.replace(b'"clock_calls"', b'"clock_balls"'))
        dying.abandon()
        time.sleep(0.5)
        replace_content(broken, content)
        assert within(1.0, lambda: clock_calls(broken) == 1)
        living.abandon()
        node.send_signal(signal.SIGTERM)
        assert node.wait(5) == 0
        assert locked_mhz(living_path) is None, "the last sweep"
        lines = node.stderr.read().splitlines()
    assert sum(line.startswith("GPU-0: ") for line in lines) == 2
    first_of_broken = next(line for line in lines if line.startswith("GPU-2: "))
    assert "NOT reset" in first_of_broken
    assert "'clock_calls'" in first_of_broken
    assert lines[-1].startswith("GPU-1: ")
    assert sum("NOT reset" in line for line in lines) == 1
    assert len(lines) <= 5


def test_the_nodes_guard_outlives_a_directory_it_may_not_trust(directory):
    directory.mkdir(mode=0o755)
    with node_guard("--node", "--lease-dir", directory, "--interval-s", 0.02) as node:
        time.sleep(0.5)
        assert node.poll() is None
        node.terminate()
        assert node.wait(5) == 0
        assert node.stderr.read().count(f"{directory} must be") == 1


@pytest.mark.parametrize("arguments", [[], ["--node", "--interval-s", "0"], ["--lease-dir", "x"]])
def test_bad_usage_is_told(arguments):
    with node_guard(*arguments) as node:
        assert node.wait(5) == 2
        assert "usage" in node.stderr.read()
