"""HTTP over a Unix socket, against peers that break it in every way."""

import contextlib
import socket
import tempfile
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agft_ray.gpu.zeusd import unix_http
from agft_ray.gpu.zeusd.unix_http import Reply, exchange, parse_reply

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def path():
    with tempfile.TemporaryDirectory(prefix="uh") as folder:
        yield f"{folder}/socket"


@contextlib.contextmanager
def peer(path, pieces, gap_s=0.0):
    """Accepts one connection, reads the request into the list it gives, and sends `pieces`."""

    def serve():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            requests.append(connection.recv(65536))
            for piece in pieces:
                connection.sendall(piece)
                over.wait(gap_s)

    requests = []
    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        over.set()
        thread.join()


def test_what_is_sent(path):
    with peer(path, [EMPTY]) as requests:
        assert exchange(path, "POST", "/gpu?a=1", token="secret", timeout_s=2) == Reply(200, b"")
    assert requests == [
        b"POST /gpu?a=1 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
        b"Content-Length: 0\r\nConnection: close\r\n\r\n"
    ]


def test_a_peer_that_keeps_the_connection_open(path):
    with peer(path, [EMPTY, b""], gap_s=60):
        assert exchange(path, "GET", "/", timeout_s=2) == Reply(200, b"")


def test_a_reply_byte_by_byte(path):
    with peer(path, [bytes([byte]) for byte in EMPTY], gap_s=0.001):
        assert exchange(path, "GET", "/", timeout_s=2) == Reply(200, b"")


def test_the_timeout_is_for_the_whole_exchange(path):
    with peer(path, [b"H"] * 9, gap_s=0.4):
        start_s = time.monotonic()
        with pytest.raises(TimeoutError):
            exchange(path, "GET", "/", timeout_s=0.5)
        assert 0.5 <= time.monotonic() - start_s < 3.0, "the whole would take 3.6 s"


@pytest.mark.parametrize("pieces", [[], [EMPTY[:-1]], [b"HTTP/1.1 200 OK\r\n"]])
def test_a_peer_that_hangs_up_in_mid_reply(path, pieces):
    with peer(path, pieces), pytest.raises(ConnectionError):
        exchange(path, "GET", "/", timeout_s=2)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 abc\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_not_http(path, reply):
    with peer(path, [reply]), pytest.raises(ValueError):
        exchange(path, "GET", "/", timeout_s=2)


def test_an_endless_reply(path, monkeypatch):
    monkeypatch.setattr(unix_http, "MAX_REPLY_BYTES", 1000)
    with (
        peer(path, [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 100] * 1000]),
        pytest.raises(ValueError, match="more than 1000 bytes"),
    ):
        exchange(path, "GET", "/", timeout_s=2)


@given(
    body=st.binary(max_size=40),
    sizes=st.lists(st.integers(1, 9), max_size=9),
    cut=st.integers(0, 400),
)
def test_any_framing_is_whole_or_incomplete(body, sizes, cut):
    head = b"HTTP/1.1 200 OK\r\nserver: x\r\n"
    pieces, rest = [], body
    for size in sizes:
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    pieces = [*filter(None, [*pieces, rest]), b""]
    chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    for reply in (
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        head + b"transfer-encoding: Chunked\r\n\r\n" + chunks.removesuffix(b"\r\n"),
    ):
        assert parse_reply(reply, closed=False) == Reply(200, body)
        assert parse_reply(reply[: cut % len(reply)], closed=True) is None


def test_a_body_of_unknown_length_ends_with_the_connection():
    reply = b"HTTP/1.0 404 Not Found\r\n\r\nwords"
    assert parse_reply(reply, closed=False) is None
    assert parse_reply(reply, closed=True) == Reply(404, b"words")
