import json
import subprocess
import sys
from pathlib import Path

import pytest

from agft_ray.config import parse
from agft_ray.errors import ConfigError, GpuLostError
from agft_ray.gpu.config import NvmlGpuConfig, SimulatedGpuConfig, ZeusdGpuConfig
from agft_ray.gpu.registry import GpuSpec, claim_simulated_gpu, open_gpu

CLAIM = """
import sys
from pathlib import Path
from agft_ray.gpu.config import SimulatedGpuConfig
from agft_ray.gpu.registry import claim_simulated_gpu
config = SimulatedGpuConfig(state_dir=sys.argv[1])
print(claim_simulated_gpu(config, application="a", model="llama-3.1-8b").devices[0], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    return SimulatedGpuConfig(state_dir=str(tmp_path / "gpus"))


def claim(config, **changes):
    return claim_simulated_gpu(config, **{"application": "a", "model": "llama-3.1-8b"} | changes)


def holder(config):
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, config.state_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_each_living_process_has_a_gpu_of_its_own_and_the_dead_give_theirs_back(config):
    first, second = holder(config), holder(config)
    paths = {process.stdout.readline() for process in (first, second)}
    assert {path.strip()[-10:] for path in paths} == {"gpu-0.json", "gpu-1.json"}
    assert claim(config).devices[0].endswith("gpu-2.json")
    for process in (first, second):
        process.kill()
        process.wait()
    third = holder(config)
    assert third.stdout.readline().strip().endswith("gpu-0.json")
    third.communicate()


def test_what_was_left_by_other_arguments_is_replaced_and_by_the_same_is_kept(config):
    process = holder(config)
    path = process.stdout.readline().strip()
    process.communicate()
    origin_s = json.loads(Path(path).read_text())["origin_s"]
    process = holder(config)
    process.stdout.readline()
    process.communicate()
    assert json.loads(Path(path).read_text())["origin_s"] == origin_s
    spec = claim(config, speed=4.0)
    gpu = open_gpu(spec, owner="a test")
    assert spec.clock.speed == 4.0
    assert spec.known_arms == gpu.arms
    assert gpu.model == "NVIDIA RTX A6000"


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("")
    blocked = SimulatedGpuConfig(state_dir=str(tmp_path / "file" / "gpus"))
    with pytest.raises(GpuLostError, match="simulated GPUs in"):
        claim(blocked)
    with pytest.raises(ConfigError, match="gpt-9"):
        claim(SimulatedGpuConfig(state_dir=str(tmp_path)), model="gpt-9")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"uuids": ["MIG-1"]}, r"uuids: 'MIG-1' .*nvidia-smi -L"),
        ({"uuids": ["GPU-../x"]}, r"uuids: 'GPU-\.\./x' "),
        ({"uuids": []}, r"uuids: \[\] "),
        ({"uuids": ["GPU-1", "GPU-1"]}, r"uuids: .*'GPU-1', 'GPU-1'"),
        ({"restore_sm_clocks_mhz": [1500, 900]}, r"restore_sm_clocks_mhz: \[1500, 900\] "),
        ({"lease_dir": "leases"}, r"lease_dir: 'leases' .*absolute"),
        ({"actuator": "frequency"}, r"actuator: .*'sm_clock' or 'power_limit'"),
        ({"clock": 1}, r"clock: unknown"),
    ],
)
def test_settings_of_real_gpus_that_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        parse(NvmlGpuConfig, settings, source="gpu")


def test_zeusd_paths_are_absolute():
    with pytest.raises(ConfigError, match=r"socket_path: 'zeusd\.sock' .*absolute"):
        parse(ZeusdGpuConfig, {"kind": "zeusd", "socket_path": "zeusd.sock"}, source="gpu")


def test_a_real_gpus_arms_are_unknown_until_it_is_asked():
    spec = GpuSpec(NvmlGpuConfig(), ("GPU-1",))
    assert spec.known_arms is None
    assert spec.clock.speed == 1.0
