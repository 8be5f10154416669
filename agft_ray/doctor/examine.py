"""Whether this node's GPUs can be tuned by this user: what `agft-ray doctor` does.

It only reads: no setter is called, no lease taken and no file made, unless clocks are to be probed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agft_ray.clock import WallClock
from agft_ray.doctor.findings import Findings, GpuFindings, NodeFindings, Privileges, Versions
from agft_ray.errors import GpuError, GpuPermissionError, GpuUnavailableError, LeaseHeldError
from agft_ray.gpu.config import ZeusdGpuConfig
from agft_ray.gpu.identity import resolve
from agft_ray.gpu.leased import LeasedGpu
from agft_ray.gpu.nvml.backend import NvmlGpu, driver_versions, list_devices
from agft_ray.gpu.nvml.devices import DeviceInfo
from agft_ray.gpu.probe import ClockProbe, probe_clocks, watch_energy_counter
from agft_ray.gpu.safety.directory import check_directory, default_directory
from agft_ray.gpu.safety.info import LeaseInfo, leases
from agft_ray.gpu.safety.record import Paths, barred_s
from agft_ray.gpu.zeusd.backend import ZeusdClient, ZeusdWriter
from agft_ray.types import Actuator

T = TypeVar("T")

OWNER = "agft-ray doctor --probe-clocks"
DEFAULT_SOCKET = str(ZeusdGpuConfig.model_fields["socket_path"].default)


@dataclass(frozen=True, slots=True)
class Question:
    """What to examine, and under which settings `control` is to be judged."""

    gpus: tuple[str, ...] = ()
    """UUIDs, which may be abbreviated, or NVML's numbers; none: all GPUs of the node."""
    zeusd_socket: str | None = None
    """Judge `gpu: {kind: zeusd}` with this socket. None: `kind: nvml`, but zeusd for a process
    without the privilege if there is a socket at the default place."""
    zeusd_token_path: str = ""
    lease_dir: str | None = None
    actuator: Actuator = Actuator.SM_CLOCK
    probe_clocks: bool = False
    """Lock and reset the clocks of each GPU, under a lease and a guard."""


def examine(question: Question) -> Findings:
    """Look at the node and its GPUs; takes about a second for each, for its energy counter.

    Raises no `GpuError`: what fails is among the findings.
    """
    problems: list[str] = []
    attempt = functools.partial(_attempt, problems)
    versions = attempt(lambda: Versions(*driver_versions()))
    devices = attempt(list_devices) or () if versions else ()
    if not devices and not problems:
        problems.append("the driver shows no GPU to this process")
    uuids = {attempt(functools.partial(_resolved, name, devices)) for name in question.gpus}
    asked = [device for device in devices if not question.gpus or device.uuid in uuids - {None}]
    node = _node(question, versions)
    found = {} if node.lease_problem else {info.uuid: info for info in leases(node.lease_dir)}
    gpus = [
        _examine(question, node, devices, device, found.get(str(device.uuid))) for device in asked
    ]
    return Findings(node, tuple(gpus), tuple(dict.fromkeys(problems)))


def lease_problem(directory: str) -> str | None:
    """Why no lease could be taken in this directory, which need not exist; None if one could."""
    try:
        check_directory(directory)
    except GpuError as error:
        return str(error)
    place = Path(directory).absolute()
    existing = next((path for path in (place, *place.parents[:2]) if path.exists()), None)
    if existing is None or not os.access(existing, os.W_OK | os.X_OK):
        return f"lease directory {directory} cannot be made or written; set AGFT_RAY_LEASE_DIR"
    return None


def _attempt(problems: list[str], act: Callable[[], T]) -> T | None:
    try:
        return act()
    except GpuError as error:
        problems.append(str(error))
        return None


def _resolved(name: str, devices: Sequence[DeviceInfo]) -> str:
    if not devices:
        raise GpuUnavailableError(f"{name!r} is no GPU that this process can see")
    return resolve([name], devices, pci_bus_order=True)[0]


def _node(question: Question, versions: Versions | None) -> NodeFindings:
    privileges = Privileges.of_this_process()
    socket = question.zeusd_socket or DEFAULT_SOCKET
    instead = not privileges.cap_sys_admin and os.path.exists(socket)
    problems: list[str] = []
    _attempt(problems, lambda: ZeusdClient(socket, question.zeusd_token_path).check_control())
    directory = question.lease_dir or default_directory()
    return NodeFindings(
        versions=versions,
        privileges=privileges,
        kind="zeusd" if question.zeusd_socket or instead else "nvml",
        actuator=question.actuator,
        zeusd_socket=socket,
        zeusd_problem=problems[0] if problems else None,
        lease_dir=directory,
        lease_problem=lease_problem(directory),
    )


def _examine(
    question: Question,
    node: NodeFindings,
    devices: Sequence[DeviceInfo],
    device: DeviceInfo,
    lease: LeaseInfo | None,
) -> GpuFindings:
    if device.uuid is None:
        return GpuFindings(device, obstacles=(device.problem or "it does not give its UUID",))
    obstacles = [node.lease_problem] if node.lease_problem else []
    remarks = [device.problem] if device.problem else []
    attempt = functools.partial(_attempt, obstacles)
    clock, uuid = WallClock(), device.uuid
    writer = attempt(lambda: _writer(question, node, uuid, devices))
    gpu = NvmlGpu(uuid, clock=clock, writer=writer, actuator=question.actuator)
    attempt(gpu.claim)
    energy_counter = attempt(lambda: watch_energy_counter(gpu, clock))
    if energy_counter is not None:
        attempt(lambda: gpu.arms)
    probe, is_tried = None, False
    if question.probe_clocks and not obstacles:
        probe, is_tried = _probe(gpu, node.lease_dir, obstacles, remarks)
    if not is_tried:
        attempt(lambda: _check_privilege(node))
    return GpuFindings(
        device,
        energy_counter=energy_counter,
        clock_probe=probe,
        lease=lease,
        barred_s=attempt(lambda: barred_s(Paths.of(node.lease_dir, uuid))) or 0.0,
        control_is_tried=is_tried,
        obstacles=tuple(dict.fromkeys(obstacles)),
        remarks=tuple(remarks),
    )


def _writer(
    question: Question, node: NodeFindings, uuid: str, devices: Sequence[DeviceInfo]
) -> ZeusdWriter | None:
    """Who sets the GPU's clocks; None: this process, by NVML."""
    if node.kind == "nvml":
        return None
    client = ZeusdClient(node.zeusd_socket, question.zeusd_token_path)
    client.check_control()
    return ZeusdWriter.for_device(client, uuid, devices)


def _check_privilege(node: NodeFindings) -> None:
    if node.kind == "nvml" and not node.privileges.cap_sys_admin:
        raise GpuPermissionError(
            f"this process (uid {node.privileges.uid}, without CAP_SYS_ADMIN) may not set clocks"
        )


def _probe(
    gpu: NvmlGpu, lease_dir: str, obstacles: list[str], remarks: list[str]
) -> tuple[ClockProbe | None, bool]:
    """The measurement, and whether it tells if clocks can be set: a GPU in use is left alone."""
    leased = LeasedGpu([gpu], directory=Path(lease_dir), owner=OWNER)
    try:
        return probe_clocks(leased, WallClock()), True
    except LeaseHeldError as error:
        remarks.append(f"clocks were not probed: {error}")
        return None, False
    except GpuError as error:
        obstacles.append(str(error))
        return None, True
