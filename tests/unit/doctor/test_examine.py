"""`agft-ray doctor` and `agft-ray reset`: what they find, what they change, how they exit.

What the screens look like is in test_text.py and ../gpu/test_restore.py. On the fake NVML driver
and the fake zeusd. The energy counter is watched for 0.1 s instead of 1 s.
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


def test_one_screen_says_it_all(fake, run, lease_dir):
    fake.add_gpu(name="NVIDIA A40")
    status, text = run("doctor")
    assert status == 0
    for fact in (
        "550.54.15",
        "uid 0",
        str(lease_dir),
        "GPU 0: NVIDIA H100 80GB HBM3",
        fake.gpu(0).uuid,
        "0000:17:00.0",
        "GPU 1: NVIDIA A40",
        fake.gpu(1).uuid,
        "210..1980 MHz",
        "200..700 W",
        "actuator: sm_clock",
        "2 of 2 GPUs",
    ):
        assert fact in text


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
    assert gpu["device"]["pci_address"] == "0000:17:00.0"
    assert gpu["device"]["sm_clocks_mhz"][::118] == [210, 1980]
    assert gpu["device"]["power_limit_range_w"] == [200.0, 700.0]
    counter = gpu["energy_counter"]
    assert 0.01 < counter["update_period_s"] < 0.02 + 2 * counter["poll_s"], (
        "where it was looked at"
    )
    assert gpu["can_control"]
    assert not gpu["control_is_tried"]
    assert gpu["obstacles"] == found["problems"] == []
    assert gpu["lease"] is gpu["clock_probe"] is None


def test_without_privilege_it_names_the_ways(fake, run, facts, unprivileged):
    found = facts()
    assert not found["can_control"]
    (gpu,) = found["gpus"]
    assert not gpu["control_is_tried"]
    assert re.search("uid 1000.*CAP_SYS_ADMIN", gpu["obstacles"][0])
    text = run("doctor")[1]
    for way in ("--cap-add SYS_ADMIN", "kind: zeusd", "`mode: observe`", "`actuator: power_limit`"):
        assert way in text
    assert "0 of 1 GPUs" in text


def test_the_probe_measures_lock_and_reset(fake, facts, lease_dir):
    found = facts("--probe-clocks")
    assert found["can_control"]
    assert [entry.function for entry in fake.log()] == [
        "nvmlDeviceSetGpuLockedClocks",
        "nvmlDeviceResetGpuLockedClocks",
        "nvmlDeviceResetGpuLockedClocks",
    ]
    (gpu,) = found["gpus"]
    assert gpu["control_is_tried"]
    probe = gpu["clock_probe"]
    assert probe["arm_mhz"] == probe["lock"]["sm_clock_mhz"] == 1095
    for change in (probe["lock"], probe["reset"]):
        assert 0 < change["call_s"] <= change["settle_s"]
    assert fake.gpu(0).locked_mhz is None
    assert list(lease_dir.glob("*.json")) == []


def test_the_probe_outdoes_what_is_inferred(fake, facts, unprivileged):
    assert not facts()["can_control"]
    found = facts("--probe-clocks")
    assert found["can_control"]
    assert found["gpus"][0]["control_is_tried"]


def test_the_probe_is_refused_by_nvml(fake, facts, lease_dir):
    for group in ("set", "reset"):
        fake.gpu(0).fail(group, NO_PERMISSION)
    found = facts("--probe-clocks")
    assert not found["can_control"]
    (gpu,) = found["gpus"]
    assert gpu["control_is_tried"]
    assert gpu["obstacles"][0].startswith("nvmlDeviceSetGpuLockedClocks failed")
    assert len(fake.log()) == 1
    assert list(lease_dir.glob("*.json")) == []


def test_the_probe_on_an_idle_gpu_says_what_it_could_not_see(fake, facts, monkeypatch):
    monkeypatch.setattr("agft_ray.gpu.probe.SETTLE_LIMIT_S", 0.05)
    fake.gpu(0).busy = 0.0
    fake.gpu(0).sm_clock_mhz = 210
    found = facts("--probe-clocks")
    assert found["can_control"]
    probe = found["gpus"][0]["clock_probe"]
    for change in (probe["lock"], probe["reset"]):
        assert (change["settle_s"], change["sm_clock_mhz"], change["idle"]) == (None, 210, True)


def test_the_probe_of_limits_is_refused(run):
    assert run("doctor", "--probe-clocks", "--actuator", "power_limit")[0] == 2


def test_mig(fake, facts):
    fake.gpu(0).mig_mode = 1
    (gpu,) = facts("--probe-clocks")["gpus"]
    assert not gpu["can_control"]
    assert gpu["device"]["mig_enabled"]
    assert "MIG" in gpu["obstacles"][0]
    assert not gpu["control_is_tried"]
    assert fake.log() == []


def test_vgpu(fake, facts):
    fake.gpu(0).virtualization_mode = 2
    (gpu,) = facts()["gpus"]
    assert not gpu["can_control"]
    assert gpu["device"]["virtualization"] == "vgpu"
    assert "vgpu" in gpu["obstacles"][0]


def test_persistence_off(fake, facts):
    fake.gpu(0).persistence_mode = 0
    found = facts()
    assert found["can_control"]
    assert found["gpus"][0]["device"]["persistence_mode"] is False


def test_no_energy_counter(fake, facts):
    fake.gpu(0).fail("energy", NOT_SUPPORTED)
    found = facts()
    assert found["can_control"]
    assert found["gpus"][0]["energy_counter"]["source"] == "integrated"


def test_a_stuck_energy_counter(fake, facts):
    fake.gpu(0).counter_stuck = 1
    counter = facts()["gpus"][0]["energy_counter"]
    assert (counter["source"], counter["changes"]) == ("counter", 0)
    assert counter["update_period_s"] is counter["resolution_j"] is None
    assert counter["watched_s"] >= 0.1


def test_a_hung_driver_gives_a_message(fake, facts):
    fake.gpu(0).delay("any", 60.0)
    begin_s = time.monotonic()
    (gpu,) = facts()["gpus"]
    assert time.monotonic() - begin_s < 5
    fake.gpu(0).delay("any", 0.0)
    assert not gpu["can_control"]
    assert gpu["device"]["uuid"] is gpu["device"]["model"] is None
    assert re.search("GPU 0 .* 2 s", gpu["obstacles"][0])


def test_one_gpu_that_fails_does_not_hide_the_other(fake, facts):
    fake.add_gpu()
    fake.gpu(1).fail("any", 15)
    found = facts()
    assert [gpu["can_control"] for gpu in found["gpus"]] == [True, False]
    assert "NVML code 15" in found["gpus"][1]["obstacles"][0]
    assert facts("--gpu", fake.gpu(0).uuid)["can_control"]


def test_gpus_are_chosen_by_uuid(fake, facts):
    second = fake.add_gpu("GPU-abcdef")
    found = facts("--gpu", "GPU-abc")
    assert [gpu["device"]["uuid"] for gpu in found["gpus"]] == [second.uuid]
    found = facts("--gpu", "GPU-abc", "--gpu", "GPU-unknown")
    assert not found["can_control"]
    assert "'GPU-unknown'" in found["problems"][0]


def test_a_living_holder_is_shown_and_left_alone(fake, facts, take):
    take()
    found = facts("--probe-clocks")
    assert found["can_control"]
    (gpu,) = found["gpus"]
    lease = gpu["lease"]
    assert (lease["pid"], lease["owner"], lease["guard_pid"]) == (os.getpid(), "app#LLM r1", None)
    assert lease["held"]
    assert str(os.getpid()) in gpu["remarks"][0]
    assert not gpu["control_is_tried"]
    assert gpu["clock_probe"] is None
    assert fake.log() == []


def test_a_held_gpu_does_not_hide_missing_privilege(fake, run, take, unprivileged):
    take()
    assert run("doctor", "--probe-clocks")[0] == 1


def test_a_dead_holder_is_shown_with_the_way_out(fake, run, facts, take):
    take().abandon()
    lease = facts()["gpus"][0]["lease"]
    assert (lease["pid"], lease["held"]) == (os.getpid(), False)
    assert f"`agft-ray reset {fake.gpu(0).uuid}`" in run("doctor")[1]
    assert fake.log() == []


def test_a_bar_is_shown(fake, run, facts):
    assert run("reset", "--force", fake.gpu(0).uuid)[0] == 0
    (gpu,) = facts()["gpus"]
    assert gpu["barred_s"] == pytest.approx(60, abs=10)
    assert gpu["can_control"]


def test_a_lease_directory_that_others_may_change(fake, facts, lease_dir):
    lease_dir.mkdir(mode=0o777)
    lease_dir.chmod(0o777)
    found = facts()
    problem = found["node"]["lease_problem"]
    assert re.search(f"{lease_dir} .* 0700", problem)
    assert found["gpus"][0]["obstacles"] == [problem]


def test_a_lease_directory_that_cannot_be_made(fake, facts, tmp_path):
    absent = tmp_path / "a" / "b" / "c"
    (gpu,) = facts("--lease-dir", absent)["gpus"]
    assert str(absent) in gpu["obstacles"][0]


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


def test_no_gpu_at_all(fake, run, facts, monkeypatch, tmp_path):
    empty = FakeNvml(tmp_path / "none", gpus=0)
    monkeypatch.setenv("AGFT_FAKE_NVML", str(empty.path))
    found = facts()
    assert (found["can_control"], found["gpus"]) == (False, [])
    assert found["node"]["versions"]["driver"] == "550.54.15"
    assert len(found["problems"]) == 1
    assert "`gpu: {kind: simulated}`" in run("doctor")[1]


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
    assert "NVML code 12" in text
    assert "`gpu: {kind: simulated}`" in text
    assert "Driver " not in text
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
    for arguments, named in ((["--all"], str(lease_dir)), (["GPU-1"], "GPU-1: ")):
        status, text = run("reset", *arguments)
        assert status == 0
        assert named in text
    assert not lease_dir.exists()


def test_reset_of_what_a_dead_owner_left(fake, run, take, lease_dir):
    take().abandon()
    fake.gpu(0).locked_mhz = (900, 900)
    status, text = run("reset", "--all")
    assert status == 0
    assert text.startswith(f"{fake.gpu(0).uuid}: ")
    assert f"PID {os.getpid()} (app#LLM r1)" in text
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
    assert run("reset", "--all", "--force")[0] == 0
    assert fake.gpu(0).locked_mhz is None
