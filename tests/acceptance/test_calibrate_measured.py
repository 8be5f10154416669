"""`calibrate` on public tables gives back the published fits, from a base that is far off."""

import pytest

from agft_ray.calibration.calibrate import calibrate
from agft_ray.calibration.measurements import Measurement
from agft_ray.simulation.profiles import load_gpu_profile, parse_gpu_profile

pytest.importorskip("scipy", reason="scipy comes with the extra 'calibrate'")

FAR_OFF = {
    "power.voltage_rise": 0.05,
    "power.busy_base_w": 5.0,
    "power.busy_clock_w": 300.0,
}


def far_off(name, knee_mhz):
    base = parse_gpu_profile(load_gpu_profile(name).model_dump() | {"ranges": {}}, name)
    for path, value in {**FAR_OFF, "power.knee_sm_clock_mhz": knee_mhz}.items():
        base = base.with_value(path, value)
    return base


def shown(fit, name):
    number = fit.fitted[f"power.{name}"]
    return f"{number.value:g} +- {number.standard_error:.2g}"


def test_a6000_voltage(table, reached):
    rows = [
        Measurement(2, "prefill", r["sm_clock_mhz"], r["power_w_median"], None, 254, 136_000, 940)
        for r in table("a6000_saturated_by_clock.csv")
    ]
    calibration = calibrate(rows, far_off("rtx_a6000", 600), "llama-3.1-8b", name="mine")
    power = calibration.profile.power
    reached("calibrate, A6000: knee, MHz", shown(calibration.power, "knee_sm_clock_mhz"), 1303)
    reached("calibrate, A6000: voltage rise", shown(calibration.power, "voltage_rise"), "0.335")
    assert calibration.capped_rows == 8
    assert power.knee_sm_clock_mhz == pytest.approx(1303, abs=20)
    assert power.voltage_rise == pytest.approx(0.335, abs=0.05)
    assert calibration.power.r2 > 0.997
    assert calibration.power.mape < 0.0084


def test_a100_voltage(table, reached):
    rows = []
    for r in table("a800_prefill_by_clock.csv"):
        clock, idle_w = r["locked_mhz"], r["first_sample_idle_power_w"]
        rows.append(Measurement(2, "prefill", clock, r["prefill_power_w"], None, 0, 0, 0))
        rows.append(Measurement(2, "idle", clock, idle_w, None, 0, 0, 0))
    # The exponent is not fitted; the published fit has 2.
    base = far_off("a100_sxm_80gb", 500).with_value("power.voltage_exponent", 2.0)
    calibration = calibrate(rows, base, "llama-3.1-8b", name="mine")
    power = calibration.profile.power
    reached("calibrate, A100: knee, MHz", shown(calibration.power, "knee_sm_clock_mhz"), 982)
    reached("calibrate, A100: voltage rise", shown(calibration.power, "voltage_rise"), "0.127")
    assert power.knee_sm_clock_mhz == pytest.approx(982, abs=35)
    assert power.voltage_rise == pytest.approx(0.127, abs=0.02)
    assert calibration.power.mape < 0.02
