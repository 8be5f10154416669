"""The options of a command that needs requests: a trace, or a generated workload."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from agft_ray.errors import AgftError, ConfigError
from agft_ray.workloads.requests import Request

DEFAULT_WORKLOAD = "conversation"
DEFAULT_RATE_PER_S = 1.5


def add_workload_options(parser: argparse.ArgumentParser, *, several_seeds: bool = False) -> None:
    """Add --trace or --workload, and what goes with them."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--trace",
        metavar="FILE",
        help="a path, or a name in $AGFT_RAY_DATA/traces: Azure CSV, Mooncake JSON lines, or CSV "
        "of arrival_time_ns,input_toks,output_toks",
    )
    source.add_argument(
        "--workload",
        default=DEFAULT_WORKLOAD,
        metavar="NAME",
        help=f"generated: {DEFAULT_WORKLOAD} (the default), poisson, gamma_burst, day_night, or "
        "one of AGFT's five: normal_load, long_context, long_generation, high_concurrency, "
        "high_cache_hit",
    )
    parser.add_argument(
        "--keep", type=float, default=1.0, metavar="SHARE", help="of the requests, default: 1, all"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests per simulated second of the generated workload, "
        f"default: {DEFAULT_RATE_PER_S:g}",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the generated workload, such as cv=4; repeatable",
    )
    if several_seeds:
        parser.add_argument("--seed", default="0", help="0..9 or 0,3,5; default: 0")
    else:
        parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip-broken", action="store_true", help="pass over broken trace lines, naming them"
    )


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to send, and what is known of them beforehand."""

    count: int
    last_arrival_s: float
    requests: Iterable[Request]


def checked_workload(arguments: argparse.Namespace, duration_s: float | None) -> Workload:
    """The requests that the options name.

    The workload is gone through once before anything is sent, so that a broken line is found first.
    Raises `AgftError` for what is wrong with the options or the trace.
    """
    count, last_arrival_s = 0, 0.0
    for request in workload(arguments, duration_s, tell=True):
        count, last_arrival_s = count + 1, request.arrival_s
    return Workload(count, last_arrival_s, workload(arguments, duration_s, tell=False))


def workload(
    arguments: argparse.Namespace, duration_s: float | None, *, tell: bool
) -> Iterable[Request]:
    """The requests that the options name; `tell`: name skipped lines on standard error."""
    from agft_ray.workloads.generators import thin, until
    from agft_ray.workloads.traces import find_trace, open_trace

    def on_skip(message: str) -> None:
        if tell:
            print(f"skipped: {message}", file=sys.stderr)

    refuse_unused(arguments)
    try:
        if arguments.trace is None:
            if duration_s is None:
                raise AgftError("--duration: required, the generated workload has no end")
            return until(_generated(arguments), duration_s)
        strict = not arguments.skip_broken
        trace = open_trace(find_trace(arguments.trace), strict=strict, on_skip=on_skip)
        kept = thin(trace, arguments.keep, arguments.seed)
        return kept if duration_s is None else until(kept, duration_s)
    except ValueError as error:
        raise AgftError(str(error)) from None


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` for settings of the generated workload beside a trace."""
    given = {"--rate": arguments.rate is not None, "--param": bool(arguments.param)}
    problems = [
        f"{option}: sets the generated workload, and --trace names another; leave it out, or use "
        "--keep for a share of the trace"
        for option, is_given in given.items()
        if arguments.trace is not None and is_given
    ]
    if problems:
        raise ConfigError("workload", problems)


def rate_per_s(arguments: argparse.Namespace) -> float:
    """Requests per simulated second of the generated workload."""
    return DEFAULT_RATE_PER_S if arguments.rate is None else float(arguments.rate)


def _generated(arguments: argparse.Namespace) -> Iterable[Request]:
    from agft_ray.workloads.generators import generate

    settings = {"rate_per_s": rate_per_s(arguments), "seed": arguments.seed}
    return generate(arguments.workload, **settings | parse_parameters(arguments.param))


def parse_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """`["cv=4", ...]` as a dictionary, values read as YAML; raises `ConfigError` for others."""
    parameters: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            parameters[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not (key and equals):
            problems.append(f"--param: must be KEY=VALUE, got {pair!r}")
    if problems:
        raise ConfigError("workload", problems)
    return parameters
