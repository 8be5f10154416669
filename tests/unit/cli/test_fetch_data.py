"""Fetching from a local HTTP server: what is kept is complete and verified, else nothing is."""

import contextlib
import hashlib
import http.server
import re
import threading
from urllib.parse import urlsplit

import pytest
from golden_files import assert_golden

from agft_ray.cli.app import main
from agft_ray.workloads import download, public_traces
from agft_ray.workloads.public_traces import PUBLIC_TRACES, PublicTrace

CONTENT = b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"2023-11-16 18:15:46,374,44\n" * 40_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        served = self.server.files.get(urlsplit(self.path).path)
        if served is None:
            self.send_error(404)
            return
        body, headers = served
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files = {}
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "data" / "traces"


def trace(sha256=SHA256, name="a.csv", url="http://127.0.0.1:9/a.csv"):
    return PublicTrace(name, url, "a trace", "MIT", len(CONTENT), sha256)


@pytest.fixture
def fetch(server, directory, monkeypatch):
    """Runs the command with these traces, by default from the server, and gives its status."""

    def run(traces, *arguments, mirror=True):
        monkeypatch.setattr(public_traces, "PUBLIC_TRACES", tuple(traces))
        base = ["--base-url", f"{server.url}/mirror/"] if mirror else []
        return main(["fetch-data", "--to", str(directory), *base, *arguments])

    return run


def serve(server, body=CONTENT, name="a.csv", **headers):
    length = {"Content-Length": str(len(body))}
    server.files[f"/mirror/{name}"] = (body, length | headers)


