"""Every example runs as a person would run it."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def words_of(script, *arguments, timeout_s):
    """What an example that serves says of its tuner, by name. All of them use Serve's port 8000, so
    that their tests must not run side by side, and are in one file."""
    with tempfile.TemporaryDirectory(prefix="agft-") as ray_dir:
        environment = {
            **os.environ,
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": ray_dir,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        result = subprocess.run(
            [sys.executable, script, *arguments],
            env=environment,
            cwd=ray_dir,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)


@pytest.mark.ray
def test_own_deployment():
    words = words_of(EXAMPLES / "own_deployment.py", timeout_s=180)
    assert words["locked_sm_clock_mhz"] == "1230"
    assert words["state"] == "tuning"
    assert int(words["windows"]) >= 3


@pytest.mark.ray
@pytest.mark.vllm
def test_vllm_deployment(tiny_model):
    """On the CPU."""
    words = words_of(EXAMPLES / "vllm_deployment.py", tiny_model, timeout_s=400)
    assert words["asked_for"] == "1600"
    assert words["generation_tokens"] == "1600"
    assert words["locked_sm_clock_mhz"] == "1230"
    assert words["state"] == "tuning"


def test_own_policy(tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "own_policy.py", "--json", str(tmp_path / "runs.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    runs = json.loads((tmp_path / "runs.json").read_text())["runs"]
    energy_j = {run["policy"]: run["energy_j"] for run in runs}
    assert set(energy_j) == {
        "default",
        "own_policy:QueuePolicy",
        "own_policy:QueuePolicy:low_mhz=900",
    }
    assert energy_j["own_policy:QueuePolicy"] < 0.8 * energy_j["default"]
