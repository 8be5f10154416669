"""`agft-ray doctor` and `agft-ray reset`: what they say, what they change, how they exit.

On the fake NVML driver and the fake zeusd. The energy counter is watched for 0.1 s instead of 1 s.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest
from polling import wait_until

sys.path.insert(0, str(Path(__file__).parents[2] / "fake_nvml"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from fake_nvml import FakeNvml, build, use_in_pynvml
from fake_zeusd import FakeZeusd, MemoryGpu

from agft_ray.cli.app import main
from agft_ray.doctor import examine as doctor
from agft_ray.doctor.findings import Privileges
from agft_ray.gpu.nvml import backend as nvml
from agft_ray.gpu.nvml.session import NvmlSession
from agft_ray.gpu.probe import watch_energy_counter
from agft_ray.gpu.safety.lease import Lease
from agft_ray.gpu.safety.target import nvml_target

ROOT = Path(__file__).parents[3]
NO_PERMISSION, NOT_SUPPORTED = 4, 3
RUN = """
import functools, sys
from agft_ray.cli.app import main
from agft_ray.doctor import examine as doctor
doctor.watch_energy_counter = functools.partial(doctor.watch_energy_counter, watch_s=0.1)
sys.exit(main(sys.argv[1:]))
"""

privileges_by_status = Privileges.of_this_process


@pytest.fixture(scope="module")
def library_dir(tmp_path_factory):
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def fake(tmp_path, library_dir, monkeypatch):
    fake = FakeNvml(tmp_path / "gpus", gpus=1)
    fake.gpu(0).counter_update_s = 0.02
    for name, value in fake.env(library_dir).items():
        monkeypatch.setenv(name, value)
    with session_on(library_dir, monkeypatch):
        yield fake


@contextlib.contextmanager
def session_on(library_dir, monkeypatch):
    use_in_pynvml(library_dir)
    session = NvmlSession(pynvml)
    monkeypatch.setattr(nvml, "_SESSION", session)
    yield
    wait_until(lambda: session.thread._running is None)
    if session._is_open:
        session.thread.call(pynvml.nvmlShutdown, deadline_s=5.0)
    use_in_pynvml(None)


@pytest.fixture
def lease_dir(tmp_path):
    return tmp_path / "leases"


@pytest.fixture(autouse=True)
def quick_and_privileged(monkeypatch):
    watch = functools.partial(watch_energy_counter, watch_s=0.1)
    monkeypatch.setattr(doctor, "watch_energy_counter", watch)
    monkeypatch.setattr(Privileges, "of_this_process", lambda: Privileges(0, True))


@pytest.fixture
def patient(monkeypatch):
    """Watch the counter as long as the command does, to see several changes even if slowed down."""
    monkeypatch.setattr(doctor, "watch_energy_counter", watch_energy_counter)


@pytest.fixture
def unprivileged(monkeypatch):
    monkeypatch.setattr(Privileges, "of_this_process", lambda: Privileges(1000, False))


@pytest.fixture
def run(capsys, lease_dir):
    """Run a command; its exit status, and its text in one line so that no line break matters."""

    def run(command, *arguments):
        capsys.readouterr()
        status = main([command, "--lease-dir", str(lease_dir), *map(str, arguments)])
        return status, " ".join(capsys.readouterr().out.split())

    return run


@pytest.fixture
def facts(run):
    def facts(*arguments):
        status, text = run("doctor", "--json", *arguments)
        found = json.loads(text)
        assert status == (0 if found["can_control"] else 1)
        return found

    return facts


@pytest.fixture
def take(lease_dir, fake):
    """The lease of GPU 0, as its owner takes it."""
    taken = []

    def take(owner="app#LLM r1"):
        uuid = fake.gpu(0).uuid
        lease = Lease.acquire(lease_dir, uuid, lambda: nvml_target(uuid), owner=owner)
        taken.append(lease)
        return lease

    yield take
    for lease in taken:
        lease.release()


def test_one_screen_says_it_all(fake, run, lease_dir, patient):
    fake.add_gpu(name="NVIDIA A40")
    status, text = run("doctor")
    assert status == 0
    for fact in (
        "Driver 550.54.15, NVML 12.550.54.15, CUDA up to 12.4",
        "uid 0, with CAP_SYS_ADMIN",
        f"Leases: {lease_dir}",
        f"UUID {fake.gpu(0).uuid}, PCI 0000:17:00.0",
        "GPU 0: NVIDIA H100 80GB HBM3",
        "GPU 1: NVIDIA A40",
        "SM clocks 210..1980 MHz, 119 of them, 15 MHz apart",
        "Power limit 700 W, default 700 W, may be 200..700 W",
        "Persistence on",
        "MIG off, virtualization none, 0 compute processes",
        "Energy counter updated every",
        "Lock, reset not measured (--probe-clocks does",
        "Lease free",
        "clocks should be settable, inferred from uid and capabilities; --probe-clocks tries it",
        "`mode: control` with `gpu: {kind: nvml, actuator: sm_clock}` would work (2 of 2 GPUs).",
    ):
        assert fact in text
    assert text.count("Three ways") == 1


@pytest.mark.parametrize("privilege", [True, False])
def test_it_fits_a_screen(fake, lease_dir, capsys, monkeypatch, privilege):
    monkeypatch.setattr(Privileges, "of_this_process", lambda: Privileges(0, privilege))
    main(["doctor", "--lease-dir", str(lease_dir)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("options", [[], ["--json"], ["--actuator", "power_limit"]])
def test_it_only_reads(fake, run, lease_dir, tmp_path, options):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run("doctor", *options)[0] == 0
    assert fake.log() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not lease_dir.exists()


def test_the_same_facts_as_json(fake, facts, patient):
    found = facts()
    (gpu,) = found["gpus"]
    assert found["node"]["versions"]["driver"] == "550.54.15"
    assert gpu["device"]["uuid"] == fake.gpu(0).uuid
    assert gpu["device"]["sm_clocks_mhz"][::118] == [210, 1980]
    counter = gpu["energy_counter"]
    assert 0.01 < counter["update_period_s"] < 0.02 + 2 * counter["poll_s"], (
        "where it was looked at"
    )
    assert gpu["can_control"]
    assert not gpu["control_is_tried"]
    assert gpu["obstacles"] == found["problems"] == []
    assert gpu["lease"] is gpu["clock_probe"] is None


def test_without_privilege_it_names_three_ways(fake, run, unprivileged):
    status, text = run("doctor")
    assert status == 1
    assert (
        "Control NO (inferred, nothing was set to find out): this process (uid 1000, without"
        in text
    )
    for way in ("CAP_SYS_ADMIN", "kind: zeusd", "`mode: observe`", "`actuator: power_limit`"):
        assert way in text[text.index("Three ways") :]
    assert "would NOT work (0 of 1 GPUs)." in text


def test_the_probe_measures_lock_and_reset(fake, run, lease_dir):
    status, text = run("doctor", "--probe-clocks")
    assert status == 0
    assert [entry.function for entry in fake.log()] == [
        "nvmlDeviceSetGpuLockedClocks",
        "nvmlDeviceResetGpuLockedClocks",
        "nvmlDeviceResetGpuLockedClocks",
    ]
    assert "Lock at 1095 MHz: the call took" in text
    assert text.count("the clock was there after") == 2
    assert "clocks can be set: tried just now" in text
    assert fake.gpu(0).locked_mhz is None
    assert list(lease_dir.glob("*.json")) == []


def test_the_probe_outdoes_what_is_inferred(fake, facts, unprivileged):
    assert not facts()["can_control"]
    found = facts("--probe-clocks")
    assert found["can_control"]
    assert found["gpus"][0]["control_is_tried"]


def test_the_probe_is_refused_by_nvml(fake, run, lease_dir):
    for group in ("set", "reset"):
        fake.gpu(0).fail(group, NO_PERMISSION)
    status, text = run("doctor", "--probe-clocks")
    assert status == 1
    assert "Control NO, as just tried: nvmlDeviceSetGpuLockedClocks failed" in text
    assert len(fake.log()) == 1
    assert list(lease_dir.glob("*.json")) == []


def test_the_probe_on_an_idle_gpu_says_what_it_could_not_see(fake, run, monkeypatch):
    monkeypatch.setattr("agft_ray.gpu.probe.SETTLE_LIMIT_S", 0.05)
    fake.gpu(0).busy = 0.0
    fake.gpu(0).sm_clock_mhz = 210
    status, text = run("doctor", "--probe-clocks")
    assert status == 0
    assert text.count("it is 210 MHz (the GPU is idle, which hides it") == 2


def test_the_probe_of_limits_is_refused(run):
    assert run("doctor", "--probe-clocks", "--actuator", "power_limit")[0] == 2


def test_mig(fake, run):
    fake.gpu(0).mig_mode = 1
    status, text = run("doctor", "--probe-clocks")
    assert status == 1
    assert "MIG ON" in text
    assert "all its instances share one SM clock" in text
    assert fake.log() == []


def test_vgpu(fake, run):
    fake.gpu(0).virtualization_mode = 2
    status, text = run("doctor")
    assert status == 1
    assert "its virtualization mode is vgpu" in text


def test_persistence_off(fake, run):
    fake.gpu(0).persistence_mode = 0
    status, text = run("doctor")
    assert status == 0
    assert "Persistence OFF: the driver may drop a lock when the last process closes" in text


def test_no_energy_counter(fake, run):
    fake.gpu(0).fail("energy", NOT_SUPPORTED)
    status, text = run("doctor")
    assert status == 0
    assert "Energy counter NONE: energy is integrated from polled power" in text


def test_a_stuck_energy_counter(fake, run):
    fake.gpu(0).counter_stuck = 1
    assert re.search(r"it did NOT MOVE in \d+\.\d s", run("doctor")[1])


def test_a_hung_driver_gives_a_message(fake, run):
    fake.gpu(0).delay("any", 60.0)
    begin_s = time.monotonic()
    status, text = run("doctor")
    assert time.monotonic() - begin_s < 5
    fake.gpu(0).delay("any", 0.0)
    assert status == 1
    assert "GPU 0: unknown model" in text
    assert "Control NO: description of GPU 0 did not return from NVML within 2 s" in text


def test_one_gpu_that_fails_does_not_hide_the_other(fake, facts):
    fake.add_gpu()
    fake.gpu(1).fail("any", 15)
    found = facts()
    assert [gpu["can_control"] for gpu in found["gpus"]] == [True, False]
    assert "fell off the bus" in found["gpus"][1]["obstacles"][0]
    assert facts("--gpu", fake.gpu(0).uuid)["can_control"]


def test_gpus_are_chosen_by_uuid(fake, facts):
    second = fake.add_gpu("GPU-abcdef")
    found = facts("--gpu", "GPU-abc")
    assert [gpu["device"]["uuid"] for gpu in found["gpus"]] == [second.uuid]
    found = facts("--gpu", "GPU-abc", "--gpu", "GPU-unknown")
    assert not found["can_control"]
    assert "'GPU-unknown' is no GPU of this node" in found["problems"][0]


def test_a_living_holder_is_shown_and_left_alone(fake, run, take):
    take()
    status, text = run("doctor", "--probe-clocks")
    assert status == 0
    assert f"Lease held by PID {os.getpid()} (app#LLM r1), guard PID None; others have" in text
    assert "Note clocks were not probed:" in text
    assert "inferred" in text
    assert fake.log() == []


def test_a_held_gpu_does_not_hide_missing_privilege(fake, run, take, unprivileged):
    take()
    assert run("doctor", "--probe-clocks")[0] == 1


def test_a_dead_holder_is_shown_with_the_way_out(fake, run, take):
    take().abandon()
    text = run("doctor")[1]
    assert "which died; `agft-ray reset GPU-" in text
    assert fake.log() == []


def test_a_bar_is_shown(fake, run):
    assert run("reset", "--force", fake.gpu(0).uuid)[0] == 0
    assert "Lease free; barred for 60 s by `agft-ray reset --force`" in run("doctor")[1]


def test_a_lease_directory_that_others_may_change(fake, run, lease_dir):
    lease_dir.mkdir(mode=0o777)
    lease_dir.chmod(0o777)
    status, text = run("doctor")
    assert status == 1
    assert f"{lease_dir} must be a directory with mode 0700" in text


def test_a_lease_directory_that_cannot_be_made(fake, facts, tmp_path):
    found = facts("--lease-dir", tmp_path / "a" / "b" / "c")
    assert "cannot be made or written" in found["gpus"][0]["obstacles"][0]


def test_zeusd_takes_the_place_of_privilege(fake, facts, tmp_path, unprivileged, monkeypatch):
    monkeypatch.setattr("agft_ray.gpu.probe.SETTLE_LIMIT_S", 0.05)
    path = tmp_path / "zeusd.sock"
    gpus = [MemoryGpu(fake.gpu(0).name, "0000:17:00.0")]
    with FakeZeusd(path, gpus=gpus) as zeusd:
        found = facts("--zeusd", path)
        assert found["can_control"]
        assert (found["node"]["kind"], found["node"]["zeusd_problem"]) == ("zeusd", None)
        assert {method for method, *_ in zeusd.requests} == {"GET"}
        assert facts("--zeusd", path, "--probe-clocks")["gpus"][0]["control_is_tried"]
        assert gpus[0].locked_mhz is None
    assert fake.log() == []
    assert not facts("--zeusd", path)["can_control"]


def test_zeusd_at_its_usual_place_is_found(fake, facts, tmp_path, unprivileged, monkeypatch):
    path = tmp_path / "zeusd.sock"
    monkeypatch.setattr(doctor, "DEFAULT_SOCKET", str(path))
    with FakeZeusd(path, gpus=[MemoryGpu(pci_address="0000:17:00.0")], disabled=["gpu-control"]):
        found = facts()
    assert found["node"]["kind"] == "zeusd"
    assert "--enable gpu-control" in found["gpus"][0]["obstacles"][0]


@pytest.mark.parametrize(
    ("effective", "expected"),
    [("000001ffffffffff", True), ("00000000a80425fb", False), ("0000000000200000", True)],
)
def test_privilege_is_a_capability_not_uid_0(tmp_path, effective, expected):
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nCapPrm:\t0\nCapEff:\t{effective}\n")
    assert privileges_by_status(str(status)) == Privileges(os.geteuid(), expected)


def test_no_gpu_at_all(fake, run, monkeypatch, tmp_path):
    empty = FakeNvml(tmp_path / "none", gpus=0)
    monkeypatch.setenv("AGFT_FAKE_NVML", str(empty.path))
    status, text = run("doctor")
    assert status == 1
    assert "PROBLEM: the driver shows no GPU to this process" in text
    assert "the simulated GPU (`gpu: {kind: simulated}`) needs neither" in text


def test_no_driver_at_all(lease_dir, tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", RUN, "doctor", "--lease-dir", str(lease_dir)],
        env={**os.environ, "LD_LIBRARY_PATH": "", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    text = " ".join(found.stdout.split())
    assert (found.returncode, found.stderr) == (1, "")
    assert "NVML Shared Library Not Found" in text
    assert "the simulated GPU" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_probe_leaves_default_clocks(fake, lease_dir, signal_number, status):
    gpu = fake.gpu(0)
    gpu.settle_s = 300.0
    patient = "from agft_ray.gpu import probe; probe.SETTLE_LIMIT_S = 100.0\n"
    arguments = ["doctor", "--probe-clocks", "--lease-dir", str(lease_dir)]
    child = subprocess.Popen(
        [sys.executable, "-c", patient + RUN, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: gpu.locked_mhz is not None)
        child.send_signal(signal_number)
        assert child.wait(10) == status
        wait_until(lambda: gpu.locked_mhz is None and not list(lease_dir.glob("*.json")))
    finally:
        child.kill()
        child.wait()


def test_reset_needs_all_or_uuids(run, capsys):
    for arguments in ([], ["--all", "GPU-1"], ["no/uuid"]):
        assert run("reset", *arguments)[0] == 2


def test_reset_with_nothing_to_do(run, lease_dir):
    assert run("reset", "--all") == (0, f"no leases in {lease_dir}: nothing to reset")
    status, text = run("reset", "GPU-1")
    assert (status, text) == (0, "GPU-1: no lease, nothing to reset")
    assert not lease_dir.exists()


def test_reset_of_what_a_dead_owner_left(fake, run, take, lease_dir):
    take().abandon()
    fake.gpu(0).locked_mhz = (900, 900)
    status, text = run("reset", "--all")
    assert status == 0
    assert text == f"{fake.gpu(0).uuid}: reset what PID {os.getpid()} (app#LLM r1) left"
    assert fake.gpu(0).locked_mhz is None
    assert list(lease_dir.glob("*.json")) == []


def test_reset_that_fails(fake, run, take):
    take().abandon()
    fake.gpu(0).fail("reset", NO_PERMISSION)
    status, text = run("reset", "--all")
    assert status == 1
    assert text.startswith(f"{fake.gpu(0).uuid}: NOT reset: ")


def test_reset_leaves_the_living_alone_unless_forced(fake, run, take):
    take()
    fake.gpu(0).locked_mhz = (900, 900)
    assert run("reset", fake.gpu(0).uuid)[0] == 1
    assert run("reset", "--all")[0] == 0
    assert fake.gpu(0).locked_mhz == (900, 900)
    status, text = run("reset", "--all", "--force")
    assert status == 0
    assert "and then come back, unless their mode is changed" in text
    assert fake.gpu(0).locked_mhz is None
