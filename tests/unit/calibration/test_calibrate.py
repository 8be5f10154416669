"""Fits against profiles that are known, since the measurements are made from them."""

import math
import random
import re
import sys

import pytest
from golden_files import assert_golden, sections

from agft_ray.calibration.calibrate import calibrate
from agft_ray.calibration.fitting import value_at
from agft_ray.calibration.measurements import Measurement
from agft_ray.calibration.profile_text import profile_yaml
from agft_ray.cli.app import main
from agft_ray.errors import AgftError, ConfigError
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import load_gpu_profile, parse_gpu_profile

pytest.importorskip("scipy", reason="scipy comes with the extra 'calibrate'")

LLAMA = "llama-3.1-8b"
MODEL = f"models.{LLAMA}."
A6000 = load_gpu_profile("rtx_a6000")
A100 = load_gpu_profile("a100_sxm_80gb")

TRUE_ACTIVITY = {
    "power.knee_sm_clock_mhz": 1150,
    "power.voltage_rise": 0.25,
    "power.idle_base_w": 38.0,
    "power.idle_clock_w": 35.0,
    "power.busy_base_w": 60.0,
    "power.busy_clock_w": 95.0,
    "power.decode.single": 0.55,
    "power.decode.batch_scale": 30.0,
    f"{MODEL}weights_ms": 17.0,
    f"{MODEL}token_ms": 0.11,
    f"{MODEL}issue_share": 0.8,
    f"{MODEL}clock_exponent": 4.0,
}
TRUE_UTILIZATION = {
    "power.knee_sm_clock_mhz": 900,
    "power.voltage_rise": 0.2,
    "power.busy_base_w": 40.0,
    "power.busy_clock_w": 140.0,
    "power.decode.issue_activity": 0.7,
    "power.decode.memory_w": 60.0,
}


def changed(base, values):
    base = parse_gpu_profile(base.model_dump() | {"ranges": {}}, "base")
    for path, value in values.items():
        base = base.with_value(path, value)
    return base


def loads(model):
    """Idle, decode and prefill steps."""
    yield StepWork()
    for batch in (1, 4, 16, 64, 128):
        yield StepWork(0, batch, 600 * batch)
    for tokens in (256, 2048):
        yield StepWork(tokens, 8, 4800, prefill_attention_s(model, tokens, 0))


def measured(gpu, *, noise=0.01, seed=0, clocks=range(600, 1801, 75), keep=lambda work: True):
    """Measurements of a GPU that is exactly as a profile says, with relative noise."""
    rng, model, rows = random.Random(seed), gpu.model_profile(LLAMA), []
    for clock in clocks:
        for work in filter(keep, loads(model)):
            idle = not work.tokens
            power_w = idle_power_w(gpu.power, clock)
            if not idle:
                power_w = busy_power_w(gpu, model, work, clock)
            step_ms = None if idle else step_time_s(model, work, clock) * 1e3
            step_ms = step_ms and step_ms * (1 + rng.gauss(0, noise))
            power_w *= 1 + rng.gauss(0, noise)
            phase = "idle" if idle else "prefill" if work.prefill_tokens else "decode"
            rows.append(
                Measurement(
                    len(rows) + 2,
                    phase,
                    float(clock),
                    power_w,
                    step_ms,
                    work.decode_sequences,
                    work.context_tokens,
                    work.prefill_tokens,
                )
            )
    return rows


def deviations(calibration, truth):
    """Distance from the truth in standard errors, by path."""
    fits = (calibration.step_time, calibration.power)
    fitted = {path: number for fit in fits for path, number in fit.fitted.items()}
    return {
        path: abs(fitted[path].value - value) / fitted[path].standard_error
        for path, value in truth.items()
    }


@pytest.mark.parametrize(
    ("base", "truth", "clocks"),
    [
        (A6000, TRUE_ACTIVITY, range(600, 1801, 75)),
        (A100, TRUE_UTILIZATION, range(300, 1411, 60)),
    ],
)
def test_known_numbers_are_recovered_within_their_standard_errors(base, truth, clocks):
    true_gpu = changed(base, truth)
    found = [
        deviation
        for seed in range(4)
        for deviation in deviations(
            calibrate(
                measured(true_gpu, seed=seed, clocks=clocks),
                base,
                LLAMA,
                name="mine",
                observed_clocks=True,
            ),
            truth,
        ).values()
    ]
    assert max(found) < 4
    # Of a normal distribution 95 % lie within two standard errors and 32 % beyond one.
    assert sum(deviation < 2 for deviation in found) >= 0.85 * len(found)
    assert sum(deviation > 1 for deviation in found) >= 0.1 * len(found)


