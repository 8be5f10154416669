"""`agft-ray bench vllm` with real vLLM and a round of short blocks: that it measures at all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.alone]


def test_one_round_of_short_blocks(tiny_model):
    command = [Path(sys.executable).with_name("agft-ray"), "bench", "vllm", tiny_model]
    run = subprocess.run(
        [*command, "--blocks", "1", "--block-s", "2"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode in (0, 1), run.stderr[-3000:] + run.stdout[-3000:]
    assert run.returncode == int("is missed" in run.stdout)
    for side in ("without", "untimed", "with"):
        (speed,) = re.findall(rf"round   1, +{side}: +([\d.]+) tokens/s", run.stdout)
        assert float(speed) > 0
    (windows,) = re.findall(r"the tuners had (\d+) windows", run.stdout)
    assert int(windows) >= 2, "a tuner on each of two sides"
    (followed,) = re.findall(r"until the GPU has been called, (\d+) times", run.stdout)
    assert int(followed) >= 2, "no clock followed a prompt"
    assert re.search(r"CPU by Ray process, blocks with: .*FrequencyTuner", run.stdout)
    (without,) = re.findall(r"CPU by Ray process, blocks without: (.*)", run.stdout)
    assert "FrequencyTuner" not in without, "a tuner has outlived its block"
