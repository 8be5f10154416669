import pytest

from agft_ray.clock import ManualClock
from agft_ray.errors import GpuArgumentError, GpuLostError
from agft_ray.gpu.simulated import InMemoryGpu, SimulatedGpu
from agft_ray.simulation.device import Device
from agft_ray.simulation.device_file import DeviceFile
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.shared_device import SharedDevice


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "gpu.json"
    DeviceFile.create(path, uuid="GPU-7", profile="a100_sxm_80gb", model="llama-3.1-8b", speed=3.0)
    return path


def test_identity_and_time_come_from_the_file(path):
    gpu = SimulatedGpu(path)
    assert (gpu.uuid, gpu.model) == ("GPU-7", "NVIDIA A100-SXM4-80GB")
    assert gpu.clock == SharedDevice(path).clock
    assert gpu.clock.speed == 3.0


def test_every_call_says_that_the_file_is_gone(path):
    gpu = SimulatedGpu(path)
    path.unlink()
    for call in (gpu.read, gpu.reset, lambda: gpu.lock(900), lambda: SimulatedGpu(path)):
        with pytest.raises(GpuLostError, match="gone"):
            call()


def test_a_refused_lock_leaves_the_file_as_it_was(path):
    before = path.read_bytes()
    with pytest.raises(GpuArgumentError):
        SimulatedGpu(path).lock(5000)
    assert path.read_bytes() == before


def test_in_memory_identity():
    profile = load_gpu_profile("rtx_a6000")
    device = Device(profile, profile.model_profile("llama-3.1-8b"))
    gpu = InMemoryGpu(device, ManualClock(), uuid="GPU-x")
    assert (gpu.uuid, gpu.model) == ("GPU-x", "NVIDIA RTX A6000")
