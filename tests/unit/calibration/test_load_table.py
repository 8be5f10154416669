import re

import pytest

from agft_ray.calibration.csv_table import read_table
from agft_ray.calibration.load_run import Load
from agft_ray.calibration.load_table import is_load_table, read_load_table
from agft_ray.errors import ConfigError

HEADER = (
    "sm_clock_mhz,rate_per_s,prompt_tokens,output_tokens,power_w,ttft_p50_s,ttft_p99_s,tpot_mean_s"
)


@pytest.fixture
def path(tmp_path):
    def write(text):
        (tmp_path / "mine.csv").write_text(text, encoding="utf-8")
        return tmp_path / "mine.csv"

    return write


def problems(path):
    with pytest.raises(ConfigError) as caught:
        read_load_table(path)
    return list(caught.value.problems)


def test_rows(path):
    table = read_load_table(
        path(f"{HEADER},fan\n1200,1.5,1000,100,250,.2,.4,.03,1\n,2,10,1,,,.4,,1\n900,0,,,80,,,,\n")
    )
    first, default, idle = table.rows
    assert first.load == Load(1200, 1.5, 1000, 100)
    assert first.measured == {
        "power_w": 250.0,
        "ttft_p50_s": 0.2,
        "ttft_p99_s": 0.4,
        "tpot_mean_s": 0.03,
    }
    assert (default.load.sm_clock_mhz, default.measured) == (None, {"ttft_p99_s": 0.4})
    assert (idle.line, idle.load.rate_per_s, idle.measured) == (4, 0.0, {"power_w": 80.0})
    assert table.unused_columns == ("fan",)


def test_other_names_of_columns(path):
    file = path("tp,sm_mhz,rps,input_len,output_len,tpot_p99_s\n4,1200,1,10,20,.03\n")
    (row,) = read_load_table(file).rows
    assert (row.tensor_parallel, row.load) == (4, Load(1200, 1.0, 10, 20))
    assert is_load_table(read_table(file))
    assert not is_load_table(read_table(path("sm_clock_mhz,power_w,batch\n")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("abc,1,10,10,1,,,", ["sm_clock_mhz: must be a number, got 'abc'"]),
        ("12.5,1,1.5,10,1,,,", ["sm_clock_mhz: must be a whole", "prompt_tokens: must be a whole"]),
        ("0,1,10,10,1,,,", ["sm_clock_mhz: must be above 0, .*default clocks"]),
        ("1,1,10,10,0,,,", ["power_w: must be above 0, got 0; leave it empty"]),
        ("1,,10,10,1,,,", ["rate_per_s: required"]),
        ("1,-1,10,10,1,,,", ["rate_per_s: must be finite and not negative, got '-1'"]),
        ("1,1,,,1,,,", ["prompt_tokens: required", "output_tokens: required"]),
        ("1,1,10,10,,,,", ["has none of power_w, ttft_mean_s"]),
        ("1,0,,,1,.1,,", ["ttft_p50_s: must be empty at a rate of 0, got 0.1"]),
        ("1,1,10,1,1,,,.1", ["tpot_mean_s: must be empty with output_tokens of 1"]),
        ("1,1,10,10,1,.5,.4,", ["ttft_p50_s: 0.5 must not exceed ttft_p99_s, which is 0.4"]),
        ("1,1,10,10,1,,,,9", ["has more cells"]),
    ],
)
def test_all_problems_of_a_line_are_named(path, line, expected):
    found = problems(path(f"{HEADER}\n{line}\n"))
    assert len(found) == len(expected)
    for problem, pattern in zip(found, expected, strict=True):
        assert re.match(f"line 2: {pattern}", problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rate_per_s,power_w\n", r"line 1: column sm_clock_mhz \(or sm_mhz\) is missing"),
        ("sm_mhz,rps,input_len,output_len\n1,1,1,1\n", "line 1: needs one of .*power_w"),
        ("sm_mhz,rps,rate_per_s,input_len,output_len,power_w\n", "line 1: .*rate_per_s .*twice"),
        (f"{HEADER}\n", "holds no measurements"),
    ],
)
def test_bad_headers(path, text, problem):
    assert re.match(problem, problems(path(text))[0])
