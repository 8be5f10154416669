"""One HTTP/1.1 request over a Unix socket.

By hand, because http.client costs 6.7 MB of memory, which the clock guard has not to give, and
bounds each read in time instead of the whole exchange.
"""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

MAX_REPLY_BYTES = 1 << 20


class Reply(NamedTuple):
    """What came back: the HTTP status and the body."""

    status: int
    body: bytes


def exchange(path: str, method: str, route: str, *, token: str = "", timeout_s: float) -> Reply:
    """Send a request without a body to the socket at `path` and read the reply.

    `token` is a bearer token, if not empty; `timeout_s` bounds the whole exchange. Raises
    `OSError` (`TimeoutError` among them), and `ValueError` for what is not HTTP.
    """
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"{method} {route} HTTP/1.1\r\nHost: localhost\r\n{authorization}"
    request = f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode("ascii")
    due_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(path)
        connection.sendall(request)
        data = b""
        while (remaining_s := due_s - time.monotonic()) > 0:
            connection.settimeout(remaining_s)
            part = connection.recv(65536)
            data += part
            reply = parse_reply(data, closed=not part)
            if reply is not None:
                return reply
            if not part:
                raise ConnectionError(f"the connection ended after {len(data)} bytes")
            if len(data) > MAX_REPLY_BYTES:
                raise ValueError(f"more than {MAX_REPLY_BYTES} bytes")
        raise TimeoutError


def parse_reply(data: bytes, *, closed: bool) -> Reply | None:
    """The reply that `data` begins with, or None while that is not whole.

    `closed` says that no more will come, which ends a body of unknown length. Raises `ValueError`
    for what is not HTTP.
    """
    head, blank, rest = data.partition(b"\r\n\r\n")
    if not blank:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"not HTTP/1: {first[:80]!r}")
    fields = {name.lower(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = _dechunked(rest)
    elif "content-length" in fields:
        length = int(fields["content-length"])
        body = rest[:length] if len(rest) >= length else None
    else:
        body = rest if closed else None
    return None if body is None else Reply(int(status[:3]), body)


def _dechunked(data: bytes) -> bytes | None:
    """The body that `data` holds in chunks, or None while the last chunk is not there."""
    body = b""
    while True:
        size, line_end, data = data.partition(b"\r\n")
        if not line_end:
            return None
        length = int(size.partition(b";")[0], 16)
        if length == 0:
            return body
        if len(data) < length + 2:
            return None
        body += data[:length]
        data = data[length + 2 :]
