"""`agft-ray status` on made-up statuses; the live one is in tests/integration/test_vllm_app.py."""

import io
import json
import re
import socket

import pytest
from golden_files import assert_golden
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


STATUSES = [
    TUNING,
    LOST,
    STARTING,
    ENDED,
    TUNING | {"replica": "eee", "locked_sm_clock_mhz": None, "config_error": "window_s: no"},
    TUNING | {"replica": "fff", "actuator": "power_limit", "power_limit_w": 250.0},
    TUNING | {"replica": "ggg", "actuator": "power_limit", "power_limit_w": None},
    TUNING | {"replica": "hhh", "gpu_uuid": "GPU-12345678-1234,GPU-2,GPU-3"},
    TUNING | {"replica": "iii", "policy": "phases", "plan": [1500, 1230, 210]},
    TUNING | {"replica": "jjj", "policy": "phases", "plan": [None, 1230, 1230]},
    TUNING | {"replica": "kkk", "plan": [1200, 1200, 1200]},
]


def cells(status):
    console = Console(file=io.StringIO(), width=200)
    console.print(status_command.table([status], console))
    line = console.file.getvalue().splitlines()[3]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_screen(cluster, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "170")
    cluster.append(STATUSES)
    assert main(["status", "--all"]) == 1
    assert_golden("status", capsys.readouterr().out)


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_a_narrow_terminal_has_fewer_columns_and_no_cell_is_cut(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(status_command.table([TUNING, LOST | {"plan": [1500, 1230, 210]}], console))
    header, _, *rows = console.file.getvalue().strip().splitlines()
    names = [name.strip() for name in header.split("  ") if name.strip()]
    assert set(names) <= set(status_command.COLUMNS)
    assert {"replica", "state", "policy", "locked", "power"} <= set(names)
    assert "1500/1230/210" in rows[1]
    assert max(map(len, rows)) <= width


def test_in_a_pipe_every_column_is_there(cluster, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    cluster.append(STATUSES)
    main(["status"])
    screen = capsys.readouterr().out
    assert all(name in screen for name in status_command.COLUMNS)
    assert TUNING["deployment"] in screen


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_cluster_without_a_living_tuner(options, cluster, capsys):
    cluster.append([ENDED])
    assert main(["status", *options]) == 2


def test_what_is_not_known_is_not_shown_as_zero():
    assert cells(STARTING)[5:] == ["-"] * 8


def test_notes_are_reasons_and_totals_are_sums():
    assert status_command.notes([TUNING, LOST]) == [f"bbb: {LOST['reason']}"]
    assert status_command.notes([TUNING | {"config_error": "window_s: no", "reason": "x"}]) == [
        "aaa: window_s: no"
    ]
    numbers = re.findall(r"\d+|-", status_command.totals([TUNING, LOST, STARTING]))
    assert numbers == ["3", "1", "1", "1", "421"]
    assert re.findall(r"\d+|-", status_command.totals([STARTING])) == ["1", "0", "1", "0", "-"]


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
    assert f"bbb: {LOST['reason']}" in capsys.readouterr().out


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
    error = capsys.readouterr().err
    assert "--address: " in error
    assert f"'{address}'" in error


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_period_that_is_none(seconds, capsys):
    assert main(["status", "--watch", seconds]) == 2
    assert "--watch" in capsys.readouterr().err
