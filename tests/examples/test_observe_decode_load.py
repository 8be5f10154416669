"""The GPU measurement on a FAKE NVML, with a load that only sleeps, or with PyTorch on the CPU."""

import ast
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fake_nvml"))
from fake_nvml import FakeNvml, build, power_w  # noqa: E402

EXAMPLE = ROOT / "examples" / "observe_decode_load.py"
FAKE_LOAD = f"""
import sys, time
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import observe_decode_load as example
from agft_ray.gpu.nvml.backend import list_devices

class FakeLoad:
    what = "a fake load that sleeps"
    def uuid(self):
        return list_devices()[1].uuid
    def decode(self, batch):
        return lambda: time.sleep(0.02)
    def prefill(self, tokens):
        return lambda: time.sleep(0.03)
    def matmul(self):
        return lambda: time.sleep(0.01)

class FailingLoad(FakeLoad):
    def decode(self, batch):
        def step():
            raise RuntimeError("CUDA out of memory")
        return step

load = FailingLoad() if "--fail" in sys.argv else FakeLoad()
given = [argument for argument in sys.argv[1:] if argument != "--fail"]
sys.exit(example.main(given, make_load=lambda arguments: load))
"""
QUICK = ["--window-s", "0.5", "--windows", "3", "--matmul-s", "2", "--idle-s", "0.5"]
QUICK += ["--prompts", "100"]
BUSY_W = power_w(1980)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpus")
    fake = FakeNvml(directory / "node.nvml", gpus=2)
    fake.library = build(directory)
    return fake


def run(fake, command, **variables):
    environment = {**os.environ, **fake.env(fake.library), **variables}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def report(fake, tmp_path_factory):
    """What a run with the fake load has written."""
    path = tmp_path_factory.mktemp("out") / "measured.md"
    command = ["-c", FAKE_LOAD, *QUICK, "--batches", "1", "8", "--out", path]
    done = run(fake, command)
    assert done.returncode == 0, done.stderr
    return path.read_text()


def rows(report):
    """The columns of the tables, by batch size or length of the prompt."""
    found = re.findall(r"^\| (\d+) \|(.*)\|$", report, re.MULTILINE)
    return {int(batch): [c.strip() for c in cells.split("|")] for batch, cells in found}


def number(cell):
    return float(cell.split()[0].replace(",", ""))


def test_the_table_has_power_clock_and_energy_per_token_of_each_batch_size(report):
    assert report.startswith("# NVIDIA H100 80GB HBM3\n")
    assert "a fake load that sleeps" in report
    assert set(rows(report)) == {1, 8, 100}
    for batch, cells in rows(report).items():
        tokens_per_s, step_ms, power, clock_mhz, energy_j = map(number, cells[:5])
        assert step_ms >= (30.0 if batch == 100 else 20.0)
        assert tokens_per_s == pytest.approx(batch * 1e3 / step_ms, rel=0.1)
        assert power == pytest.approx(BUSY_W, rel=0.03)
        assert clock_mhz == 1980
        assert energy_j == pytest.approx(BUSY_W / tokens_per_s, rel=0.03)
        assert cells[5] == "nothing"


def test_what_a_loaded_and_idle_card_draws_is_said(report):
    assert re.search(r"nothing to do: [\d.]+ W, median of 0.5 s; SM clock 1,980 to", report)


def test_the_counter_agrees_with_integrated_power(report, fake):
    (ratio,) = re.findall(r"counted energy / integrated power over 2 s: ([\d.]+)", report)
    assert float(ratio) == pytest.approx(1.0, abs=0.01)
    (period_ms,) = re.findall(r"energy counter: updated every (\d+) ms", report)
    assert float(period_ms) == pytest.approx(fake.gpu(1).counter_update_s * 1e3, rel=0.5)
    assert re.search(r"one sample costs [\d.]+ ms", report)
    assert f"power: {BUSY_W:.1f} W (instant)" in report


def test_it_names_the_gpu_and_says_what_the_doctor_does(report, fake):
    (ours,) = re.findall(r"\| this process \| not set \| (\S+) \|", report)
    assert ours == fake.gpu(1).uuid
    assert f"{fake.gpu(1).uuid}" in report.partition("agft-ray doctor")[2]


def test_nothing_is_ever_set(report, fake):
    assert fake.log() == []


def test_a_load_that_fails_is_said(fake):
    done = run(fake, ["-c", FAKE_LOAD, *QUICK, "--batches", "1", "--fail"])
    assert done.returncode == 1
    assert "CUDA out of memory; fewer --layers" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_can_be_set_through_it(fake):
    code = FAKE_LOAD.partition("class FakeLoad")[0] + (
        "gpu = example.NvmlGpu(list_devices()[0].uuid, clock=example.WallClock())\n"
        "gpu = example.ReadOnly(gpu)\n"
        "for act in (gpu.claim, gpu.reset, lambda: gpu.lock(1200)):\n"
        "    try: act()\n"
        "    except AssertionError: print('refused')\n"
    )
    assert run(fake, ["-c", code]).stdout.split() == ["refused"] * 3
    assert fake.log() == []


@pytest.mark.ray
def test_a_ray_task_is_given_a_gpu_that_can_be_named(fake):
    code = FAKE_LOAD.partition("class FakeLoad")[0] + "print(example.names_under_ray('cpu'))"
    with tempfile.TemporaryDirectory(prefix="agft-") as ray_dir:
        variables = {
            "RAY_TMPDIR": ray_dir,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # The example is a module here, and no script that Ray pickles by value.
            "PYTHONPATH": os.pathsep.join([str(EXAMPLE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        done = run(fake, ["-c", code], **variables)
    assert done.returncode == 0, done.stderr
    visible, _, ours = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert visible in ("0", "1")
    assert ours == (fake.gpu(int(visible)).uuid,)


@pytest.mark.vllm
def test_pytorchs_load_runs(fake):
    """On the CPU, with a small layer; it comes with vLLM."""
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        "import observe_decode_load as example\n"
        "load = example.TorchLoad\n"
        "load.HIDDEN, load.INTERMEDIATE, load.KV_HEADS, load.HEAD = 64, 128, 2, 8\n"
        "load.MATMUL = 64\n"
        "sys.exit(example.main(sys.argv[1:]))\n"
    )
    command = ["-c", code, "--device", "cpu", "--layers", "2", "--context", "16"]
    done = run(fake, [*command, "--batches", "1", "4", *QUICK])
    assert done.returncode == 0, done.stderr
    assert set(rows(done.stdout)) == {1, 4, 100}
    assert "2 layers of the shape of Llama-3.1-8B" in done.stdout
    assert all(number(cells[0]) > 0 for cells in rows(done.stdout).values())


def test_without_pytorch_it_says_what_is_missing(fake):
    code = FAKE_LOAD.partition("from agft_ray")[0] + "sys.modules['torch'] = None\n"
    done = run(fake, ["-c", code + "sys.exit(example.main([]))"])
    assert done.returncode == 2
    assert "needs PyTorch" in done.stderr
