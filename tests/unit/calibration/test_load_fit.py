"""Fits to load tests that are simulated, so that the truth is known."""

import random

import pytest

from agft_ray.calibration.load_check import simulated
from agft_ray.calibration.load_fit import LoadTest, calibrate_load
from agft_ray.calibration.load_run import Load
from agft_ray.calibration.load_table import LoadRow
from agft_ray.calibration.profile_text import profile_yaml
from agft_ray.errors import ConfigError
from agft_ray.simulation.profiles import load_gpu_profile, parse_gpu_profile

pytest.importorskip("scipy", reason="scipy comes with the extra 'calibrate'")

LLAMA = "llama-3.1-8b"
MODEL = f"models.{LLAMA}."
H100 = load_gpu_profile("h100_sxm_80gb")
BASE = parse_gpu_profile(H100.model_dump() | {"ranges": {}}, "base")
TRUE = {
    f"{MODEL}weights_ms": 8.5,
    f"{MODEL}token_ms": 0.03,
    f"{MODEL}issue_share": 0.8,
    "power.busy_clock_w": 260.0,
    "power.idle_base_w": 55.0,
}
QUANTITIES = ("power_w", "ttft_mean_s", "tpot_mean_s")


def truth():
    gpu = BASE
    for path, value in TRUE.items():
        gpu = gpu.with_value(path, value)
    return gpu


def load_test(gpu, *, clocks=(900, 1200, 1600, 1980), rates=(1.0, 6.0, 12.0), noise=0.01):
    """What would be measured with other arrivals than the fit has, and some noise."""
    rng, rows = random.Random(1), []
    for clock in clocks:
        for rate in (0.0, *rates):
            names = QUANTITIES if rate else ("power_w",)
            row = LoadRow(
                len(rows) + 2, Load(clock, rate, 500, 50), None, dict.fromkeys(names, 1.0)
            )
            values = simulated(
                row, gpu, LLAMA, arrivals="poisson", requests=150, seed=9000 + len(rows)
            )
            measured = {
                name: float(value) * (1 + rng.gauss(0, noise))
                for name, value in zip(names, values, strict=True)
            }
            rows.append(LoadRow(row.line, row.load, None, measured))
    return LoadTest(rows, requests=60)


@pytest.fixture(scope="module")
def calibration():
    shown = []
    found = calibrate_load(load_test(truth()), BASE, LLAMA, name="mine", progress=shown.append)
    assert shown[0].startswith("fit 1: power_w ")
    return found


def test_known_numbers_are_recovered_within_their_standard_errors(calibration):
    off = {
        path: (calibration.fitted[path].value - value) / calibration.fitted[path].standard_error
        for path, value in TRUE.items()
        if path in calibration.fitted
    }
    assert len(off) == len(TRUE), calibration.kept
    assert max(map(abs, off.values())) < 4, off
    assert sum(abs(value) < 2 for value in off.values()) >= 4, off


def test_the_fit_is_far_better_than_the_base_on_arrivals_it_has_not_seen(calibration):
    before, after = calibration.before.quality(), calibration.after.quality()
    for quantity in QUANTITIES:
        assert after[quantity].mean_absolute < 0.05
        assert after[quantity].mean_absolute < 0.5 * before[quantity].mean_absolute


def test_what_is_kept_says_why_and_is_marked(calibration):
    assert calibration.kept[f"{MODEL}all_reduce_ms"] == "one GPU"
    text = profile_yaml(calibration, "loads.csv")
    lines = dict(line.strip().split(":", 1) for line in text.splitlines()[2:])
    assert "# fitted to the load test loads.csv: +-" in lines["weights_ms"]
    assert "from base, not measured" in text.replace(calibration.base, "base")
    assert "does not identify it (one GPU)" in lines["all_reduce_ms"]


def test_a_test_without_power_and_at_one_clock_fits_neither():
    test = load_test(truth(), clocks=[1500], rates=(2.0, 5.0, 8.0, 11.0))
    rows = [
        LoadRow(r.line, r.load, None, {k: v for k, v in r.measured.items() if k != "power_w"})
        for r in test.rows
        if r.load.rate_per_s
    ]
    found = calibrate_load(LoadTest(rows, requests=40), BASE, LLAMA, name="mine")
    assert found.kept["power.busy_clock_w"] == "no power was measured"
    assert found.kept[f"{MODEL}issue_share"] == "one clock only"
    assert f"{MODEL}token_ms" in found.fitted or f"{MODEL}weights_ms" in found.fitted
    assert found.profile.power == BASE.power


def test_too_few_lines_are_refused():
    with pytest.raises(ConfigError, match="2 lines: at least 3"):
        calibrate_load(
            LoadTest(load_test(BASE, clocks=[1500], rates=[1.0]).rows), BASE, LLAMA, name="mine"
        )
