"""The command `agft-ray doctor`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    doctor = commands.add_parser(
        "doctor",
        help="say whether this node's GPUs can be tuned",
        description="Say what is known of this node's GPUs, and whether `mode: control` would work "
        "on them (exit status 0 if so, else 1). Changes nothing without --probe-clocks.",
    )
    doctor.add_argument(
        "--gpu", action="append", default=[], metavar="UUID", help="only this one; repeatable"
    )
    doctor.add_argument("--zeusd", metavar="SOCKET", help="judge `gpu: {kind: zeusd}` with this")
    doctor.add_argument("--zeusd-token", default="", metavar="FILE", help="where zeusd wants one")
    doctor.add_argument("--actuator", choices=["sm_clock", "power_limit"], default="sm_clock")
    doctor.add_argument("--lease-dir", metavar="DIR")
    doctor.add_argument(
        "--probe-clocks",
        action="store_true",
        help="lock and reset each GPU's clocks, under a lease and a guard, and time it",
    )
    doctor.add_argument("--json", action="store_true", help="print the same facts as JSON")
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from agft_ray.doctor.examine import Question, examine
    from agft_ray.doctor.text import lines
    from agft_ray.types import Actuator

    actuator = Actuator(arguments.actuator)
    if arguments.probe_clocks and actuator is not Actuator.SM_CLOCK:
        raise ConfigError("doctor", ["--probe-clocks: it locks SM clocks; leave out --actuator"])
    findings = examine(
        Question(
            gpus=tuple(arguments.gpu),
            zeusd_socket=arguments.zeusd,
            zeusd_token_path=arguments.zeusd_token,
            lease_dir=arguments.lease_dir,
            actuator=actuator,
            probe_clocks=arguments.probe_clocks,
        )
    )
    if arguments.json:
        print(json.dumps(findings.as_json(), indent=2))
    else:
        print("\n".join(lines(findings)))
    return 0 if findings.can_control else 1
