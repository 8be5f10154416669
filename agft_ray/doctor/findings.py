"""What `agft-ray doctor` finds out about a node and its GPUs."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agft_ray.gpu.nvml.devices import DeviceInfo
from agft_ray.gpu.probe import ClockProbe, EnergyCounter
from agft_ray.gpu.safety.info import LeaseInfo
from agft_ray.types import Actuator

CAP_SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class Versions:
    """Of the driver, of NVML, and of CUDA as far as the driver supports it."""

    driver: str
    nvml: str
    cuda: str


@dataclass(frozen=True, slots=True)
class Privileges:
    """What this process may do, as far as NVML cares."""

    uid: int
    """The effective user."""
    cap_sys_admin: bool
    """Whether CAP_SYS_ADMIN is in effect: root has it, but not in an ordinary container."""

    @classmethod
    def of_this_process(cls, status_path: str = "/proc/self/status") -> Privileges:
        """By bit 21 of CapEff, or by the user alone where the kernel does not show it."""
        uid = os.geteuid()
        try:
            lines = Path(status_path).read_text(encoding="utf-8", errors="replace").splitlines()
            effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
        except (OSError, StopIteration):
            return cls(uid, uid == 0)
        return cls(uid, bool(int(effective, 16) >> CAP_SYS_ADMIN & 1))


@dataclass(frozen=True, slots=True)
class NodeFindings:
    """What holds for all GPUs of the node."""

    versions: Versions | None
    """None if NVML does not work."""
    privileges: Privileges
    kind: str
    """Which `gpu: {kind: ...}` was judged: "nvml" or "zeusd"."""
    actuator: Actuator
    """What `control` would set."""
    zeusd_socket: str
    zeusd_problem: str | None
    """Why the daemon on that socket would set no clocks."""
    lease_dir: str
    lease_problem: str | None
    """Why no lease could be taken there."""


@dataclass(frozen=True, slots=True)
class GpuFindings:
    """One GPU. None is what could not be read, or was not asked for."""

    device: DeviceInfo
    energy_counter: EnergyCounter | None = None
    clock_probe: ClockProbe | None = None
    lease: LeaseInfo | None = None
    """None also if nobody has the GPU's lease."""
    barred_s: float = 0.0
    """For how long `agft-ray reset --force` still keeps tuners off."""
    control_is_tried: bool = False
    """Whether clocks were just locked, or refused; otherwise the answer is inferred."""
    obstacles: tuple[str, ...] = ()
    """What keeps `control` from working."""
    remarks: tuple[str, ...] = ()

    @property
    def can_control(self) -> bool:
        """Whether `mode: control` would work, as far as is known."""
        return not self.obstacles


@dataclass(frozen=True, slots=True)
class Findings:
    """The answer to all that was asked."""

    node: NodeFindings
    gpus: tuple[GpuFindings, ...]
    problems: tuple[str, ...]
    """What is wrong with the node: no driver, no GPU, or not the one asked about."""

    @property
    def can_control(self) -> bool:
        """Whether `mode: control` would work on every GPU asked about."""
        return not self.problems and all(gpu.can_control for gpu in self.gpus)

    def as_json(self) -> dict[str, Any]:
        """The same facts in JSON's types."""
        facts = _plain(self)
        for gpu, found in zip(facts["gpus"], self.gpus, strict=True):
            gpu["can_control"] = found.can_control
        return {"can_control": self.can_control, **facts}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, LeaseInfo):
        return value._asdict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
