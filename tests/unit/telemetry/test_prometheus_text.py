import math

import pytest

from agft_ray.telemetry.prometheus_text import Series, read_series


def read(line):
    return list(read_series([line, f"{line}\n"], {"a", "a:b_total"}))


@pytest.mark.parametrize(
    ("line", "series"),
    [
        ("a 1", Series("a", {}, 1.0)),
        ("a{} 1.5e3", Series("a", {}, 1500.0)),
        ('a:b_total{x="1",y="z"} 2.0', Series("a:b_total", {"x": "1", "y": "z"}, 2.0)),
        ('a{x="1",} 2.0 1700000000000', Series("a", {"x": "1"}, 2.0)),
        (r'a{x="q\"b}c{d",y="e f"} -3', Series("a", {"x": r"q\"b}c{d", "y": "e f"}, -3.0)),
        ("a +Inf", Series("a", {}, math.inf)),
    ],
)
def test_a_line(line, series):
    assert read(line) == [series, series]


@pytest.mark.parametrize("line", ["a NaN", "a much", "a ", "a{}", 'a{x="1"} '])
def test_what_is_no_number_is_nan(line):
    assert all(math.isnan(series.value) for series in read(line))
    assert len(read(line)) == 2


@pytest.mark.parametrize("line", ["", "# HELP a 1", '# TYPE a {x="1"}', "ab 1", "b{} 1", 'a{x="1"'])
def test_other_lines_are_passed_over(line):
    assert read(line) == []
