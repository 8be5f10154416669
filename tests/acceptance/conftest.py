"""What the acceptance tests share: the measured tables, and a list of the numbers reached."""

import csv

import pytest

REACHED = pytest.StashKey[list]()


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
def reached(request):
    """Notes a number for the summary, beside the bound it must keep; returns it."""

    def note(what, value, bound):
        request.config.stash.setdefault(REACHED, []).append((what, value, bound))
        return value

    return note


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash.get(REACHED, []):
        terminalreporter.section("reached, and allowed")
        for what, value, bound in rows:
            terminalreporter.line(f"{what}: {shown(value)} ({shown(bound)})")


def shown(value):
    if value is None:
        return "no bound"
    return f"{value:.1%}" if isinstance(value, float) else str(value)
