"""`agft-ray status` on made-up statuses; the live one is in tests/integration/test_vllm_app.py."""

import io
import json
import socket

import pytest
from rich.console import Console

from agft_ray.cli import status as status_command
from agft_ray.cli.app import main

TUNING = {
    "deployment": "llm#TunedLLMServer:tiny",
    "replica": "aaa",
    "rank": 0,
    "role": "tuned",
    "alive": True,
    "mode": "control",
    "state": "tuning",
    "policy": "agft",
    "gpu_uuid": "GPU-12345678-1234-1234-1234-123456789012",
    "locked_sm_clock_mhz": 1200,
    "sm_clock_mhz": 1185.0,
    "power_w": 210.4,
    "running": 3.2,
    "waiting": 0.0,
    "windows": 1234,
}
LOST = TUNING | {"replica": "bbb", "state": "gpu lost", "reason": "GPU is lost (NVML 15)"}
STARTING = {
    "deployment": "llm#TunedLLMServer:tiny",
    "replica": "ccc",
    "rank": 1,
    "role": "holdout",
    "alive": True,
    "mode": "control",
    "state": "starting",
}
ENDED = TUNING | {"replica": "ddd", "alive": False}


def printed(statuses):
    console = Console(file=io.StringIO(), width=200)
    console.print(status_command.table(statuses))
    return console.file.getvalue()


def cells(statuses, replica):
    (line,) = [line for line in printed(statuses).splitlines() if f" {replica} " in line]
    return [cell for cell in line.split("  ") if cell.strip()]


def test_a_row_says_what_a_tuner_does():
    row = " ".join(printed([TUNING]).split())
    for words in ("tuned control tuning agft GPU-12345678…", "1,200 MHz 1,185 MHz 210 W 3 0 1,234"):
        assert words in row


def test_what_is_not_known_is_not_shown_as_zero():
    assert [cell.strip() for cell in cells([STARTING], "ccc")][5:] == ["-"] * 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"locked_sm_clock_mhz": None}, "default"),
        ({"actuator": "power_limit", "power_limit_w": 250.0}, "250 W"),
        ({"actuator": "power_limit", "power_limit_w": None}, "none"),
        ({"gpu_uuid": "GPU-12345678-1234,GPU-2,GPU-3"}, "GPU-12345678… +2"),
        ({"alive": False}, "ended"),
    ],
)
def test_rows_of_other_kinds(fields, words):
    assert words in printed([TUNING | fields])


def test_notes_and_totals():
    statuses = [TUNING, LOST, STARTING]
    assert status_command.notes(statuses) == ["bbb: GPU is lost (NVML 15)"]
    assert status_command.notes([TUNING | {"config_error": "window_s: no", "reason": "x"}]) == [
        "aaa: window_s: no"
    ]
    assert status_command.totals(statuses) == (
        "3 replicas: 1 tuned, 1 held out, 1 in trouble; 421 W in all"
    )
    assert status_command.totals([STARTING]).endswith("; - in all")


@pytest.fixture
def cluster(monkeypatch):
    """FAKE cluster: its readings, one after the other, are what the test gives."""
    readings = []
    monkeypatch.setattr(status_command.status_reader, "readings", lambda address: iter(readings))
    return readings


def test_json_is_a_line_for_each_reading(cluster, capsys):
    cluster.append([TUNING, ENDED])
    assert main(["status", "--json"]) == 0
    reading = json.loads(capsys.readouterr().out)
    assert reading["replicas"] == [TUNING]
    assert reading["t_s"] > 0


def test_trouble_shows_in_the_exit_status(cluster, capsys):
    cluster.append([TUNING, LOST])
    assert main(["status"]) == 1
    assert "bbb: GPU is lost" in capsys.readouterr().out


def test_only_what_was_asked_for(cluster, capsys):
    other = TUNING | {"deployment": "other#Server", "replica": "eee"}
    cluster += [[TUNING, other, ENDED]] * 2
    main(["status", "--json", "--application", "other"])
    assert [r["replica"] for r in json.loads(capsys.readouterr().out)["replicas"]] == ["eee"]
    main(["status", "--json", "--all"])
    assert len(json.loads(capsys.readouterr().out)["replicas"]) == 3


def test_an_address_where_nothing_answers(capsys):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        assert main(["status", "--address", address]) == 2
    assert f"--address: nothing answers at '{address}'" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_period_that_is_none(seconds, capsys):
    assert main(["status", "--watch", seconds]) == 2
    assert "--watch" in capsys.readouterr().err
