"""Files for operators say what the code does: commands, lease directories, config files, docs."""

import configparser
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from agft_ray.gpu.config import ZeusdGpuConfig
from agft_ray.gpu.safety import lease
from agft_ray.serve.checks import simulated_app
from agft_ray.simulation.device_file import DeviceFile
from agft_ray.telemetry.status import TunerState

ROOT = Path(__file__).parents[2]
GUARD = ROOT / "deployments" / "guard"
PYTHONS = ("/opt/agft_ray/bin/python", "python")
UUID = "GPU-left-locked"


def service():
    # Keys may be repeated in a unit, and are case-sensitive.
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(GUARD / "agft-ray-guard.service")
    return unit["Service"]


def pod():
    return yaml.safe_load((GUARD / "daemonset.yaml").read_text())["spec"]["template"]["spec"]


def guard_container():
    return pod()["containers"][0]


COMMANDS = {
    "unit ExecStartPre": shlex.split(service()["ExecStartPre"].removeprefix("-")),
    "unit ExecStart": shlex.split(service()["ExecStart"]),
    "unit ExecStopPost": shlex.split(service()["ExecStopPost"]),
    "daemonset command": guard_container()["command"],
    "daemonset preStop": guard_container()["lifecycle"]["preStop"]["exec"]["command"],
}


def lease_dir_of(command):
    return command[command.index("--lease-dir") + 1]


@pytest.fixture
def left_locked(tmp_path):
    """Record of a GPU in a lease directory, left by an owner that died without a reset."""
    state = tmp_path / "gpu.json"
    DeviceFile.create(state, uuid=UUID, profile="rtx_a6000", model="llama-3.1-8b")
    target = {
        "uuid": UUID,
        "backend": "simulated",
        "actuator": "sm_clock",
        "path": str(state),
        "index": None,
        "token_path": "",
        "restore_power_limit_w": None,
        "restore_sm_clocks_mhz": None,
    }
    held = lease.Lease.acquire(tmp_path / "leases", UUID, lambda: target, owner="test")
    held.abandon()
    return Path(held.record_path)


def wait_until_gone(path, limit_s):
    deadline_s = time.monotonic() + limit_s
    while path.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return not path.exists()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_resets_what_a_dead_owner_left(command, left_locked):
    assert command[0] in PYTHONS
    assert command[1] == "-m"
    there = str(left_locked.parent)
    # -S: the image and the unit's environment have Python and this package only
    arguments = [there if each == lease_dir_of(command) else each for each in command[1:]]
    process = subprocess.Popen(
        [sys.executable, "-S", "-P", *arguments],
        cwd="/",
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        stderr=subprocess.PIPE,
    )
    try:
        # More than the promised 2 s: other tests may have the machine.
        assert wait_until_gone(left_locked, 8)
        if "--node" in command:
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0, process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_all_agree_on_the_lease_directory_of_root(monkeypatch):
    monkeypatch.delenv("AGFT_RAY_LEASE_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    directory = lease.default_directory()
    unit, spec, container = service(), pod(), guard_container()
    init = spec["initContainers"][0]
    assert {lease_dir_of(command) for command in COMMANDS.values()} == {directory}
    assert f"/run/{unit['RuntimeDirectory']}" == unit["ReadWritePaths"] == directory
    assert spec["volumes"][0]["hostPath"]["path"] == directory
    assert container["volumeMounts"] == init["volumeMounts"]
    assert container["volumeMounts"][0]["mountPath"] == directory
    assert init["command"] == ["chmod", unit["RuntimeDirectoryMode"], directory]


def test_a_lease_directory_as_the_kubelet_makes_it_is_refused(tmp_path):
    """Which is why the init container is there."""
    leases = tmp_path / "leases"
    leases.mkdir(mode=0o755)
    leases.chmod(0o755)
    with pytest.raises(Exception, match="mode 0700"):
        lease.leases(leases)
    leases.chmod(int(pod()["initContainers"][0]["command"][1], 8))
    assert lease.leases(leases) == []


def test_the_unit_leaves_the_guard_what_it_needs_and_no_more():
    unit = service()
    assert unit["Restart"] == "always"
    assert unit["RuntimeDirectoryPreserve"] == "yes"
    assert unit["CapabilityBoundingSet"] == "CAP_SYS_ADMIN"
    # Either would hide the GPUs' device files.
    assert not {"PrivateDevices", "ProtectClock"} & set(unit)


def test_the_pod_has_one_capability_and_an_image_that_must_be_set():
    spec, container = pod(), guard_container()
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    images = {each["image"] for each in spec["containers"] + spec["initContainers"]}
    assert len(images) == 1
    # Capitals make it invalid, so that a cluster says so instead of pulling somebody's image.
    assert images.pop().isupper()


@pytest.mark.parametrize("name", ["simulated", "nvml", "zeusd"])
def test_configs_of_simulated_engines_suit_their_gpus(name):
    path = ROOT / "configs" / f"{name}.yaml"
    config = simulated_app(path)
    deployment = yaml.safe_load(path.read_text())["applications"][0]["deployments"][0]
    if config.gpu.kind != "simulated":
        assert deployment["ray_actor_options"]["num_gpus"] == 1
        assert config.tuner.settle_s >= 0.5
        assert not config.tuner.share_experience
        assert config.tuner.mode == ("observe" if config.gpu.kind == "nvml" else "control")


def test_the_docs_name_every_setting_and_state():
    settings = (ROOT / "docs" / "real-gpus.md").read_text()
    assert {name for name in ZeusdGpuConfig.model_fields if f"| `{name}` |" not in settings} == {
        "kind"
    }
    safety = (ROOT / "docs" / "safety.md").read_text()
    documented = set(re.findall(r"^\| `([a-z ]+)` \|", safety, flags=re.MULTILINE))
    assert documented == {*TunerState}


@pytest.mark.parametrize(
    "page", ["docs/real-gpus.md", "docs/safety.md", "deployments/guard/README.md"]
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert links
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
