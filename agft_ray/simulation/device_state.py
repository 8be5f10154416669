"""All that changes about a simulated GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from agft_ray.simulation.physics import StepWork


@dataclass(slots=True)
class DeviceState:
    """A `Device`'s clocks, step, energy and counter at one moment."""

    seed: int
    t_s: float = 0.0
    energy_j: float = 0.0
    sm_clock_mhz_s: float = 0.0
    """Integral of the effective SM clock."""
    counter_t_s: float = 0.0
    counter_energy_j: float = 0.0
    locked_sm_clock_mhz: int | None = None
    """The lock last asked for."""
    active_lock_mhz: int | None = None
    """The lock in force, which follows the one asked for after the delay."""
    pending_clock_changes: list[tuple[float, int | None]] = field(default_factory=list)
    clock_calls: int = 0
    idle_since_s: float = 0.0
    work: StepWork | None = None
    steps: int = 0
    """How many have begun since the start."""
    step_factor: float = 1.0
    """Noise of the step in progress: how long it takes, relative to a step without."""
    progress: float = 0.0
    """Share of the step done at `progress_t_s`, when it began or its clock last changed."""
    progress_t_s: float = 0.0

    def to_values(self) -> dict[str, Any]:
        """As JSON-able values."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values["pending_clock_changes"] = [list(change) for change in self.pending_clock_changes]
        values["work"] = None if self.work is None else asdict(self.work)
        return values

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DeviceState:
        """From what `to_values` gave, among others; missing ones are as at the start."""
        values = {name: values[name] for name in _FIELDS if name in values}
        if values.get("work") is not None:
            values["work"] = StepWork(**values["work"])
        pending = values.get("pending_clock_changes", [])
        values["pending_clock_changes"] = [(t_s, clock) for t_s, clock in pending]
        return cls(**values)


_FIELDS = tuple(f.name for f in fields(DeviceState))
