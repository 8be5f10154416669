"""The node's guard (`python -m agft_ray.gpu.safety.guard --node`): resets what dead guards left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from agft_ray.errors import GpuError
from agft_ray.gpu.safety import restore
from agft_ray.gpu.safety.lease import default_directory, sweep
from agft_ray.gpu.safety.target import BACKENDS
from agft_ray.gpu.safety.waiting import poller, stop_signals


def run(arguments: Sequence[str]) -> int:
    """Reset what dead owners left, every interval until stopped; the exit status."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m agft_ray.gpu.safety.guard")
    parser.add_argument("--node", action="store_true", required=True)
    parser.add_argument("--lease-dir", default=default_directory())
    parser.add_argument("--interval-s", type=float, default=0.5)
    options = parser.parse_args(arguments)
    if not 0.01 <= options.interval_s <= 3600:
        parser.error(f"--interval-s must be from 0.01 to 3600 s, got {options.interval_s}")
    for backend in BACKENDS:
        with contextlib.suppress(GpuError):
            restore.prepare(backend)
    poll = poller(stop_signals())
    failing: set[str] = set()
    while not poll.poll(options.interval_s * 1000):
        failing = _sweep(options.lease_dir, failing)
    _sweep(options.lease_dir, failing)
    return 0


def _sweep(directory: str, failing: set[str]) -> set[str]:
    """Log each reset, and each failure that is not among the `failing`; returns what fails now."""
    try:
        outcomes = sweep(directory)
    except Exception as error:  # the service must survive what it cannot mend
        outcomes = [(directory, error)]
    failed = {uuid for uuid, outcome in outcomes if isinstance(outcome, Exception)}
    for uuid, outcome in outcomes:
        if uuid not in failing:
            with contextlib.suppress(OSError):
                words = f"NOT reset: {outcome}" if uuid in failed else outcome
                print(f"{uuid}: {words}", file=sys.stderr, flush=True)
    return failed