def left_in(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_the_screen(server, fetch, directory, capsys):
    """A file that is fetched, one that is there already, one that cannot be verified; the list."""
    serve(server)
    serve(server, name="b.csv")
    assert fetch([trace()]) == 0
    traces = [trace(), trace(name="b.csv", sha256=None)]
    assert fetch(traces, "--allow-unverified") == 0
    assert fetch(traces, "--list") == 0
    assert_golden(
        "fetch_data", capsys.readouterr().out, {str(directory): "<to>", SHA256: "<sha256>"}
    )


def test_a_good_file_is_stored_and_verified(server, fetch, directory, capsys):
    serve(server)
    assert fetch([trace()]) == 0
    assert (directory / "a.csv").read_bytes() == CONTENT
    assert left_in(directory) == ["a.csv"]
    assert str(directory / "a.csv") in capsys.readouterr().out


def test_without_a_mirror_it_comes_from_its_origin(server, fetch, directory):
    serve(server)
    assert fetch([trace(url=f"{server.url}/mirror/a.csv")], mirror=False) == 0
    assert left_in(directory) == ["a.csv"]


def test_the_folder_of_agft_ray_data_is_the_default(server, fetch, tmp_path, monkeypatch):
    serve(server)
    monkeypatch.setattr(public_traces, "PUBLIC_TRACES", (trace(),))
    monkeypatch.setenv("AGFT_RAY_DATA", str(tmp_path / "mine"))
    assert main(["fetch-data", "--base-url", f"{server.url}/mirror"]) == 0
    assert left_in(tmp_path / "mine" / "traces") == ["a.csv"]


@pytest.mark.parametrize(
    ("body", "headers", "value"),
    [
        (CONTENT[:-1] + b"5", {}, SHA256),
        (CONTENT[:5000], {"Content-Length": str(len(CONTENT))}, f"5,000 of {len(CONTENT):,} "),
        (b"5\r\n12345\r\n40\r\n1234", {"Transfer-Encoding": "chunked"}, "cut off"),
        (CONTENT + b"1", {}, f" {len(CONTENT):,} bytes"),
    ],
    ids=["checksum", "cut off", "chunk cut off", "too large"],
)
def test_what_is_wrong_leaves_nothing(server, fetch, directory, capsys, body, headers, value):
    serve(server, body, **headers)
    if "Transfer-Encoding" in headers:
        del server.files["/mirror/a.csv"][1]["Content-Length"]
    assert fetch([trace()]) == 1
    assert left_in(directory) == []
    message = capsys.readouterr().err
    assert f"{server.url}/mirror/a.csv: " in message
    assert value in message


def test_an_endless_answer_is_ended(server, fetch, directory, capsys):
    serve(server, CONTENT * 3)
    del server.files["/mirror/a.csv"][1]["Content-Length"]
    assert fetch([trace()]) == 1
    assert left_in(directory) == []
    assert f" {len(CONTENT):,} bytes" in capsys.readouterr().err


def test_a_missing_file_does_not_stop_the_others(server, fetch, directory, capsys):
    serve(server, name="b.csv")
    assert fetch([trace(), trace(name="b.csv")]) == 1
    assert left_in(directory) == ["b.csv"]
    message = capsys.readouterr().err
    assert "/mirror/a.csv: HTTP 404" in message
    assert "--base-url" in message


@pytest.mark.parametrize("base", ["http://127.0.0.1:1", "http://[", "http://127.0.0.1:x"])
def test_no_network_is_said(fetch, directory, capsys, base):
    assert fetch([trace()], "--base-url", base, mirror=False) == 1
    assert left_in(directory) == []
    assert f"{base}/a.csv: " in capsys.readouterr().err


def test_an_existing_file_is_kept_and_verified(fetch, directory, capsys):
    directory.mkdir(parents=True)
    path = directory / "a.csv"
    path.write_bytes(CONTENT)
    assert fetch([trace()]) == 0  # the server has no such file
    assert str(path) in capsys.readouterr().out
    path.write_bytes(b"mine")
    assert fetch([trace()]) == 1
    error = capsys.readouterr().err
    assert all(f" {of}" in error for of in (path, hashlib.sha256(b"mine").hexdigest(), SHA256))
    assert path.read_bytes() == b"mine"


def test_a_file_without_a_checksum_needs_permission(server, fetch, directory, capsys):
    serve(server)
    unknown = trace(sha256=None)
    assert fetch([unknown]) == 0
    assert fetch([unknown], "a.csv") == 1
    assert "--allow-unverified" in capsys.readouterr().err
    assert left_in(directory) == []
    assert fetch([unknown], "--allow-unverified") == 0
    assert left_in(directory) == ["a.csv"]
    assert re.search(f"NOT verified.* {SHA256}", capsys.readouterr().out)


def test_a_file_without_a_checksum_must_be_a_trace(server, fetch, directory, capsys):
    serve(server, b"<html>log in</html>\n")
    assert fetch([trace(sha256=None)], "--allow-unverified") == 1
    assert left_in(directory) == []
    assert "a.csv: line 1: " in capsys.readouterr().err


def test_an_interrupted_download_leaves_nothing(server, directory):
    serve(server)

    def interrupt(received, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.download(trace(), f"{server.url}/mirror/a.csv", directory, interrupt)
    assert left_in(directory) == []


def test_a_folder_that_cannot_be_written_is_named(server, fetch, directory, capsys):
    serve(server)
    directory.parent.mkdir()
    directory.touch()
    assert fetch([trace()]) == 1
    assert re.search(rf"\ba\.csv: .* {directory}: ", capsys.readouterr().err)


def test_bad_options_are_named_together(fetch, capsys, monkeypatch):
    monkeypatch.delenv("AGFT_RAY_DATA", raising=False)
    assert main(["fetch-data", "nonsense", "--base-url", "file:///etc"]) == 2
    message = capsys.readouterr().err
    for named in ("'nonsense'", "--to: ", "--base-url: ", "'file:///etc'", "http://"):
        assert named in message


def test_the_list_names_every_file_and_what_is_not_known(capsys):
    assert main(["fetch-data", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{known.name}: " in listed and known.url in listed for known in PUBLIC_TRACES)
    unknown = sum(known.sha256 is None for known in PUBLIC_TRACES)
    assert listed.count("--allow-unverified") == unknown
    assert all(known.sha256 in listed for known in PUBLIC_TRACES if known.sha256)


def test_the_manifest_is_well_formed():
    names = [known.name for known in PUBLIC_TRACES]
    assert len(set(names)) == len(names)
    for known in PUBLIC_TRACES:
        assert known.url.startswith("https://")
        assert known.sha256 is None or len(bytes.fromhex(known.sha256)) == 32


def test_the_checksum_of_the_conversation_trace_is_that_of_the_file(conversation_trace):
    assert download.sha256_of(conversation_trace) == PUBLIC_TRACES[0].sha256
