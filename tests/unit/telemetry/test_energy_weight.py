"""Weights of energy over time: their rows, their age, and a server that does as it likes."""

import contextlib
import http.server
import os
import threading
import time

import pytest

from agft_ray.config import parse
from agft_ray.errors import ConfigError
from agft_ray.settings import TunerConfig
from agft_ray.telemetry import energy_weight as module
from agft_ray.telemetry.energy_weight import (
    MAX_BYTES,
    EnergyWeightConfig,
    WeightReader,
    WeightSeries,
    parse_rows,
    read_series,
)

NOON_S = 1_767_268_800.0  # 2026-01-01T12:00:00Z


@pytest.mark.parametrize(
    "text",
    [
        "time,weight\n2026-01-01T12:00:00Z,1.5\n1767272400,-3\n",
        "2026-01-01T13:00:00+01:00,1.5\n\n2026-01-01T13:00,-3\n",
        '[{"time": 1767268800, "weight": 1.5}, ["2026-01-01T13:00:00Z", -3]]',
    ],
)
def test_rows_in_each_form_and_negative_prices_weigh_nothing(text):
    assert parse_rows(text) == [(NOON_S, 1.5), (NOON_S + 3600, 0.0)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("time,weight\nnoon,1", r"row 1: .*noon"),
        ("0,1\n1,much", r"row 2: .*much"),
        ("0,nan", "row 1"),
        ("0", "row 1"),
        ('[{"time": 0}]', "row 1"),
        ("[1]", "row 1"),
        ("[", "Expecting"),
        ("", "0 rows"),
        ("0,1\n" * 20_001, "20001 rows"),
    ],
)
def test_rows_that_are_wrong_are_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse_rows(text)


def test_a_row_holds_until_the_next_and_the_last_one_for_its_age():
    series = WeightSeries([(100.0, 2.0), (0.0, 0.5)], max_age_s=50.0)
    weights = {t_s: series.at(t_s) for t_s in (-1.0, 0.0, 49.0, 99.0, 100.0, 150.0, 151.0)}
    assert {t: each.value for t, each in weights.items()} == {
        -1.0: 1.0, 0.0: 0.5, 49.0: 0.5, 99.0: 1.0, 100.0: 2.0, 150.0: 2.0, 151.0: 1.0,
    }  # fmt: skip
    assert "future" in weights[-1.0].problem
    assert "51 s old" in weights[151.0].problem
    assert not weights[150.0].problem


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"source": "ftp://x/y"}, r"energy_weight.source: 'ftp://x/y' .*http"),
        ({"source": "file:///etc/passwd"}, "energy_weight.source"),
        ({"source": "http://"}, "energy_weight.source"),
        ({"source": "https://me:word@host/x"}, "energy_weight.source: .*user"),
        ({"source": ""}, "energy_weight.source"),
        ({"source": "x", "refetch_s": 1.0}, "refetch_s"),
        ({"source": "x", "max_age_s": 0.0}, "max_age_s"),
    ],
)
def test_settings_that_are_wrong_are_named(weights, named):
    with pytest.raises(ConfigError, match=named):
        parse(TunerConfig, {"energy_weight": weights}, source="user_config")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    large, pipe = tmp_path / "large", tmp_path / "pipe"
    large.write_bytes(b"0,1\n" * MAX_BYTES)
    os.mkfifo(pipe)
    for path, problem in ((large, "bytes"), (pipe, "regular"), ("/dev/zero", "regular")):
        with pytest.raises(ValueError, match=problem):
            read_series(EnergyWeightConfig(source=str(path)))
    with pytest.raises(FileNotFoundError):
        read_series(EnergyWeightConfig(source=str(tmp_path / "none")))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what the test has set, and goes where it says."""

    def do_GET(self):
        answer = self.server.answers[self.path]
        if answer.startswith(b"to:"):
            self.send_response(302)
            self.send_header("Location", answer[3:].decode())
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.answers = {"/weights": f"{NOON_S},0.5\n".encode()}
        yield server
        server.shutdown()
        thread.join()


def eventually(reader, config, holds):
    end_s = time.monotonic() + 20
    while not holds(weight := reader.weigh(config)):
        assert time.monotonic() < end_s, weight
        time.sleep(0.01)
    return weight


def test_a_server_is_read_again_and_its_rows_outlive_its_failures(server, monkeypatch):
    now_s = [NOON_S]
    reader = WeightReader(lambda: now_s[0])
    config = EnergyWeightConfig.model_construct(
        source=server.url + "/weights", max_age_s=7200.0, refetch_s=0.01
    )
    assert reader.weigh(None).value == 1.0
    first = reader.weigh(config)
    assert first.value in (1.0, 0.5), "it does not wait"
    assert eventually(reader, config, lambda weight: weight.value == 0.5).problem == ""
    server.answers["/weights"] = f"{NOON_S},2\n".encode()
    eventually(reader, config, lambda weight: weight.value == 2.0)
    server.answers["/weights"] = b"<html>sorry</html>"
    broken = eventually(reader, config, lambda weight: weight.problem)
    assert broken.value == 2.0
    assert "row 1" in broken.problem
    now_s[0] += 7201
    assert reader.weigh(config).value == 1.0
    server.answers["/weights"] = f"{NOON_S + 7200},3\n".encode()
    assert eventually(reader, config, lambda weight: weight.value == 3.0).value == 3.0
    assert reader.weigh(None) == module.USUAL
    reader.close()


def test_what_is_not_there_is_1_and_says_so_without_secrets(server):
    url = server.url + "/none?token=secret"
    server.answers["/none?token=secret"] = b""
    reader = WeightReader()
    config = EnergyWeightConfig(source=url)
    weight = eventually(reader, config, lambda weight: "0 rows" in weight.problem)
    reader.close()
    assert weight.value == 1.0
    assert "secret" not in weight.problem
    assert "/none" in weight.problem


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_server_cannot_send_us_to_anything_but_http(server, target):
    server.answers["/away"] = f"to:{target}".encode()
    with pytest.raises(OSError):
        read_series(EnergyWeightConfig(source=server.url + "/away"))
    server.answers["/here"] = b"to:/weights"
    assert read_series(EnergyWeightConfig(source=server.url + "/here")).start_s == NOON_S


def test_an_endless_answer_is_cut_off(server):
    server.answers["/large"] = b"0,1\n" * MAX_BYTES
    with pytest.raises(ValueError, match="bytes"):
        read_series(EnergyWeightConfig(source=server.url + "/large"))


def test_a_slow_answer_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", -1.0)
    monkeypatch.setattr(module.urllib.request.OpenerDirector, "open", lambda *_, **__: Endless())
    with pytest.raises(TimeoutError):
        read_series(EnergyWeightConfig(source=server.url + "/weights"))


class Endless:
    """An answer that comes drop by drop."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read1(self, size):
        return b"0"
