"""What the acceptance tests share: the measured tables, and a list of the numbers reached."""

import csv
import itertools

import pytest

REACHED = "reached"


@pytest.fixture(scope="session")
def table(data_file):
    """The rows of a CSV file in calibration/, numbers as floats."""

    def rows_of(name):
        with data_file(f"calibration/{name}").open() as lines:
            return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(lines)]

    return rows_of


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.fixture
def reached(record_property):
    """Notes a number for the summary, beside the bound it must keep; returns it."""

    def note(what, value, bound):
        record_property(REACHED, f"{what}: {shown(value)} ({shown(bound)})")
        return value

    return note


def pytest_terminal_summary(terminalreporter):
    reports = itertools.chain.from_iterable(terminalreporter.stats.values())
    properties = (p for report in reports for p in getattr(report, "user_properties", ()))
    if lines := dict.fromkeys(line for name, line in properties if name == REACHED):
        terminalreporter.section("reached, and allowed")
        for line in lines:
            terminalreporter.line(line)


def shown(value):
    if value is None:
        return "no bound"
    return f"{value:.1%}" if isinstance(value, float) else str(value)
