"""The command `python -m agft_ray.gpu.restore`, and `agft-ray reset`: reset what dead owners left
locked, or, with force, what living ones have.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from agft_ray.errors import AgftError, LeaseHeldError
from agft_ray.gpu.safety import lease
from agft_ray.gpu.safety.directory import default_directory
from agft_ray.gpu.safety.target import Outcome, is_uuid

FORCED = (
    "Tuners are kept off for a minute and then come back, unless their mode is changed to observe "
    "or off."
)


def reset_gpus(directory: str, uuids: Sequence[str] | None, force: bool) -> list[Outcome]:
    """Reset what dead owners left locked; with `force`, living ones' as well.

    Args:
        directory: of the leases.
        uuids: the GPUs, or None for all that have a lease record.
        force: take the GPU from a living owner and bar it for a minute (`lease.force`); a GPU
            without a record is then reset by NVML.

    Raises `GpuError` if the directory may not be trusted; one GPU's trouble is its outcome.
    """
    if force:
        known = [info.uuid for info in lease.leases(directory)]
        return [_forced(directory, uuid) for uuid in (known if uuids is None else uuids)]
    done = lease.sweep(directory, uuids=uuids)
    for info in lease.leases(directory):
        if info.held and (uuids is None or info.uuid in uuids):
            words = f"in use by PID {info.pid} ({info.owner}), left alone; --force takes it"
            done.append((info.uuid, words if uuids is None else LeaseHeldError(words)))
    seen = {uuid for uuid, _ in done}
    done += [(uuid, "no lease, nothing to reset") for uuid in uuids or () if uuid not in seen]
    return done


def _forced(directory: str, uuid: str) -> Outcome:
    try:
        lease.force(directory, uuid)
    except AgftError as error:
        return uuid, error
    return uuid, "reset, and barred for a minute"


def add_arguments(parser: Any) -> None:
    """Of this command, and of `agft-ray reset`, which is the same."""
    parser.add_argument("uuids", nargs="*", metavar="UUID", help="GPUs")
    parser.add_argument("--all", action="store_true", help="all GPUs that have a lease")
    parser.add_argument(
        "--force", action="store_true", help=f"from living owners as well. {FORCED}"
    )
    parser.add_argument("--lease-dir", metavar="DIR", help="the directory of the leases")


def usage_problem(options: Any) -> str:
    """What is wrong with the arguments given, or ""."""
    if options.all == bool(options.uuids):
        return "either --all or UUIDs: give one of them"
    wrong = [f"{uuid!r:.80} is no GPU's UUID" for uuid in options.uuids if not is_uuid(uuid)]
    return "; ".join(wrong)


def run(options: Any) -> int:
    """Reset, and print one line a GPU; 0 when all went well, else 1."""
    directory = options.lease_dir or default_directory()
    try:
        outcomes = reset_gpus(directory, options.uuids or None, options.force)
    except AgftError as error:
        outcomes = [("leases", error)]
    for uuid, outcome in outcomes:
        print(f"{uuid}: {'NOT reset: ' if isinstance(outcome, Exception) else ''}{outcome}")
    if not outcomes:
        print(f"no leases in {directory}: nothing to reset")
    elif options.force:
        print(FORCED)
    return int(any(isinstance(outcome, Exception) for _, outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for bad usage."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m agft_ray.gpu.restore",
        description="Reset the clocks that dead owners left locked.",
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if problem := usage_problem(options):
        parser.error(problem)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
