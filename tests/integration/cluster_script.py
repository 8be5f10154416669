"""Test modules that are also the script of a Ray cluster, run in a process of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FAKE_NVML = Path(__file__).parents[1] / "fake_nvml"


def fake_nvml():
    """The module of the fake NVML."""
    sys.path.insert(0, str(FAKE_NVML))
    import fake_nvml

    return fake_nvml


def results_of(script, directory, timeout_s):
    """Run the script with the directory as its argument, on no cluster but its own, and return
    what it has written to `results.json` there; whatever it leaves behind is killed."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to build the fake NVML with")
    ray_dir = tempfile.mkdtemp(prefix="agft-")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited.pop("CUDA_VISIBLE_DEVICES", None)
    environment = inherited | {
        "RAY_TMPDIR": ray_dir,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        run = subprocess.run(
            [sys.executable, script, str(directory)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert run.returncode == 0, run.stderr[-3000:]
    finally:
        _kill_processes_of(ray_dir)
        shutil.rmtree(ray_dir, ignore_errors=True)
    return json.loads((directory / "results.json").read_text())


def _kill_processes_of(ray_dir):
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RAY_TMPDIR={ray_dir}\0".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
