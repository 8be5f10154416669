"""The vLLM example runs as a person would run it, on the CPU."""

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.vllm
def test_vllm_deployment(request, tmp_path):
    examples = request.config.rootpath / "examples"
    model = tmp_path / "tiny-model"
    subprocess.run([sys.executable, examples / "tiny_model.py", model], check=True)
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
            [sys.executable, Path(examples, "vllm_deployment.py"), model],
            env=environment,
            cwd=ray_dir,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    words = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert words["asked_for"] == "1600"
    assert words["generation_tokens"] == "1600"
    assert words["locked_sm_clock_mhz"] == "1230"
    assert words["state"] == "tuning"
