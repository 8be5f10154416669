"""Every example runs as a person would run it."""

import json
import os
import secrets
import subprocess
import sys
import tempfile

import pytest


@pytest.mark.ray
def test_own_deployment(request):
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
            [sys.executable, str(request.config.rootpath / "examples" / "own_deployment.py")],
            env=environment,
            cwd=ray_dir,
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    words = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert words["locked_sm_clock_mhz"] == "1230"
    assert words["state"] == "tuning"
    assert int(words["windows"]) >= 3


def test_own_policy(request, tmp_path):
    script = request.config.rootpath / "examples" / "own_policy.py"
    result = subprocess.run(
        [sys.executable, str(script), "--json", str(tmp_path / "runs.json")],
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
