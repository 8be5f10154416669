"""What tests of every kind share."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(os.environ.get("AGFT_RAY_DATA", Path(__file__).parents[2] / "shared" / "data"))

NO_VLLM = "vLLM is not installed: `make vllm` installs it, and says why if it cannot"


def pytest_configure():
    """Ctrl-C can be tested: shells start what they run in the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Tests marked `vllm` are skipped where it is missing, but not under CI."""
    if importlib.util.find_spec("vllm") is not None or os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason=NO_VLLM))


@pytest.fixture(scope="session")
def data_file():
    """The path of a file of measurements in DATA; skips the test where it is absent."""

    def path_of(name):
        path = DATA / name
        if not path.exists():
            pytest.skip(f"no measurements at {path}; set AGFT_RAY_DATA to the folder they are in")
        return path

    return path_of


@pytest.fixture(scope="session")
def conversation_trace():
    """The Azure 2023 conversation trace (github.com/Azure/AzurePublicDataset, CC-BY 4.0)."""
    path = DATA / "traces" / "azure2023_conv.csv"
    if not path.exists():
        pytest.skip(f"no trace at {path}; set AGFT_RAY_DATA to the folder that holds traces/")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model of random weights, for real vLLM on the CPU."""
    path = tmp_path_factory.mktemp("model") / "tiny-model"
    script = Path(__file__).parents[1] / "examples" / "tiny_model.py"
    subprocess.run([sys.executable, script, path], check=True)
    return path
