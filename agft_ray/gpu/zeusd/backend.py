"""zeusd, the Zeus daemon: a root process that sets clocks for processes which may not themselves.

github.com/ml-energy/zeus, its HTTP API as documented in docs/zeusd/api.md and read in its source.
Tested against tests/fake_zeusd.py, a fake of the documented routes, not against zeusd itself.

Standard library only and small, hence named tuples instead of dataclasses (which cost 1.5 MB): the
clock guard, a process of about 10 MB, resets through this.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from agft_ray.errors import GpuNotSupportedError, GpuPermissionError, GpuUnavailableError
from agft_ray.gpu.zeusd.errors import CONTROL_IS_OFF, not_answered, refused, reply_text
from agft_ray.gpu.zeusd.unix_http import Reply, exchange

T = TypeVar("T")

CONTROL_GROUP = "gpu-control"
"""The API group, and the token scope, that setting clocks takes."""

_MAX_SOCKET_PATH_BYTES = 107
_MAX_TOKEN_BYTES = 8192


class ZeusdGpu(NamedTuple):
    """A GPU as the daemon lists it."""

    id: int
    """The daemon's own number for it, which need not be NVML's in our container."""
    model: str | None
    """The product name; None from older daemons."""
    pci_address: str | None
    """As `lspci -D` writes it, "0000:01:00.0"; None from older daemons."""


class Discovery(NamedTuple):
    """What the daemon says of itself."""

    gpus: tuple[ZeusdGpu, ...]
    enabled_groups: tuple[str, ...]
    """API groups, of which setting clocks needs `CONTROL_GROUP`."""
    auth_required: bool
    """Whether requests need a token; False too from daemons too old to say."""


class LocalGpu(Protocol):
    """What has to be known of a GPU of this process to find it among the daemon's."""

    @property
    def uuid(self) -> str | None:
        """The NVML UUID, None where the driver does not tell."""
        ...

    @property
    def index(self) -> int:
        """NVML's number for it."""
        ...

    @property
    def model(self) -> str | None:
        """The product's name."""
        ...

    @property
    def pci_address(self) -> str | None:
        """Where it is on the bus."""
        ...


