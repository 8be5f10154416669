"""What the benches of this package share: CPU time by process, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW_WALL_S = 0.8
"""AGFT's period: as often as a tuner may be expected to work."""


def say(message: str) -> None:
    """Show what is being waited for, on a terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message}", end="", flush=True)


@dataclass(slots=True)
class CpuUsage:
    """CPU time by kind of process."""

    seconds: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def add(self, before: dict[int, tuple[str, float]], after: Any, elapsed_s: float) -> None:
        """Count what each process used between two readings of `cpu_seconds`."""
        self.elapsed_s += elapsed_s
        for pid, (name, seconds) in after.items():
            used = seconds - before.get(pid, (name, 0.0))[1]  # one that is new has used it all
            self.seconds[name] = self.seconds.get(name, 0.0) + used

    def __str__(self) -> str:
        shares = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {s / self.elapsed_s:.1%}" for name, s in shares if s > 0)


def cpu_seconds() -> dict[int, tuple[str, float]]:
    """CPU seconds of every Ray worker process of this user, by process id."""
    return dict(_ray_processes())


def _ray_processes() -> Iterator[tuple[int, tuple[str, float]]]:
    ticks = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if title.startswith("ray::"):
            name = title.removeprefix("ray::").split(".")[0].split(":")[0]
            yield int(entry.name), (name, (int(fields[11]) + int(fields[12])) / ticks)
