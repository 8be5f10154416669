"""What zeusd's refusals and silences mean, as our exceptions.

Status codes as in its docs/zeusd/api.md; texts as its NVML binding (the Rust crate nvml-wrapper)
words NVML's codes, since the API itself does not pass them on.
"""

from __future__ import annotations

import json
import re

from agft_ray.errors import (
    GpuArgumentError,
    GpuError,
    GpuLostError,
    GpuNotSupportedError,
    GpuPermissionError,
    GpuTransientError,
    GpuUnavailableError,
)
from agft_ray.gpu.zeusd.unix_http import Reply

CONTROL_IS_OFF = "start zeusd with --enable gpu-control, or upgrade it if it has no such option"

_WAYS_OUT = {
    401: "token_path must name a file with a valid token of scope gpu-control (zeusd token issue)",
    403: "it takes a token of scope gpu-control if zeusd asks for tokens, and a zeusd that runs as "
    "root, in a container with CAP_SYS_ADMIN as well",
    404: CONTROL_IS_OFF,
}
_RESTART = "restart zeusd, as the driver was replaced under it"

# In order. Codes without words are 28 GPU_NOT_FOUND, 24 FREQ_NOT_SUPPORTED; 25 and 26 are versions
# of the call. Versions of the binding differ in how GPU_IS_LOST is worded.
_BY_WORDS: tuple[tuple[re.Pattern[str], type[GpuError]], ...] = (
    (re.compile(r"f(ell|allen) off the bus|requires a reset"), GpuLostError),
    (re.compile(r"variant value: 28\b"), GpuUnavailableError),
    (re.compile(r"\binvalid\b|variant value: 24\b"), GpuArgumentError),
    (
        re.compile(
            r"version mismatch|driver is not loaded|blocked by the operating system"
            r"|couldn't be found|failed to load|variant value: 2[56]\b"
        ),
        GpuNotSupportedError,
    ),
)


def refused(route: str, socket_path: str, reply: Reply) -> GpuError:
    """The exception for a reply whose status is not 200."""
    text = reply_text(reply)
    way_out = _RESTART if "version mismatch" in text else _WAYS_OUT.get(reply.status)
    return _error_class(reply.status, text)(
        f"zeusd on {socket_path}: {route}: {reply.status}: {text or 'no reason given'}"
        + (f"; {way_out}" if way_out else "")
    )


def not_answered(
    route: str, socket_path: str, timeout_s: float, error: OSError | ValueError
) -> GpuError:
    """The exception for a request that got no reply, or no whole one, within `timeout_s`."""
    where = f"zeusd on {socket_path}"
    if isinstance(error, PermissionError):
        return GpuPermissionError(
            f"{where}: this user may not open the socket: join the socket's group, or start zeusd "
            "with --socket-permissions 660 and --socket-gid of a group of this user"
        )
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return GpuTransientError(
            f"zeusd does not answer on {socket_path} ({error.strerror}): is it running?"
        )
    if isinstance(error, TimeoutError):
        return GpuTransientError(f"{where}: {route}: no reply within {timeout_s:g} s")
    return GpuTransientError(f"{where}: {route}: no whole reply: {error}")


def reply_text(reply: Reply) -> str:
    """The daemon's words: of {"error": ...}, of {"errors": {GPU: ...}}, or the plain body."""
    text = reply.body.decode(errors="replace")
    try:
        parsed = json.loads(text)
        if "errors" in parsed:
            text = "; ".join(f"GPU {gpu}: {words}" for gpu, words in parsed["errors"].items())
        else:
            text = str(parsed["error"])
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return " ".join(text.split())[:500]


def _error_class(status: int, text: str) -> type[GpuError]:
    if status in (401, 403):
        return GpuPermissionError
    if status == 404:
        return GpuNotSupportedError
    for words, error in _BY_WORDS:
        if words.search(text):
            return error
    return GpuTransientError if status >= 500 or status == 408 else GpuNotSupportedError
