"""What `agft-ray simulate` may do about what is uncertain: noise, ranges and worlds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agft_ray.errors import ConfigError

if TYPE_CHECKING:
    from agft_ray.study.pool import Pool
    from agft_ray.study.study import Study

ALL = "all"


def add_uncertainty_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--noise",
        action="store_true",
        help="step times and energy counters vary as the profile's `noise` says (default: no)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a number of the GPU profile, as in clock_change.median_s=0.2; repeatable",
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--sweep-uncertainty",
        action="store_true",
        help="again at both ends of each range of the profile: does the ranking by EDP survive?",
    )
    several.add_argument(
        "--worlds",
        nargs="?",
        const=ALL,
        metavar="NAME,...",
        help="in 24 worlds within the ranges, or in those named: the median and the worst of each",
    )
    several.add_argument("--list-worlds", action="store_true", help="name them, run nothing")


def profile_values(pairs: Sequence[str]) -> dict[str, float]:
    """What --set says; raises `ConfigError` with every problem found."""
    values, problems = {}, []
    for pair in pairs:
        path, _, value = pair.partition("=")
        try:
            values[path] = float(value)
        except ValueError:
            problems.append(f"{pair!r}: must be PATH=VALUE with a number, as in power.cap_w=250")
    if problems:
        raise ConfigError("--set", problems)
    return values


def list_worlds(arguments: argparse.Namespace) -> int:
    """--list-worlds: needs neither a workload nor a policy."""
    from agft_ray.simulation.profiles import load_gpu_profile
    from agft_ray.study.console import wide_console
    from agft_ray.study.worlds import worlds_of
    from agft_ray.study.worlds_console import print_worlds

    profile = load_gpu_profile(arguments.gpu)
    profile.model_profile(arguments.model)
    worlds = worlds_of(profile, arguments.model)
    print_worlds(worlds, arguments.model, wide_console())
    return 0


def runs_several(arguments: argparse.Namespace) -> bool:
    """Whether the study is to be run more than once; raises `ConfigError` for --out beside it."""
    asked = arguments.sweep_uncertainty or arguments.worlds is not None
    if asked and arguments.out is not None:
        problem = "--out: rows are not kept where a study is run many times; --json has its records"
        raise ConfigError("simulate", [problem])
    return bool(asked)


def run_several(study: Study, arguments: argparse.Namespace, pool: Pool) -> int:
    """--sweep-uncertainty or --worlds; the exit status."""
    from agft_ray.study.console import wide_console

    if arguments.sweep_uncertainty:
        from agft_ray.study.sensitivity import sweep_and_print

        return sweep_and_print(study, pool, wide_console(), json_path=arguments.json)
    from agft_ray.study.worlds import named_worlds, worlds_of
    from agft_ray.study.worlds_console import run_and_print

    profile, model = study.scenario.profile(), study.scenario.model
    if arguments.worlds == ALL:
        worlds = worlds_of(profile, model)
    else:
        worlds = named_worlds(profile, model, arguments.worlds.split(","))
    return run_and_print(study, worlds, pool, wide_console(), json_path=arguments.json)