class ZeusdClient:
    """Requests to the daemon that listens on the Unix socket `socket_path`, one connection each.

    `token_path` names a file with a bearer token, read at each request so that it may be rotated;
    "" sends none. `timeout_s` bounds a whole request. A write that timed out may still be carried
    out: before any later one, as zeusd has one queue a GPU, unless the daemon as a whole hung.

    Every method raises `GpuTransientError` if the daemon does not answer or fails,
    `GpuPermissionError` if socket, token, scope or NVML forbid the request, `GpuNotSupportedError`
    if the daemon or the GPU has no such thing, `GpuArgumentError` for a value NVML refuses,
    `GpuUnavailableError` for a GPU the daemon does not see and `GpuLostError` for one that is gone.
    """

    def __init__(self, socket_path: str, token_path: str = "", timeout_s: float = 2.0) -> None:
        if len(os.fsencode(socket_path)) > _MAX_SOCKET_PATH_BYTES:
            raise GpuNotSupportedError(
                f"socket_path {socket_path} has more than the {_MAX_SOCKET_PATH_BYTES} bytes that "
                "a Unix socket's path may have: put a symbolic link to its folder somewhere shorter"
            )
        self.socket_path = socket_path
        self.token_path = token_path
        self._timeout_s = timeout_s

    def discover(self) -> Discovery:
        """The daemon's GPUs and settings; needs no token."""
        return self._parsed("/discover", self._request("GET", "/discover", token=""), _discovery)

    def whoami_scopes(self) -> tuple[str, ...] | None:
        """The API groups that our token opens; None if the daemon asks for no tokens."""
        reply = self._request("GET", "/auth/whoami", token=self._token())
        if reply.status == 404:
            return None
        return self._parsed("/auth/whoami", reply, _scopes)

    def check_control(self) -> None:
        """Raise what keeps us from setting clocks, as far as can be told without setting any.

        Whether NVML lets the daemon itself do so, only a write will show.
        """
        if CONTROL_GROUP not in self.discover().enabled_groups:
            raise GpuNotSupportedError(
                f"zeusd on {self.socket_path}: API group {CONTROL_GROUP} is off; {CONTROL_IS_OFF}"
            )
        scopes = self.whoami_scopes()
        if scopes is not None and CONTROL_GROUP not in scopes:
            raise GpuPermissionError(
                f"zeusd on {self.socket_path}: the token in {self.token_path} has the scopes "
                f"[{', '.join(scopes)}], not {CONTROL_GROUP}: issue one that has it"
            )

    def lock_sm_clocks(self, index: int, min_mhz: int, max_mhz: int) -> None:
        """Lock GPU `index`'s SM clock into a range, in MHz."""
        self._write("set_gpu_locked_clocks", index, min_clock_mhz=min_mhz, max_clock_mhz=max_mhz)

    def reset_sm_clocks(self, index: int) -> None:
        """Return GPU `index` to default SM clocks."""
        self._write("reset_gpu_locked_clocks", index)

    def set_power_limit(self, index: int, limit_w: float) -> None:
        """Set GPU `index`'s power limit, in W."""
        self._write("set_power_limit", index, power_limit_mw=round(limit_w * 1000))

    def _write(self, name: str, index: int, **fields: int) -> None:
        query = "".join(f"{field}={value}&" for field, value in fields.items())
        # Without `block` the daemon answers before it has tried, and failures go to its log only.
        route = f"/gpu/{name}?gpu_ids={index}&{query}block=true"
        reply = self._request("POST", route, token=self._token())
        if reply.status != 200:
            raise refused(f"POST {route}", self.socket_path, reply)

    def _parsed(self, route: str, reply: Reply, parse: Callable[[Any], T]) -> T:
        if reply.status != 200:
            raise refused(f"GET {route}", self.socket_path, reply)
        try:
            return parse(json.loads(reply.body))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise GpuNotSupportedError(
                f"zeusd on {self.socket_path}: GET {route} gave {reply_text(reply)!r}, which zeusd "
                "does not: check socket_path, and upgrade zeusd"
            ) from None

    def _token(self) -> str:
        return _read_token(self.token_path) if self.token_path else ""

    def _request(self, method: str, route: str, *, token: str) -> Reply:
        try:
            return exchange(self.socket_path, method, route, token=token, timeout_s=self._timeout_s)
        except (OSError, ValueError) as error:
            where = f"{method} {route}", self.socket_path, self._timeout_s
            raise not_answered(*where, error) from None


class ZeusdWriter:
    """Sets one GPU's clocks through the daemon, whose number for it is `index`.

    A `ClockWriter`; its methods raise what `ZeusdClient`'s do.
    """

    @classmethod
    def for_device(cls, client: ZeusdClient, uuid: str, devices: Sequence[LocalGpu]) -> ZeusdWriter:
        """The writer for the GPU `uuid`, one of `devices`, which are all that local NVML lists.

        Raises `GpuUnavailableError` if it is not among them, and what `resolve_index` does.
        """
        for device in devices:
            if device.uuid == uuid:
                return cls(client, _resolve_device(client, device, len(devices)))
        raise GpuUnavailableError(
            f"GPU {uuid} is not on this node, or not visible to this process; `nvidia-smi -L` "
            "lists those that are"
        )

    def __init__(self, client: ZeusdClient, index: int) -> None:
        self._client = client
        self._index = index

    def target(self) -> dict[str, object]:
        """How another process finds the same GPU: the daemon's part of a restore target."""
        return {
            "backend": "zeusd",
            "path": self._client.socket_path,
            "index": self._index,
            "token_path": self._client.token_path,
        }

    def lock_sm_clocks(self, min_mhz: int, max_mhz: int) -> None:
        """Lock the SM clock into a range, in MHz."""
        self._client.lock_sm_clocks(self._index, min_mhz, max_mhz)

    def reset_sm_clocks(self) -> None:
        """Return to default SM clocks."""
        self._client.reset_sm_clocks(self._index)

    def set_power_limit(self, limit_w: float) -> None:
        """Set the power limit, in W."""
        self._client.set_power_limit(self._index, limit_w)


