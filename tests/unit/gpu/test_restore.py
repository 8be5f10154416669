import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from golden_files import assert_golden, sections

from unit.gpu.safety.lease_tools import (
    ROOT,
    Owner,
    acquire,
    lock_clocks,
    locked_mhz,
    make_gpu,
    runs,
    simulated_target,
    within,
)

sys.path.insert(0, str(ROOT / "tests" / "fake_nvml"))
from fake_nvml import ENV, FakeNvml, build, load

from agft_ray.errors import (
    GpuArgumentError,
    GpuLostError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    GpuUnavailableError,
    LeaseHeldError,
)
from agft_ray.gpu.restore import main, reset_gpus
from agft_ray.gpu.safety import restore as module
from agft_ray.gpu.safety.guard import Guard
from agft_ray.gpu.safety.lease import Lease, leases, sweep
from agft_ray.gpu.safety.restore import restore
from agft_ray.gpu.safety.target import check_target, nvml_target


@pytest.fixture(scope="module")
def library_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def fake(tmp_path, library_dir, monkeypatch):
    """A fake NVML with two GPUs, for this process and its children."""
    fake = FakeNvml(tmp_path / "nvml-state", gpus=2)
    for name, value in fake.env(library_dir).items():
        monkeypatch.setenv(name, value)
    library = load(library_dir)
    library.nvmlErrorString.restype = ctypes.c_char_p
    monkeypatch.setattr(module, "_library", lambda: library)
    return fake


@pytest.fixture
def path(tmp_path):
    return make_gpu(tmp_path / "gpu.json")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "leases"


def test_a_simulated_gpu(path):
    lock_clocks(path)
    restore(simulated_target(path))
    assert locked_mhz(path) is None
    path.unlink()
    with pytest.raises(GpuLostError):
        restore(simulated_target(path))


def test_nvml_clocks_are_reset(fake):
    gpu = fake.gpu(1)
    gpu.locked_mhz = (900, 900)
    fake.gpu(0).locked_mhz = (600, 600)
    restore(nvml_target(gpu.uuid))
    assert gpu.locked_mhz is None
    assert fake.gpu(0).locked_mhz == (600, 600)
    restore(nvml_target(gpu.uuid))


def test_nvml_clocks_that_were_locked_before_us_are_locked_again(fake):
    gpu = fake.gpu(0)
    restore(nvml_target(gpu.uuid) | {"restore_sm_clocks_mhz": [300, 1200]})
    assert gpu.locked_mhz == (300, 1200)
    assert [entry.function for entry in fake.log()] == [
        "nvmlDeviceResetGpuLockedClocks",
        "nvmlDeviceSetGpuLockedClocks",
    ]


def test_nvml_power_limit(fake):
    gpu = fake.gpu(0)
    gpu.locked_mhz = (900, 900)
    gpu.power_limit_w = 300
    power = {"actuator": "power_limit", "restore_power_limit_w": 650.5}
    restore(nvml_target(gpu.uuid) | power)
    assert gpu.power_limit_w == 650.5
    assert gpu.locked_mhz == (900, 900)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (3, GpuNotSupportedError),
        (4, GpuPermissionError),
        (6, GpuTransientError),
        (9, GpuNotSupportedError),
        (10, GpuTransientError),
        (13, GpuNotSupportedError),
        (15, GpuLostError),
        (16, GpuLostError),
        (17, GpuNotSupportedError),
        (18, GpuNotSupportedError),
        (28, GpuUnavailableError),
        (999, GpuTransientError),
        (12345, GpuTransientError),
    ],
)
def test_every_nvml_code_becomes_its_error(fake, code, error):
    gpu = fake.gpu(0)
    gpu.fail("reset", code)
    with pytest.raises(error, match=f"ResetGpuLockedClocks failed .*NVML code {code}") as caught:
        restore(nvml_target(gpu.uuid))
    assert type(caught.value) is error
    assert gpu.calls("reset") == 1


