"""Whatever is killed on a node, its clocks are reset: real Ray and Serve, guard and leases, on a
fake NVML. Each row: the clocks are locked, something dies, they are reset within the bound counted
from the tuner's end, no lease is left, and whatever was replaced locks again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_until
from rig import CLOCK_MHZ, POLICIES, PREFILL_MHZ, RECOVERY_S, running

pytestmark = pytest.mark.ray

RESET_S = 1.0
HEARTBEAT_S = 5.0
"""Without a sign of life for so long, tuner and replica count as hung."""
WINDOW_S = 0.5
NVML_ERROR_UNKNOWN = 999


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    with running("local", tmp_path_factory.mktemp("chaos")) as (driver, gpu, _):
        yield driver, gpu
    gpu.check_writers()
    assert gpu.is_untouched


@pytest.fixture
def driver(rig):
    return rig[0]


@pytest.fixture
def gpu(rig):
    return rig[1]


@pytest.fixture
def policy():
    """By default the one whose clock stays."""
    return POLICIES["fixed"]


by_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
"""For what may come while clocks are switched in the midst of windows, too."""
switching = pytest.mark.parametrize("policy", [POLICIES["pair"]], ids=["pair"])


@pytest.fixture
def holder(driver, gpu, policy):
    """Who has locked the clocks; the app is deployed first, unless it is as it should be."""
    driver.deploy(gpu.lease_dir, policy=policy)
    return gpu.wait_locked()


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield time.monotonic()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def node_guard(gpu):
    command = ["-m", "agft_ray.gpu.safety.guard", "--node", "--lease-dir", gpu.lease_dir]
    guard = subprocess.Popen(
        [sys.executable, *command], env=os.environ | gpu.env_vars, stderr=subprocess.DEVNULL
    )
    try:
        maps = Path(f"/proc/{guard.pid}/maps")
        wait_until(lambda: "libnvidia-ml" in maps.read_text(), 10, "the node's guard ready")
        yield guard.pid
    finally:
        guard.terminate()
        guard.wait()


def reset_and_locked_again(row, gpu, holder):
    gpu.wait_reset(row, holder, RESET_S)
    gpu.wait_let_go(holder)
    gpu.wait_locked(after=holder)


def reset_and_gone(row, gpu, holder):
    reset = gpu.wait_reset(row, holder, RESET_S)
    gpu.wait_let_go(holder)
    assert gpu.is_untouched
    return reset


def test_nothing_is_touched_before(driver, gpu):
    assert gpu.is_untouched
    driver.deploy(gpu.lease_dir)
    gpu.wait_locked()


# -- the tuner -------------------------------------------------------------------------------------


@by_policy
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_tuner(driver, gpu, holder, signum):
    replica = driver.call("ping")
    os.kill(holder.tuner.pid, signum)
    reset_and_locked_again(f"{signum.name} of the tuner", gpu, holder)
    assert driver.call("ping") == replica


@by_policy
def test_tuner_hangs(driver, gpu, holder):
    with stopped(holder.tuner.pid) as since_s:
        bound_s = HEARTBEAT_S + RESET_S
        reset = gpu.wait_reset("SIGSTOP of the tuner", holder, bound_s, from_s=since_s)
        assert reset.pid == holder.guard_pid
        assert gpu.holder.fence % 2 == 1, "the record says that the lease was revoked"
    renewed = gpu.wait_locked()
    assert renewed.tuner == holder.tuner
    later = [e for e in gpu.writes() if e.t_ns > reset.t_ns and e.pid == holder.tuner.pid]
    renewed_ns = renewed.fence - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + time.monotonic_ns()
    assert later[0].t_ns > renewed_ns, "it wrote under the lease that was taken back"


def test_a_tuner_killed_while_it_observes(driver, gpu, holder):
    """Its successor observes too, although its replica was made with control."""
    driver.deploy(gpu.lease_dir, mode="observe")
    wait_until(lambda: gpu.is_untouched, RECOVERY_S, "the lease given back")
    before = gpu.fake.log()
    os.kill(holder.tuner.pid, signal.SIGKILL)

    def observes():
        status = driver.call("tuner_status")
        is_new = status["tuner_pid"] != holder.tuner.pid and status["windows"] > 2
        return is_new and status["state"] == "observing"

    wait_until(observes, RECOVERY_S, "its successor observing")
    assert gpu.fake.log() == before
    assert gpu.is_untouched


def test_ray_kills_the_tuner(driver, gpu, holder):
    driver.call("kill_tuner", False)
    reset_and_locked_again("ray.kill(tuner, no_restart=False)", gpu, holder)


def test_ray_kills_the_tuner_for_good(driver, gpu, holder):
    replica = driver.call("ping")
    driver.call("kill_tuner", True)
    reset_and_gone("ray.kill(tuner)", gpu, holder)
    time.sleep(2)
    assert driver.call("ping") == replica, "the replica serves without a tuner"
    assert gpu.is_untouched
    os.kill(replica, signal.SIGKILL)
    gpu.wait_locked(after=holder)


# -- the replica -----------------------------------------------------------------------------------


@by_policy
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_replica(driver, gpu, holder, signum):
    os.kill(driver.call("ping"), signum)
    reset_and_locked_again(f"{signum.name} of the replica", gpu, holder)


@pytest.mark.parametrize(
    ("policy", "window_s"),
    [(POLICIES["fixed"], WINDOW_S), (POLICIES["fixed"], 60.0), (POLICIES["pair"], 60.0)],
    ids=["fixed", "fixed, long windows", "pair, long windows"],
)
def test_replica_hangs(driver, gpu, holder, policy, window_s):
    replica = driver.call("ping")
    driver.deploy(gpu.lease_dir, window_s=window_s, policy=policy)
    time.sleep(2 * WINDOW_S)
    assert gpu.wait_locked().tuner == holder.tuner, "kept over a change of the window"
    with stopped(replica) as since_s:
        row = f"SIGSTOP of the replica, windows of {window_s:g} s"
        reset = gpu.wait_reset(row, holder, HEARTBEAT_S + RESET_S, from_s=since_s)
        assert reset.pid == holder.tuner.pid, "the tuner saw for itself that it is blind"
    driver.deploy(gpu.lease_dir, policy=policy)
    assert gpu.wait_locked().tuner == holder.tuner
    assert driver.call("ping") == replica


def test_ray_kills_the_replica(driver, gpu, holder):
    driver.kill_replica()
    reset_and_locked_again("ray.kill(replica)", gpu, holder)


def test_health_check_fails(driver, gpu, holder):
    driver.call("become_unhealthy")
    reset_and_locked_again("failed health checks", gpu, holder)


def test_constructor_fails(driver, gpu, holder):
    driver.start("deploy", gpu.lease_dir, fails=True)
    failing = gpu.wait_locked(after=holder)
    with pytest.raises(RuntimeError, match="Deploying application chaos failed"):
        driver.finish()
    reset_and_gone("a failing constructor", gpu, failing)


# -- the guard -------------------------------------------------------------------------------------


@by_policy
def test_guard(gpu, holder):
    os.kill(holder.guard_pid, signal.SIGKILL)
    killed_s = time.monotonic()

    def replaced():
        now = gpu.wait_locked()
        return now.guard_pid != holder.guard_pid and now

    now = wait_until(replaced, 10, "a new guard")
    print(f"\nSIGKILL of the guard: a new one {time.monotonic() - killed_s:.3f} s after")
    assert now.tuner == holder.tuner


def kill_guard_and_tuner(holder):
    os.kill(holder.guard_pid, signal.SIGKILL)
    os.kill(holder.tuner.pid, signal.SIGKILL)


@by_policy
def test_guard_and_tuner(gpu, holder):
    kill_guard_and_tuner(holder)
    reset = gpu.wait_reset("SIGKILL of guard and tuner", holder, RECOVERY_S)
    successor = gpu.wait_locked(after=holder)
    assert reset.pid == successor.tuner.pid, "whoever comes next resets before it locks"


def test_guard_and_tuner_with_a_guard_of_the_node(driver, gpu, holder):
    """The replica is killed as well, as with a container, so that no restarted tuner resets."""
    replica = driver.call("ping")
    with node_guard(gpu) as guard_pid:
        kill_guard_and_tuner(holder)
        os.kill(replica, signal.SIGKILL)
        row = "SIGKILL of guard and tuner, with a node's guard"
        reset = gpu.wait_reset(row, holder, 2.0)
        assert reset.pid == guard_pid
        gpu.wait_locked(after=holder)


# -- the switch ------------------------------------------------------------------------------------


def only(gpu, *clocks_mhz):
    """Whether all of them are seen, and nothing else, for two windows."""
    seen, end_s = set(), time.monotonic() + 2 * WINDOW_S
    while time.monotonic() < end_s:
        seen.add(gpu.locked_mhz)
        if not seen <= set(clocks_mhz):
            return False
        time.sleep(0.005)
    return seen == set(clocks_mhz)


@switching
def test_clocks_are_switched(gpu, holder):
    wait_until(lambda: only(gpu, CLOCK_MHZ, PREFILL_MHZ), 5, "both clocks in turns")


@switching
@pytest.mark.parametrize("how", ["silent", "unheard"])
def test_a_switch_that_tells_of_no_prompt_leaves_prompts_their_clock(driver, gpu, holder, how):
    """From the decode clock; then the replica, or the tuner, dies, and all is as at first."""
    driver.call("fall_silent")
    wait_until(lambda: only(gpu, CLOCK_MHZ), 5, "decode's clock")
    if how == "unheard":
        for path in Path(gpu.lease_dir, "phases").iterdir():
            path.unlink()
    driver.call("have_prompts")
    wait_until(lambda: only(gpu, PREFILL_MHZ), 5, "prompts' clock")
    os.kill(driver.call("ping"), signal.SIGKILL)
    reset_and_locked_again(f"SIGKILL of a replica whose switch is {how}", gpu, holder)
    wait_until(lambda: only(gpu, CLOCK_MHZ, PREFILL_MHZ), 5, "both clocks in turns")


def test_under_phases(driver, gpu):
    """It locks decode's clock, the only one it may choose, and goes on at default clocks when a
    prompt comes, as it has seen none to learn from."""
    policy = {"name": "phases", "baseline_decode_steps": 20}
    only_clock = {"min_sm_clock_mhz": CLOCK_MHZ, "max_sm_clock_mhz": CLOCK_MHZ}
    driver.deploy(gpu.lease_dir, policy=policy, **only_clock)
    wait_until(lambda: only(gpu, CLOCK_MHZ, None), RECOVERY_S, "decode's clock in turns")
    for what in ("tuner", "replica"):
        holder = gpu.wait_locked()
        os.kill(holder.tuner.pid if what == "tuner" else driver.call("ping"), signal.SIGKILL)
        reset_and_locked_again(f"SIGKILL of the {what} under phases", gpu, holder)


@switching
def test_nvml_fails_while_clocks_are_switched(gpu, holder):
    for group in ("set", "reset"):
        gpu.fake.gpu(0).fail(group, NVML_ERROR_UNKNOWN)
    time.sleep(WINDOW_S)
    for group in ("set", "reset"):
        gpu.fake.gpu(0).fail(group, 0)
    gpu.wait_reset("NVML fails", holder, HEARTBEAT_S + RESET_S, from_s=time.monotonic())
    assert gpu.wait_locked().tuner == holder.tuner
    wait_until(lambda: only(gpu, CLOCK_MHZ, PREFILL_MHZ), 5, "both clocks in turns")


# -- Serve -----------------------------------------------------------------------------------------


def test_settings_change(driver, gpu, holder):
    replica = driver.call("ping")
    driver.deploy(gpu.lease_dir, policy={"name": "fixed", "sm_clock_mhz": 1305})
    assert gpu.wait_locked(1305).tuner == holder.tuner
    driver.deploy(gpu.lease_dir, mode="observe")
    row, bound_s = "mode: observe", 2 * WINDOW_S + 1
    gpu.wait_reset(row, holder, bound_s, from_s=driver.call("reconfigured_s"))
    wait_until(lambda: gpu.is_untouched, 1, "the lease given back")
    driver.deploy(gpu.lease_dir)
    assert gpu.wait_locked().tuner == holder.tuner
    assert driver.call("ping") == replica


def test_observe_from_the_start(driver, gpu, holder):
    """Also while the constructor runs, before Serve has handed over the `user_config`."""
    driver.deploy(gpu.lease_dir, mode="observe")
    wait_until(lambda: gpu.is_untouched, RECOVERY_S, "the lease given back")
    before = gpu.fake.log()
    driver.deploy(gpu.lease_dir, slow_s=8, mode="observe")
    assert driver.call("tuner_status")["windows"] > 2, "the constructor was not slow enough"
    assert gpu.fake.log() == before


def test_rolling_update(driver, gpu, holder):
    driver.deploy(gpu.lease_dir, version=3)
    reset_and_locked_again("a rolling update", gpu, holder)
    gpu.check_writers()


def test_drain_is_cut_short(driver, gpu, holder):
    driver.send("answer_slowly", 30)
    wait_until(lambda: driver.call("requests_under_way"), 5, "the slow request under way")
    driver.delete()
    reset = reset_and_gone("a drain cut short", gpu, holder)
    assert reset.pid == holder.guard_pid, "the replica was not killed while it drained"


def test_delete(driver, gpu, holder):
    driver.delete()
    reset_and_gone("serve.delete", gpu, holder)


def test_serve_shutdown(driver, gpu, holder):
    driver.shutdown()
    reset_and_gone("serve.shutdown", gpu, holder)


def test_driver_ends(driver, gpu, holder):
    driver.end()
    reset_and_gone("the end of the driver", gpu, holder)