def resolve_index(
    client: ZeusdClient, *, pci_address: str | None, index: int, model: str | None, count: int
) -> int:
    """The daemon's number for the GPU that local NVML has at `pci_address` and calls `index`.

    By PCI address, because NVML in a container may see, and so number, fewer GPUs than the daemon.
    Where either side has none, by index, if the daemon has as many GPUs (`count`) and the same
    `model` there. Raises `GpuNotSupportedError` if that does not settle it, and what
    `ZeusdClient.discover` does.
    """
    gpus = client.discover().gpus
    if pci_address is not None and any(gpu.pci_address for gpu in gpus):
        wanted = normalised_pci_address(pci_address)
        for gpu in gpus:
            if gpu.pci_address and normalised_pci_address(gpu.pci_address) == wanted:
                return gpu.id
        raise GpuNotSupportedError(
            f"zeusd on {client.socket_path} has no GPU at {wanted}, only at "
            f"{', '.join(str(gpu.pci_address) for gpu in gpus)}: let zeusd see all GPUs of the host"
        )
    if (
        model is not None
        and len(gpus) == count
        and any((gpu.id, gpu.model) == (index, model) for gpu in gpus)
    ):
        return index
    raise GpuNotSupportedError(
        f"zeusd on {client.socket_path} gives no PCI addresses, and its GPUs "
        f"[{', '.join(str(gpu.model) for gpu in gpus)}] do not settle which is our GPU {index} of "
        f"{count} ({model}): upgrade zeusd"
    )


def normalised_pci_address(address: str) -> str:
    """A PCI address as `lspci -D` writes it: NVML's has 8 digits of domain, and capitals."""
    domain, _, rest = address.strip().lower().partition(":")
    return f"{domain.lstrip('0'):0>4}:{rest}"


def _resolve_device(client: ZeusdClient, device: LocalGpu, count: int) -> int:
    return resolve_index(
        client,
        pci_address=device.pci_address,
        index=device.index,
        model=device.model,
        count=count,
    )


def _scopes(body: dict[str, Any]) -> tuple[str, ...]:
    return tuple(body["scopes"])


def _discovery(body: dict[str, Any]) -> Discovery:
    if "gpus" in body:
        gpus = [
            ZeusdGpu(int(gpu["id"]), gpu.get("name"), gpu.get("pci_address"))
            for gpu in body["gpus"]
        ]
    else:
        gpus = [ZeusdGpu(int(index), None, None) for index in body["gpu_ids"]]
    auth_required = body.get("auth_required", False)
    return Discovery(tuple(gpus), tuple(body["enabled_api_groups"]), auth_required)


def _read_token(path: str) -> str:
    try:
        # Not blocking: a FIFO would keep us for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise GpuPermissionError(
            f"token_path {path}: {error.strerror}: it must name a file that this user may read"
        ) from None
    try:
        mode = os.fstat(fd).st_mode
        content = os.read(fd, _MAX_TOKEN_BYTES) if stat.S_ISREG(mode) else b""
    finally:
        os.close(fd)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise GpuPermissionError(
            f"token_path {path} is open to every user (mode {stat.S_IMODE(mode):o}): chmod 640 it, "
            "or give a Kubernetes secret defaultMode 0440"
        )
    token = content.decode("ascii", "replace").strip()
    if not token or any(not "!" <= character <= "~" for character in token):
        raise GpuPermissionError(f"token_path {path}: it must be a file that holds one token")
    return token
