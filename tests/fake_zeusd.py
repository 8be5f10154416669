"""A fake zeusd: the documented routes that we use, over a Unix socket. It is not zeusd.

zeusd (github.com/ml-energy/zeus) could not be built where these tests were written, so they run
against this: GET /discover, /time and /auth/whoami, POST /gpu/set_gpu_locked_clocks,
/gpu/reset_gpu_locked_clocks and /gpu/set_power_limit, with parameters, order of checks, status
codes, bodies and wording after docs/zeusd/api.md and its source. Bearer tokens are plain names
here, not JWTs.

In process: `with FakeZeusd(path) as zeusd: ...`. As a process, for unprivileged clients:

    python tests/fake_zeusd.py --socket S [--token T] [--disable gpu-control] [--memory]

which prints "ready" when it listens, and sets clocks through pynvml (under LD_LIBRARY_PATH and
AGFT_FAKE_NVML that is the fake NVML), or only remembers them with --memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socketserver
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, urlsplit

GROUPS = ("gpu-control", "gpu-read", "cpu-read", "cpu-control")

# NVML's codes as zeusd passes them on: status and the words of its NVML binding.
NVML_ERRORS = {
    2: (400, "a supplied argument was invalid"),
    3: (400, "the requested operation is not available on the target device"),
    4: (403, "the current user does not have permission to perform this operation"),
    6: (500, "a query to find an object was unsuccessful"),
    9: (500, "NVIDIA driver is not loaded"),
    10: (500, "user provided timeout passed"),
    12: (500, "a shared library couldn't be found or loaded"),
    13: (500, "a function couldn't be found in a shared library"),
    15: (500, "device has fallen off the bus or has otherwise become inacessible"),
    16: (500, "device requires a reset before it can be used again"),
    17: (500, "device control has been blocked by the operating system/cgroups"),
    18: (500, "RM detects a driver/library version mismatch"),
    24: (500, "unexpected enum variant value: 24"),
    28: (500, "unexpected enum variant value: 28"),
    999: (500, "an internal driver error occurred"),
}

# Route under /gpu: NVML's function, and the parameters both have.
WRITES = {
    "set_gpu_locked_clocks": ("SetGpuLockedClocks", ("min_clock_mhz", "max_clock_mhz")),
    "reset_gpu_locked_clocks": ("ResetGpuLockedClocks", ()),
    "set_power_limit": ("SetPowerManagementLimit", ("power_limit_mw",)),
}


class NvmlFailureError(Exception):
    """An NVML call failed; the argument is NVML's code."""


@dataclass
class MemoryGpu:
    """A GPU that only remembers what was set; power limits are 100 to 400 W."""

    name: str = "NVIDIA A40"
    pci_address: str | None = "0000:01:00.0"
    locked_mhz: tuple[int, int] | None = None
    power_limit_w: float = 300.0
    failing_code: int = 0
    """NVML's code that every write fails with; 0 is success."""

    def write(self, name, values):
        valid = name != "set_power_limit" or 100_000 <= values[0] <= 400_000
        if self.failing_code or not valid:
            raise NvmlFailureError(self.failing_code or 2)
        if name == "set_power_limit":
            self.power_limit_w = values[0] / 1000
        else:
            self.locked_mhz = tuple(values) or None


class PynvmlGpu:
    """A GPU set through pynvml."""

    def __init__(self, pynvml, index):
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.name = pynvml.nvmlDeviceGetName(self._handle)
        # NVML writes 8 digits of domain and capitals, zeusd as `lspci -D` does.
        self.pci_address = pynvml.nvmlDeviceGetPciInfo(self._handle).busId.lower()[-12:]

    def write(self, name, values):
        try:
            getattr(self._nvml, f"nvmlDevice{WRITES[name][0]}")(self._handle, *values)
        except self._nvml.NVMLError as error:
            raise NvmlFailureError(error.value) from None


def pynvml_gpus():
    import pynvml

    pynvml.nvmlInit()
    return [PynvmlGpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]


@dataclass
class Faults:
    """How a daemon misbehaves; all may be changed while it runs."""

    delay_s: float = 0.0
    """Wait before each reply."""
    chunked: bool = False
    """Send bodies in chunks of 7 bytes."""
    cut: bool = False
    """Hang up in the middle of each reply."""
    reply: tuple[int, str] | None = None
    """Answer everything with this status and body."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set at the end, so that no delayed reply is waited for."""