def test_a_gpu_or_driver_that_is_not_there(fake, monkeypatch):
    with pytest.raises(GpuUnavailableError, match=r"HandleByUUID .*GPU-none.*smi -L"):
        restore(nvml_target("GPU-none"))
    monkeypatch.setenv(ENV, "/nowhere")
    with pytest.raises(GpuNotSupportedError, match="nvmlInit_v2 failed"):
        restore(nvml_target("GPU-none"))


def test_nvml_is_shut_down_as_often_as_it_is_initialised(fake, monkeypatch):
    library, calls = module._library(), []

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(library, name)

    monkeypatch.setattr(module, "_library", Counting)
    restore(nvml_target(fake.gpu(0).uuid))
    with pytest.raises(GpuUnavailableError):
        restore(nvml_target("GPU-none"))
    assert (calls.count("nvmlInit_v2"), calls.count("nvmlShutdown")) == (2, 2)


def test_no_nvml_library(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    module._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(GpuNotSupportedError, match=r"libnvidia-ml\.so\.1: "):
        module.prepare("nvml")


def test_zeusd_does_it_with_its_own_number_and_token(monkeypatch):
    calls = []

    class FakeClient:
        def __init__(self, *arguments):
            calls.append(arguments)

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    zeusd = pytest.importorskip("agft_ray.gpu.zeusd.backend")
    monkeypatch.setattr(zeusd, "ZeusdClient", FakeClient)
    target = nvml_target("GPU-0") | {
        "backend": "zeusd",
        "path": "/run/zeusd.sock",
        "index": 3,
        "token_path": "/t",
    }
    restore(target | {"restore_sm_clocks_mhz": [300, 1200]})
    restore(target | {"actuator": "power_limit", "restore_power_limit_w": 500})
    opened = ("/run/zeusd.sock", "/t")
    assert calls == [
        opened,
        ("reset_sm_clocks", 3),
        ("lock_sm_clocks", 3, 300, 1200),
        opened,
        ("set_power_limit", 3, 500),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uuid", "../x"),
        ("backend", "cuda"),
        ("backend", []),
        ("actuator", None),
        ("path", None),
        ("path", "a\0b"),
        ("index", True),
        ("index", -1),
        ("token_path", 1),
        ("restore_power_limit_w", float("nan")),
        ("restore_power_limit_w", 0),
        ("restore_power_limit_w", True),
        ("restore_sm_clocks_mhz", [900]),
        ("restore_sm_clocks_mhz", [900, 800]),
        ("restore_sm_clocks_mhz", [0, 800]),
        ("restore_sm_clocks_mhz", "ab"),
    ],
)
def test_what_is_no_target_is_refused_by_field_and_value(field, value):
    target = simulated_target("/x")
    assert check_target(target) == target
    with pytest.raises(GpuArgumentError, match=f": {field} .*{re.escape(repr(value))}$"):
        restore(target | {field: value})


@pytest.mark.parametrize(
    ("changes", "field", "whose"),
    [
        ({"path": ""}, "path", "simulated"),
        ({"backend": "zeusd"}, "index", "zeusd"),
        ({"actuator": "power_limit"}, "restore_power_limit_w", ""),
    ],
)
def test_a_field_that_a_target_lacks_is_named(changes, field, whose):
    with pytest.raises(GpuArgumentError, match=f": {field} .*{whose}"):
        restore(simulated_target("/x") | changes)
    with pytest.raises(GpuArgumentError, match="None"):
        check_target(None)


def test_the_guard_resets_real_ones_by_nvml(fake, directory):
    gpus = [fake.gpu(0), fake.gpu(1)]
    held = [
        Lease.acquire(directory, gpu.uuid, lambda u=gpu.uuid: nvml_target(u), owner="a")
        for gpu in gpus
    ]
    guard = Guard.start(held)
    for gpu in gpus:
        gpu.locked_mhz = (900, 900)
    gpus[0].fail("reset", 15)
    assert "libnvidia-ml" in Path(f"/proc/{guard.pid}/maps").read_text(), "loaded beforehand"
    assert gpus[1].calls("any") == 0, "but not initialised"
    status = Path(f"/proc/{guard.pid}/status").read_text()
    rss_kb = int(status.partition("VmRSS:")[2].split()[0])
    print(f"the guard's resident memory with the fake NVML loaded: {rss_kb} kB")
    assert rss_kb < 12_000
    guard._close()
    for lease in held:
        lease.abandon()
    assert within(1.0, lambda: gpus[1].locked_mhz is None)
    assert within(1.0, lambda: not runs(guard.pid)), "a lost GPU needs no reset"
    assert leases(directory) == []
    assert gpus[0].calls("reset") == 1


