"""`agft-ray status`: what the tuners of a running Ray cluster do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from agft_ray.actors import status_reader
from agft_ray.errors import AgftError
from agft_ray.telemetry.status import TunerState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TROUBLE = (
    TunerState.GPU_LOST,
    TunerState.UNAVAILABLE,
    TunerState.REFUSED,
    TunerState.FAULT,
)
"""States in which a tuner cannot do what it was told to."""
UNKNOWN = "-"
COLUMNS = (
    "deployment",
    "replica",
    "role",
    "mode",
    "state",
    "policy",
    "GPU",
    "locked",
    "SM clock",
    "power",
    "running",
    "waiting",
    "windows",
)
LEFT_OUT = ("mode", "role", "GPU", "windows", "deployment", "waiting", "running")
"""Of the columns, in this order, where a terminal is too narrow for all."""
PLAIN_WIDTH = 200
"""Columns where there is no terminal, unless `COLUMNS` says otherwise."""


def add_command(commands: Commands) -> None:
    """Add it to the parser; a command returns its exit status."""
    status = commands.add_parser(
        "status",
        help="what the tuners of a running Ray cluster do",
        description="Show each replica's tuner: role, state, clocks, power, load. Exit status 1 if "
        "one of them is in trouble, 2 if there is no cluster or no tuner in it.",
    )
    status.add_argument(
        "--address", default="auto", help="of the Ray cluster; default: this node's"
    )
    status.add_argument("--application", help="only this Serve application")
    status.add_argument("--all", action="store_true", help="replicas that have ended, too")
    status.add_argument("--json", action="store_true", help="one JSON object per reading")
    status.add_argument("--watch", type=float, metavar="S", help="again every S seconds")
    status.set_defaults(command=_status)


def _status(arguments: argparse.Namespace) -> int:
    if arguments.watch is not None and not arguments.watch > 0:
        raise AgftError(f"--watch: {arguments.watch:g} is not a positive number of seconds")
    found = status_reader.readings(arguments.address)
    readings = ([each for each in all_ if _is_asked_for(each, arguments)] for all_ in found)
    if arguments.json:
        return _print_json(readings, arguments.watch)
    return _print_tables(readings, arguments.watch)


def _is_asked_for(status: dict[str, Any], arguments: argparse.Namespace) -> bool:
    application = str(status["deployment"]).partition("#")[0]
    if arguments.application not in (None, application):
        return False
    return bool(arguments.all or status["alive"])


def _print_json(readings: Iterator[list[dict[str, Any]]], watch_s: float | None) -> int:
    for statuses in readings:
        print(json.dumps({"t_s": time.time(), "replicas": statuses}), flush=True)
        if watch_s is None:
            return exit_status(statuses)
        time.sleep(watch_s)
    raise AssertionError("readings do not end")


def _print_tables(readings: Iterator[list[dict[str, Any]]], watch_s: float | None) -> int:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH

    def show(statuses: Sequence[dict[str, Any]]) -> Group:
        return Group(table(statuses, console), *notes(statuses), totals(statuses))

    if watch_s is None:
        statuses = next(readings)
        if not statuses:
            raise AgftError("no tuner of this cluster is alive, or none that was asked for")
        console.print(show(statuses))
        return exit_status(statuses)
    with Live(console=console, auto_refresh=False) as live:
        for statuses in readings:
            live.update(show(statuses), refresh=True)
            time.sleep(watch_s)
    raise AssertionError("readings do not end")


def exit_status(statuses: Sequence[dict[str, Any]]) -> int:
    """1 if a tuner is in trouble, 2 if there is none, else 0."""
    return int(any(status["state"] in TROUBLE for status in statuses)) if statuses else 2


def table(statuses: Sequence[dict[str, Any]], console: Console) -> Table:
    """A row for each replica, in as many columns as `console` has room for; what is not known is
    "-"."""
    unlimited = console.options.update(max_width=sys.maxsize)
    for left_out in range(len(LEFT_OUT)):
        shown = _table(statuses, without=LEFT_OUT[:left_out])
        if console.measure(shown, options=unlimited).maximum <= console.width:
            return shown
    return _table(statuses, without=LEFT_OUT)


def _table(statuses: Sequence[dict[str, Any]], without: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    shown = Table(*(name for name in COLUMNS if name not in without), box=box.SIMPLE_HEAD)
    for status in sorted(statuses, key=lambda s: (s["deployment"], str(s["rank"]), s["replica"])):
        named = zip(COLUMNS, _cells(status), strict=True)
        cells = [cell for name, cell in named if name not in without]
        shown.add_row(*cells, style="" if status["alive"] else "dim")
    return shown


def notes(statuses: Sequence[dict[str, Any]]) -> list[str]:
    """Why a tuner does not do what it was told to, one line each."""
    lines = []
    for status in statuses:
        reason = status.get("config_error") or status.get("reason")
        if reason:
            lines.append(f"{status['replica']}: {reason}")
    return lines


def totals(statuses: Sequence[dict[str, Any]]) -> str:
    """The fleet in a line."""
    powers_w = [status["power_w"] for status in statuses if status.get("power_w") is not None]
    tuned = sum(status["state"] == TunerState.TUNING for status in statuses)
    held_out = sum(status["role"] == "holdout" for status in statuses)
    trouble = sum(status["state"] in TROUBLE for status in statuses)
    power = f"{sum(powers_w):,.0f} W" if powers_w else UNKNOWN
    return (
        f"{len(statuses)} replicas: {tuned} tuned, {held_out} held out, {trouble} in trouble; "
        f"{power} in all"
    )


def _cells(status: dict[str, Any]) -> list[str]:
    return [
        str(status["deployment"]),
        str(status["replica"]),
        str(status["role"]),
        str(status["mode"]),
        str(status["state"]) if status["alive"] else "ended",
        str(status.get("policy", UNKNOWN)),
        _gpu(status),
        _locked(status) if "power_w" in status else UNKNOWN,
        _number(status.get("sm_clock_mhz"), "MHz"),
        _number(status.get("power_w"), "W"),
        _number(status.get("running")),
        _number(status.get("waiting")),
        _number(status.get("windows")),
    ]


def _locked(status: dict[str, Any]) -> str:
    """A plan of several clocks as prefill/decode/idle: which of them is locked now says little."""
    plan = status.get("plan", ())
    if len(set(plan)) > 1:
        return "/".join(str(arm or "default") for arm in plan)
    if status.get("actuator") == "power_limit":
        return _number(status.get("power_limit_w"), "W", none="none")
    return _number(status.get("locked_sm_clock_mhz"), "MHz", none="default")


def _gpu(status: dict[str, Any]) -> str:
    uuids = str(status.get("gpu_uuid", "")).split(",")
    if not uuids[0]:
        return UNKNOWN
    name = uuids[0] if len(uuids[0]) <= 16 else f"{uuids[0][:12]}…"
    return name if len(uuids) == 1 else f"{name} +{len(uuids) - 1}"


def _number(value: float | None, unit: str = "", *, none: str = UNKNOWN) -> str:
    return none if value is None else f"{value:,.0f} {unit}".strip()
