import pytest

from agft_ray.calibration.load_check import LoadCheck, Misfit, check_load_table
from agft_ray.calibration.load_run import Load
from agft_ray.calibration.load_table import LoadRow
from agft_ray.errors import ConfigError
from agft_ray.simulation.physics import idle_power_w
from agft_ray.simulation.profiles import load_gpu_profile

A6000 = load_gpu_profile("rtx_a6000")
LLAMA = "llama-3.1-8b"


def row(clock, rate_per_s, measured, *, line=2, tokens=(200, 20), parallel=None):
    return LoadRow(line, Load(clock, rate_per_s, *tokens), parallel, measured)


def test_every_measured_number_is_simulated():
    rows = [
        row(1200, 1.0, {"tpot_p50_s": 0.02, "power_w": 200.0, "ttft_mean_s": 0.1}),
        row(None, 2.0, {"ttft_p99_s": 0.1}),
        row(900, 0.0, {"power_w": 60.0}, tokens=(0, 0)),
    ]
    check = check_load_table(rows, A6000, LLAMA, requests=40, seeds=[0])
    assert [m.quantity for m in check.misfits] == [name for r in rows for name in r.measured]
    found = {(m.row.load.sm_clock_mhz, m.quantity): m.simulated for m in check.misfits}
    assert found[900, "power_w"] == idle_power_w(A6000.power, 900)
    assert 0.015 < found[1200, "tpot_p50_s"] < 0.05
    assert found[1200, "power_w"] < A6000.power.cap_w
    assert set(check.quality()) == {"power_w", "ttft_mean_s", "ttft_p99_s", "tpot_p50_s"}


def test_lines_of_another_card_or_group_are_refused():
    rows = [row(5000, 1.0, {"power_w": 1.0}), row(900, 1.0, {"power_w": 1.0}, line=3, parallel=4)]
    with pytest.raises(ConfigError) as caught:
        check_load_table(rows, A6000, LLAMA)
    clock, parallel = caught.value.problems
    assert clock.startswith("line 2: sm_clock_mhz: 5000 is outside 210..2100 MHz")
    assert parallel.startswith("line 3: tensor_parallel: 4 is not llama-3.1-8b's 1")


def test_changes_are_at_equal_load_within_what_was_measured():
    points = {(1200, 1.0): 10, (1200, 3.0): 30, (900, 1.0): 8, (900, 2.0): 10, (600, 5.0): 9}
    misfits = tuple(
        Misfit(row(*point, {"power_w": watts}), "power_w", watts, 2.0 * watts)
        for point, watts in points.items()
    )
    check = LoadCheck(misfits)
    (at_one,) = check.changes()
    assert (at_one.sm_clock_mhz, at_one.reference_sm_clock_mhz, at_one.rate_per_s) == (900, 1200, 1)
    assert at_one.measured == pytest.approx(-0.2)
    (between,) = check.changes([2.0, 4.0])
    assert between.measured == pytest.approx(10 / 20 - 1)
    assert between.simulated == pytest.approx(10 / 20 - 1)
    quality = check.quality()["power_w"]
    assert (quality.count, quality.mean_absolute, quality.mean) == (5, 1.0, 1.0)