def test_a_busy_driver_is_tried_again_by_the_guard(fake, directory):
    gpu = fake.gpu(0)
    lease = Lease.acquire(directory, gpu.uuid, lambda: nvml_target(gpu.uuid), owner="a")
    guard = Guard.start([lease])
    gpu.locked_mhz = (900, 900)
    gpu.fail("reset", 999, times=3)
    guard._close()
    lease.abandon()
    assert within(3.0, lambda: gpu.locked_mhz is None)
    assert gpu.calls("reset") == 4
    assert within(1.0, lambda: not runs(guard.pid))


def test_a_sweep_keeps_what_nvml_refuses_and_drops_what_is_lost(fake, directory):
    gpu = fake.gpu(0)
    lease = Lease.acquire(directory, gpu.uuid, lambda: nvml_target(gpu.uuid), owner="a")
    lease.abandon()
    gpu.fail("reset", 4)
    [(_, outcome)] = sweep(directory)
    assert isinstance(outcome, GpuPermissionError)
    assert len(leases(directory)) == 1
    gpu.fail("reset", 15)
    assert len(sweep(directory)) == 1
    assert leases(directory) == []


def test_a_sweep_keeps_the_record_of_a_gpu_it_does_not_see(fake, directory):
    """As in a container that has been given other GPUs than the dead owner's."""
    gpu = fake.gpu(0)
    gpu.locked_mhz = (900, 900)
    Lease.acquire(directory, gpu.uuid, lambda: nvml_target(gpu.uuid), owner="a").abandon()
    for code in (6, 28):
        gpu.fail("handle", code)
        [(_, outcome)] = sweep(directory)
        assert isinstance(outcome, GpuUnavailableError)
        assert len(leases(directory)) == 1
    gpu.fail("handle", 0)
    [(_, outcome)] = sweep(directory)
    assert not isinstance(outcome, Exception)
    assert gpu.locked_mhz is None
    assert leases(directory) == []


@pytest.fixture
def hung(fake):
    """GPU 0, whose resets hang until the test is over."""
    fake.gpu(0).delay("reset", 60.0)
    yield fake.gpu(0)
    fake.gpu(0).delay("reset", 0.0)
    # Not after its environment is gone.
    assert within(10.0, lambda: not any("reset of" in each.name for each in threading.enumerate()))


def leave(directory, gpu):
    """What a dead owner leaves."""
    gpu.locked_mhz = (900, 900)
    Lease.acquire(directory, gpu.uuid, lambda: nvml_target(gpu.uuid), owner="a").abandon()


def test_a_gpu_that_hangs_keeps_no_sweep_from_the_others(fake, hung, directory):
    for gpu in (hung, fake.gpu(1)):
        leave(directory, gpu)
    begin_s = time.monotonic()
    outcomes = dict(sweep(directory))
    assert time.monotonic() - begin_s < 20.0
    assert isinstance(outcomes[hung.uuid], GpuTransientError)
    assert " 2 s" in str(outcomes[hung.uuid])
    assert not isinstance(outcomes[fake.gpu(1).uuid], Exception)
    assert fake.gpu(1).locked_mhz is None
    with pytest.raises(LeaseHeldError):
        Lease.acquire(directory, hung.uuid, lambda: nvml_target(hung.uuid), owner="b")
    hung.delay("reset", 0.0)
    assert within(10.0, lambda: leases(directory) == []), "it was done after all"
    Lease.acquire(directory, hung.uuid, lambda: nvml_target(hung.uuid), owner="b").release()
    assert hung.calls("reset") == 1