class FakeZeusd(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The daemon, listening from `with` on; `tokens` maps each token to its scopes.

    No tokens means no authentication. `shape` is how /discover looks: "current", "no-pci" or
    "gpu-ids" as in older versions. `requests` lists (method, route, Authorization header).
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self, path, *, gpus=None, disabled=(), tokens=None, socket_mode=0o666, shape="current"
    ):
        self.gpus = [MemoryGpu()] if gpus is None else gpus
        self.enabled_groups = [group for group in GROUPS if group not in disabled]
        self.tokens = dict(tokens or {})
        self.shape = shape
        self.requests = []
        self.faults = Faults()
        self._locks = [threading.Lock() for _ in self.gpus]
        super().__init__(str(path), Handler)
        os.chmod(path, socket_mode)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self.faults.over.set()
        self.shutdown()
        self.server_close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.server_address)

    def discovery(self):
        rest = {"enabled_api_groups": self.enabled_groups}
        if self.shape == "gpu-ids":
            return {"gpu_ids": list(range(len(self.gpus))), "cpu_ids": [], **rest}
        gpus = [{"id": index, "name": gpu.name} for index, gpu in enumerate(self.gpus)]
        if self.shape == "current":
            for gpu, listed in zip(self.gpus, gpus, strict=True):
                listed["pci_address"] = gpu.pci_address
                listed["cumulative_energy_available"] = True
        return {"gpus": gpus, "cpus": [], **rest, "auth_required": bool(self.tokens)}

    def write(self, name, query):
        """Carry out a write on the GPUs it names: (status, body)."""
        try:
            indices, values = parse_write(query, WRITES[name][1])
        except ValueError as error:
            return 400, f"Query deserialize error: {error}"
        if not indices:
            return 400, {"error": "gpu_ids must contain at least one GPU index"}
        for index in indices:
            if index >= len(self.gpus):
                return 400, f"GPU index {index} does not exist."
        errors, worst = {}, 200
        for index in indices:
            try:
                with self._locks[index]:
                    self.gpus[index].write(name, values)
            except NvmlFailureError as error:
                status, words = NVML_ERRORS.get(error.args[0], NVML_ERRORS[999])
                errors[str(index)] = f"NVML error: {words}"
                worst = max(worst, status)
        return worst, {"errors": errors} if errors else ""


def parse_write(query, names):
    """(GPU indices, values) of a write's query; `ValueError` in serde's words if it is off."""
    given = dict(parse_qsl(query, keep_blank_values=True))
    expected = ("gpu_ids", *names, "block")
    for name in given:
        if name not in expected:
            listed = ", ".join(f"`{field}`" for field in expected)
            raise ValueError(f"unknown field `{name}`, expected one of {listed}")
    for name in expected:
        if name not in given:
            raise ValueError(f"missing field `{name}`")
    if given["block"] not in ("true", "false"):
        raise ValueError("provided string was not `true` or `false`")
    if not all(given[name].isdecimal() for name in names):
        raise ValueError("invalid digit found in string")
    indices = [int(part) for part in given["gpu_ids"].split(",") if part.strip().isdecimal()]
    return indices, [int(given[name]) for name in names]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def do_GET(self):
        zeusd = self.server
        zeusd.requests.append((self.command, self.path, self.headers.get("Authorization")))
        zeusd.faults.over.wait(zeusd.faults.delay_s)
        status, body = zeusd.faults.reply or self._reply(*urlsplit(self.path)[2:4])
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send(status, content)

    do_POST = do_GET  # noqa: N815

    def _reply(self, path, query):
        """zeusd's order of checks: disabled group, authentication, scope, route, parameters."""
        group = "gpu-control" if path.startswith(("/gpu/set_", "/gpu/reset_")) else None
        if group and group not in self.server.enabled_groups:
            return 404, {"error": f"API group '{group}' is not enabled on this server."}
        refusal = None if path in ("/discover", "/time") else self._unauthorised(path, group)
        return refusal or self._routed(path, query)

    def _unauthorised(self, path, group):
        tokens = self.server.tokens
        if not tokens:
            off = {"error": "Authentication is not enabled on this server."}
            return (404, off) if path.startswith("/auth/") else None
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme != "Bearer":
            return 401, {"error": "Authentication required. Provide an Authorization header."}
        if token not in tokens:
            return 401, {"error": "Invalid token: InvalidSignature"}
        if group and group not in tokens[token]:
            return 403, {"error": f"Token for user 'test' lacks required scope '{group}'."}
        self.scopes = tokens[token]
        return None

    def _routed(self, path, query):
        route = (self.command, path)
        if route == ("GET", "/discover"):
            return 200, self.server.discovery()
        if route == ("GET", "/time"):
            return 200, {"timestamp_ms": time.time_ns() // 1_000_000}
        if route == ("GET", "/auth/whoami"):
            return 200, {"sub": "test", "scopes": list(self.scopes)}
        name = path.removeprefix("/gpu/")
        if self.command == "POST" and name in WRITES:
            return self.server.write(name, query)
        return 404, ""

    def _send(self, status, content):
        faults = self.server.faults
        self.send_response(status)
        if faults.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            parts = [content[start : start + 7] for start in range(0, len(content), 7)]
            content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if faults.cut else content)
        self.close_connection = self.close_connection or faults.cut


def main():
    parser = argparse.ArgumentParser(description="A fake zeusd, for tests.")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--socket-mode", type=lambda text: int(text, 8), default=0o666)
    parser.add_argument("--token", help="ask for this token; without it there is no authentication")
    parser.add_argument("--scopes", default=",".join(GROUPS), help="the token's scopes")
    parser.add_argument("--disable", action="append", default=[], choices=GROUPS)
    parser.add_argument("--memory", action="store_true", help="one GPU in memory, no NVML")
    args = parser.parse_args()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(args.socket)
    zeusd = FakeZeusd(
        args.socket,
        gpus=None if args.memory else pynvml_gpus(),
        disabled=args.disable,
        tokens={args.token: args.scopes.split(",")} if args.token else None,
        socket_mode=args.socket_mode,
    )
    print("ready", flush=True)
    zeusd.serve_forever()


if __name__ == "__main__":
    main()
