import re

import pytest

from agft_ray.calibration.measurements import Measurement, read_measurements
from agft_ray.errors import ConfigError


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "mine.csv"
        path.write_text(text, encoding="utf-8")
        return read_measurements(path)

    return read


def problems(read, text):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.source.endswith("mine.csv")
    return list(caught.value.problems)


def test_columns_come_in_any_order_and_others_are_told(read):
    found = read("power_w, batch ,note,sm_clock_mhz,tpot_ms\n201.5,32,x,1200,24\n")
    assert found.rows == (Measurement(2, "decode", 1200.0, 201.5, 24.0, 32, 0, 0),)
    assert found.unused_columns == ("note",)


def test_the_phase_follows_from_the_work_unless_given(read):
    text = (
        "\ufeffsm_clock_mhz,power_w,step_ms,batch,context_tokens,prefill_tokens,phase\n"
        "1200,60,,0,,,\n"
        "1200,,25,4,2000,,\n"
        "1200,250,90,4,2000,512,\n"
        "1200,250,,,,,prefill\n"
        "1200,61,,,,,idle\n"
    )
    rows = read(text).rows
    assert [row.phase for row in rows] == ["idle", "decode", "prefill", "prefill", "idle"]
    assert [row.line for row in rows] == [2, 3, 4, 5, 6]
    assert rows[2] == Measurement(4, "prefill", 1200.0, 250.0, 90.0, 4, 2000, 512)
    assert (rows[1].power_w, rows[0].step_ms) == (None, None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("abc,200,,4,,", "sm_clock_mhz: .*'abc'"),
        (",200,,4,,", "sm_clock_mhz: required"),
        ("1200,-3,,4,,", "power_w: .*'-3'"),
        ("1200,nan,,4,,", "power_w: .*'nan'"),
        ("1200,0,,4,,", "power_w: .*above 0"),
        ("1200,200,,4.5,,", "batch: .*'4.5'"),
        ("1200,,,4,,", "has .*power_w.*step_ms.*tpot_ms"),
        ("1200,200,,,,", "batch: required.* 1"),
        ("1200,200,,4,,boost", "phase: 'boost' .*idle, prefill, "),
        ("1200,200,,4,,idle", "phase: idle, "),
        ("1200,200,,4,9,decode", "prefill_tokens: .*decode"),
        ("1200,200,30,4,,prefill", "prefill_tokens: required"),
        ("1200,200,,4,,,7", "has more cells"),
    ],
)
def test_a_bad_line_is_named(read, line, problem):
    found = problems(read, f"sm_clock_mhz,power_w,step_ms,batch,prefill_tokens,phase\n{line}\n")
    assert len(found) == 1
    assert re.match(f"line 2: {problem}", found[0])


def test_all_bad_lines_are_named_up_to_twenty(read):
    found = problems(read, "sm_clock_mhz,power_w,batch\n" + "0,1,1\n" * 25)
    assert len(found) == 21
    assert found[19].startswith("line 21: ")
    assert found[20] == "and 5 more"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: .*sm_clock_mhz.*; found nothing"),
        ("clock,power_w\n1,1\n", "line 1: .*sm_clock_mhz.*; found clock, power_w"),
        ("sm_clock_mhz,batch\n1,1\n", "line 1: .*power_w, step_ms"),
        ("sm_clock_mhz,power_w,power_w\n", "line 1: .*power_w .*twice"),
        ("sm_clock_mhz,power_w\n", "holds no measurements"),
        ("sm_clock_mhz,step_ms,tpot_ms\n1,2,3\n", "line 2: step_ms and tpot_ms: "),
    ],
)
def test_a_bad_header_is_named(read, text, problem):
    assert re.match(problem, problems(read, text)[0])


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.csv: (?s:.*): No such file"):
        read_measurements(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.csv: (?s:.*)UTF-8"):
        read_measurements(tmp_path / "binary.csv")