def test_a_reset_that_hangs_keeps_no_owner_and_lets_no_other_in(hung, directory):
    leave(directory, hung)

    def acquire():
        return Lease.acquire(directory, hung.uuid, lambda: nvml_target(hung.uuid), owner="b")

    with pytest.raises(GpuTransientError, match=" 2 s"):
        acquire()
    with pytest.raises(LeaseHeldError):
        acquire()
    hung.delay("reset", 0.0)
    assert within(10.0, lambda: not leases(directory)[0].held)
    acquire().release()


def test_a_gpu_that_hangs_keeps_the_guard_from_no_other(fake, hung, directory):
    held = [
        Lease.acquire(directory, gpu.uuid, lambda u=gpu.uuid: nvml_target(u), owner="a")
        for gpu in (hung, fake.gpu(1))
    ]
    guard = Guard.start(held)
    for gpu in (hung, fake.gpu(1)):
        gpu.locked_mhz = (900, 900)
    guard._close()
    for lease in held:
        lease.abandon()
    assert within(1.0, lambda: fake.gpu(1).locked_mhz is None)
    assert hung.locked_mhz == (900, 900)
    hung.delay("reset", 0.0)
    assert within(5.0, lambda: hung.locked_mhz is None and leases(directory) == [])


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    return code, capsys.readouterr().out


def test_the_command_resets_what_dead_owners_left(directory, path, tmp_path, capsys):
    living_path = make_gpu(tmp_path / "living.json", "GPU-1")
    dead = acquire(directory, path)
    lock_clocks(path)
    living = acquire(directory, living_path)
    lock_clocks(living_path)
    dead.abandon()
    where = ("--lease-dir", directory)
    screens = {}
    code, screens["--all"] = run(capsys, "--all", *where)
    assert code == 0
    assert (locked_mhz(path), locked_mhz(living_path)) == (None, 900)
    code, screens["GPU-0 GPU-1"] = run(capsys, "GPU-0", "GPU-1", *where)
    assert code == 1
    living.check()
    code, screens["--all --force"] = run(capsys, "--all", "--force", *where)
    assert code == 0
    assert locked_mhz(living_path) is None
    assert living.is_lost()
    with pytest.raises(LeaseHeldError, match="barred"):
        living.renew()
    living.release()
    code, screens["--all, without leases"] = run(capsys, "--all", *where)
    assert code == 0
    changing = {f"PID {os.getpid()} ": "PID <pid> ", str(directory): "<leases>"}
    assert_golden("reset", sections(screens), changing)


def test_the_command_forces_a_gpu_without_a_record_by_nvml(fake, directory, capsys):
    fake.gpu(0).locked_mhz = (900, 900)
    arguments = (fake.gpu(0).uuid, "--force", "--lease-dir", directory)
    assert run(capsys, *arguments)[0] == 0
    assert fake.gpu(0).locked_mhz is None
    fake.gpu(0).fail("reset", 4)
    code, out = run(capsys, *arguments)
    assert code == 1
    assert "CAP_SYS_ADMIN" in out


@pytest.mark.parametrize("arguments", [[], ["--all", "GPU-0"], ["a/b"], ["--what"]])
def test_the_command_refuses_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_command_as_a_process_after_a_kill(directory, path):
    with Owner(directory, path) as owner:
        os.kill(owner.guard_pid, 9)
        owner.kill()
    assert locked_mhz(path) == 900
    command = [sys.executable, "-m", "agft_ray.gpu.restore", "--all", "--lease-dir", directory]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.match(rf"GPU-0: .* PID {owner.pid} ", result.stdout)
    assert result.stderr == ""
    assert locked_mhz(path) is None


def test_an_untrusted_directory_is_one_line(directory, capsys):
    directory.mkdir(mode=0o755)
    code, out = run(capsys, "--all", "--lease-dir", directory)
    assert code == 1
    assert out.count("\n") == 1
    assert re.search(f"{directory} .* 0700", out)
    with pytest.raises(GpuPermissionError):
        reset_gpus(str(directory), None, False)
