"""Every example runs as a person would run it."""

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