def test_without_noise_the_fit_is_the_truth():
    true_gpu = changed(A6000, TRUE_ACTIVITY)
    rows = measured(true_gpu, noise=0.0)
    calibration = calibrate(rows, A6000, LLAMA, name="mine", observed_clocks=True)
    for fit in (calibration.step_time, calibration.power):
        assert fit.worst < 1e-3
        assert fit.r2 > 0.9999
    assert calibration.step_time.rows == 7 * 17
    assert calibration.power.rows == 8 * 17
    power = calibration.profile.power
    assert power.voltage_rise == pytest.approx(0.25, rel=1e-3)
    assert abs(power.knee_sm_clock_mhz - 1150) <= 1


def test_what_is_not_identified_keeps_the_base_and_says_why():
    rows = measured(changed(A6000, TRUE_ACTIVITY), keep=lambda work: work.decode_sequences == 16)
    calibration = calibrate(rows, A6000, LLAMA, name="mine", observed_clocks=True)
    kept = {**calibration.step_time.kept, **calibration.power.kept}
    assert kept["power.idle_base_w"] == "no idle line"
    assert kept["power.decode.single"] == "one load only"
    assert f"{MODEL}clock_exponent" in kept
    for path in kept:
        part = path.removeprefix("power.") if path.startswith("power") else path[len(MODEL) :]
        of = (lambda gpu: gpu.power) if path.startswith("power") else lambda gpu: gpu.models[LLAMA]
        assert value_at(of(calibration.profile), part) == value_at(of(A6000), part)
    assert calibration.step_time.mape < 0.02
    assert calibration.power.mape < 0.02


def test_one_clock_fits_no_clock_dependence():
    rows = measured(changed(A6000, TRUE_ACTIVITY), clocks=[1200])
    calibration = calibrate(rows, A6000, LLAMA, name="mine")
    for path in ("power.knee_sm_clock_mhz", "power.voltage_rise", "power.idle_clock_w"):
        assert calibration.power.kept[path] == "one clock only"
    assert calibration.step_time.kept[f"{MODEL}issue_share"] == "one clock only"


def test_few_lines_fit_few_numbers():
    rows = measured(changed(A6000, TRUE_ACTIVITY), clocks=[900, 1500], keep=is_large_prefill)
    calibration = calibrate(rows, A6000, LLAMA, name="mine")
    assert len(calibration.power.fitted) <= 1
    assert len(calibration.step_time.fitted) == 1
    assert "too few lines" in calibration.power.kept.values()


def is_large_prefill(work):
    return work.prefill_tokens == 2048


def test_lines_at_the_power_cap_count_only_with_observed_clocks():
    rows = measured(A6000, noise=0.0, keep=is_large_prefill)
    # As on the board: what is set above the cap's clock runs, and draws, as that does.
    held = next(row for row in rows if row.sm_clock_mhz == 1575)
    capped = [
        row
        if row.sm_clock_mhz <= 1575
        else Measurement(row.line, "prefill", row.sm_clock_mhz, 299.0, held.step_ms, 8, 4800, 2048)
        for row in rows
    ]
    calibration = calibrate(capped, A6000, LLAMA, name="mine")
    assert calibration.capped_rows == 3
    assert calibration.power.worst < 1e-3
    believed = calibrate(capped, A6000, LLAMA, name="mine", observed_clocks=True)
    assert believed.capped_rows == 0
    assert believed.power.worst > 0.01


def test_the_profile_keeps_one_model_and_gets_ranges_of_two_standard_errors():
    h100 = load_gpu_profile("h100_sxm_80gb")
    rows = measured(h100, clocks=range(600, 1981, 90))
    calibration = calibrate(rows, h100, LLAMA, name="mine", observed_clocks=True)
    profile = calibration.profile
    assert (profile.name, tuple(profile.models)) == ("mine", (LLAMA,))
    assert not [path for path in profile.ranges if "70b" in path]
    weights = calibration.step_time.fitted[f"{MODEL}weights_ms"]
    assert profile.ranges[f"{MODEL}weights_ms"] == pytest.approx(
        (weights.value - 2 * weights.standard_error, weights.value + 2 * weights.standard_error),
        rel=1e-3,
    )
    assert profile.ranges["governor.idle_delay_s"] == (0.05, 20)


