"""The KubeRay manifest agrees with the shipped config, the guard's DaemonSet and the code."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from agft_ray.gpu.safety import directory as lease_directory
from agft_ray.serve.checks import validate_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def spec():
    return yaml.safe_load((ROOT / "deployments" / "kuberay" / "rayservice.yaml").read_text())[
        "spec"
    ]


@pytest.fixture(scope="module")
def worker(spec):
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    return group["template"]["spec"]


@pytest.fixture(scope="module")
def guard():
    path = ROOT / "deployments" / "guard" / "daemonset.yaml"
    return yaml.safe_load(path.read_text())["spec"]["template"]["spec"]


def test_it_serves_the_shipped_config(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("agft_ray.serve.llm.checks._check_by_ray", lambda *_: False)
    text = spec["serveConfigV2"]
    assert text == (ROOT / "configs" / "llm_h100.yaml").read_text()
    path = tmp_path / "served.yaml"
    path.write_text(text)
    ((llm,),) = (application.llms for application in validate_file(path))
    assert llm.tuner.mode == "observe"


def test_workers_and_the_guard_share_the_nodes_leases(worker, guard, monkeypatch):
    assert worker["volumes"] == guard["volumes"]
    (container,) = worker["containers"]
    for mounted in (container, *worker["initContainers"], *guard["containers"]):
        assert mounted["volumeMounts"] == [{"name": "leases", "mountPath": "/run/agft_ray"}]
    assert worker["initContainers"][0]["command"] == guard["initContainers"][0]["command"]
    # Where a tuner that runs as root looks without being told.
    monkeypatch.delenv("AGFT_RAY_LEASE_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert str(lease_directory.default_directory()) == "/run/agft_ray"


def test_only_workers_have_the_privilege_and_a_whole_gpu(spec, worker):
    (container,) = worker["containers"]
    assert container["securityContext"] == {"runAsUser": 0, "capabilities": {"add": ["SYS_ADMIN"]}}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    head = spec["rayClusterConfig"]["headGroupSpec"]
    (head_container,) = head["template"]["spec"]["containers"]
    assert "securityContext" not in head_container
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_clocks_are_reset_before_a_pod_stops(worker):
    (container,) = worker["containers"]
    shell, flag, command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("sh", "-c")
    _, _, module = command.partition("python -m ")
    assert importlib.util.find_spec(module.split()[0])
    assert module.split()[1:] == ["--all", "--lease-dir", "/run/agft_ray"]
    assert worker["terminationGracePeriodSeconds"] >= 60


def test_the_image_must_be_set(spec, worker):
    head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    images = {
        each["image"]
        for pod in (head, worker)
        for each in [*pod["containers"], *pod.get("initContainers", [])]
    }
    # Capitals make it invalid, so that a cluster says so instead of pulling somebody's image.
    assert images == {"IMAGE-TO-SET"}
