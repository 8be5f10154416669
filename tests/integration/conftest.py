import shutil
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "fake_nvml"))
from fake_nvml import FakeNvml, build  # noqa: E402


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where a module's app keeps its GPUs, its config and its log."""
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def fake(directory, request):
    """A node whose driver is a fake, with the module's number of GPUs; what starts now sees it."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to build the fake NVML with")
    fake = FakeNvml(directory / "node.nvml", gpus=request.module.GPUS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fake.env(build(directory)).items():
            patch.setenv(name, value)
        patch.setenv("AGFT_RAY_LEASE_DIR", str(directory / "leases"))
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield fake