def test_the_file_written_is_the_profile_with_its_sources(tmp_path):
    rows = measured(changed(A6000, TRUE_ACTIVITY), keep=lambda work: work.tokens > 0)
    calibration = calibrate(rows, A6000, LLAMA, name="mine", observed_clocks=True)
    path = tmp_path / "mine.yaml"
    path.write_text(profile_yaml(calibration, "runs.csv"))
    assert load_gpu_profile(path) == calibration.profile
    lines = dict(line.strip().split(":", 1) for line in path.read_text().splitlines()[2:])
    error = calibration.power.fitted["power.voltage_rise"].standard_error
    assert f"# fitted to runs.csv: +-{error:.2g} (n 119, R2 " in lines["voltage_rise"]
    assert re.search(r"# from rtx_a6000, not measured: runs\.csv .*\bidle\b", lines["idle_base_w"])
    assert lines["cap_w"].endswith("# from rtx_a6000, not measured")
    assert "#" not in lines["weights_bytes"]


def test_small_numbers_are_written_so_that_yaml_reads_them_back(tmp_path):
    rows = measured(A6000)
    base = changed(A6000, {f"{MODEL}attention.prefill_pair_us": 1e-5})
    calibration = calibrate(rows, base, LLAMA, name="mine", observed_clocks=True)
    (tmp_path / "mine.yaml").write_text(profile_yaml(calibration, 'a "strange": name.csv'))
    assert load_gpu_profile(tmp_path / "mine.yaml") == calibration.profile


@pytest.mark.parametrize(
    ("rows", "model", "problem"),
    [
        ([], LLAMA, "0 of 0 lines"),
        (measured(A6000)[:1], LLAMA, "1 of 1 lines"),
        (measured(A100, clocks=[150]), LLAMA, r"line 2: sm_clock_mhz: 150 .*210\.\.2100"),
        (measured(A6000)[:9], "gpt-5", "'gpt-5' "),
    ],
)
def test_what_cannot_be_fitted_is_refused(rows, model, problem):
    with pytest.raises(ConfigError, match=problem):
        calibrate(rows, A6000, model, name="mine")


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(AgftError, match=r"agft-ray\[calibrate\]"):
        calibrate(measured(A6000), A6000, LLAMA, name="mine")


def test_command(tmp_path, capsys):
    lines = ["sm_clock_mhz,power_w,step_ms,batch,context_tokens,prefill_tokens,fan"]
    for row in measured(changed(A6000, TRUE_ACTIVITY), clocks=range(600, 1501, 75)):
        step = "" if row.step_ms is None else row.step_ms
        values = row.sm_clock_mhz, row.power_w, step, row.batch, row.context_tokens
        lines.append(",".join(str(value) for value in (*values, row.prefill_tokens, 30)))
    file, out = tmp_path / "runs.csv", tmp_path / "mine.yaml"
    file.write_text("\n".join(lines))
    command = ["calibrate", str(file), "--base", "rtx_a6000", "--model", LLAMA, "--keep", "all"]
    command += ["--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    screens = {"all that is needed": text}
    assert "power: 104 lines, R2 0.9" in text
    profile = load_gpu_profile(out)
    assert profile.name == "mine"
    assert math.isclose(profile.power.idle_base_w, 38, rel_tol=0.1)

    assert "warning" not in text

    file.write_text(f"{lines[0]}\n1200,200,10,8,800,0,1\n1200,201,40,8,800,0,1\n")
    assert main(command) == 0
    text = capsys.readouterr().out
    screens["two lines that identify nothing"] = text
    assert re.search("warning: step time: .*rtx_a6000", text)
    assert load_gpu_profile(out).models == {LLAMA: load_gpu_profile("rtx_a6000").models[LLAMA]}

    assert main([*command[:-1], str(tmp_path / "mine.txt")]) == 2
    error = capsys.readouterr().err
    assert "--out: " in error
    assert ".yaml" in error
    file.write_text(f"{lines[0]}\n5000,1,,1,,\n5000,1,,1,,\n")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{file}: " in error
    assert all(f"  line {number}: sm_clock_mhz: 5000 " in error for number in (2, 3))
    changing = {
        str(tmp_path): "<folder>",
        re.compile(r"R2 \S+, MAPE \S+, worst line \S+"): "<quality>",
        re.compile(r" +\S+ \+- \S+"): " <value> +- <error>",
    }
    assert_golden("calibrate", sections(screens), changing)
