"""The command `agft-ray simulate`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agft_ray import __version__
from agft_ray.cli.goal_options import add_goal_options, goal_values
from agft_ray.cli.names import Names, scenario_values
from agft_ray.cli.uncertainty_options import (
    add_uncertainty_options,
    list_worlds,
    profile_values,
    run_several,
    runs_several,
)
from agft_ray.cli.workload_options import (
    add_workload_options,
    parse_parameters,
    rate_per_s,
    refuse_unused,
)
from agft_ray.config import parse
from agft_ray.errors import AgftError, ConfigError

if TYPE_CHECKING:
    from agft_ray.study.policy_specs import PolicySpec
    from agft_ray.study.pool import Pool
    from agft_ray.study.scenario import Scenario
    from agft_ray.study.study import Study

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MakeRayPool = Callable[[], "Pool"]

DESCRIPTION = (
    "Run policies over a workload in virtual time, with the same loop, windows and engine core as "
    "under Ray, and compare them with default clocks, which always run."
)
EPILOG = (
    "`agft-ray policies` says what each policy does, and which are known in hindsight only; "
    "`agft-ray policies NAME` lists its settings. Figures and files: docs/evaluation.md."
)
POLICY_HELP = (
    "repeatable, default: phases. One of: %(choices)s. A clock as in fixed:1230, three as in "
    "pair:1500/1230/210 (prefill/decode/idle), settings as in agft:alpha=2,seed=3, a policy of "
    "your own as in my_pkg.mod:MyPolicy:key=value"
)


def _policy_names() -> list[str]:
    from agft_ray.policy.imported import entry_points
    from agft_ray.study.policy_specs import SEARCHES, policies

    return [*policies(), *entry_points(), *SEARCHES]


def add_command(commands: Commands, *, ray_pool: MakeRayPool) -> None:
    """Add it to the parser; `ray_pool` makes the pool of --ray."""
    simulate = commands.add_parser(
        "simulate",
        help="compare policies in virtual time",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    simulate.add_argument(
        "--gpu", default="rtx_a6000", help="profile: its name (default: rtx_a6000), or a YAML file"
    )
    simulate.add_argument(
        "--model", default="llama-3.1-8b", help="one of the profile's, default: llama-3.1-8b"
    )
    simulate.add_argument(
        "--policy",
        action="append",
        default=[],
        choices=Names(_policy_names),
        metavar="NAME",
        help=POLICY_HELP,
    )
    add_workload_options(simulate, several_seeds=True)
    simulate.add_argument("--duration", type=float, metavar="S", help="simulated seconds")
    _add_fleet_options(simulate)
    add_goal_options(simulate)
    _add_search_options(simulate)
    add_uncertainty_options(simulate)
    _add_output_options(simulate)
    simulate.set_defaults(command=_simulate, ray_pool=ray_pool)


def _add_fleet_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--router",
        default="power_of_two",
        choices=Names(lambda: scenario_values("router")),
        metavar="NAME",
        help="how requests find a replica: %(choices)s; default: %(default)s",
    )
    parser.add_argument("--engine", metavar="K=V,...", help="as in max_num_seqs=64")
    parser.add_argument(
        "--window", type=float, default=2.0, metavar="S", help="a tuner's window, default: 2"
    )
    parser.add_argument(
        "--no-sharing", action="store_true", help="replicas do not share what they learn"
    )


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock-step-mhz",
        type=int,
        default=90,
        metavar="MHZ",
        help="of frontier and best_static, default: 90",
    )
    parser.add_argument(
        "--oracle-step-mhz",
        type=int,
        default=30,
        metavar="MHZ",
        help="grid of oracle_pair's clocks, default: 30",
    )
    parser.add_argument(
        "--oracle-objective",
        choices=["edp", "energy"],
        default="edp",
        help="what oracle_pair has the least of within the latency bounds, default: edp",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=int, metavar="N", help="processes; default: one a core. Results are the same"
    )
    where.add_argument("--ray", action="store_true", help="spread runs over a Ray cluster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a record of each run")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="records, and rows of requests and windows"
    )
    parser.add_argument("--details", action="store_true", help="print every figure")


def scenario_of(arguments: argparse.Namespace) -> Scenario:
    """The scenario that the options name; raises `ConfigError` with every problem found."""
    from agft_ray.study.policy_specs import parse_settings
    from agft_ray.study.scenario import Scenario

    refuse_unused(arguments)
    engine = parse_settings(arguments.engine, source="--engine") if arguments.engine else {}
    values = {
        "gpu": arguments.gpu,
        "model": arguments.model,
        "trace": arguments.trace,
        "workload": arguments.workload,
        "rate_per_s": rate_per_s(arguments),
        "parameters": parse_parameters(arguments.param),
        "keep": arguments.keep,
        "duration_s": arguments.duration,
        "skip_broken": arguments.skip_broken,
        "replicas": arguments.replicas,
        "router": arguments.router,
        "engine": engine,
        "window_s": arguments.window,
        "share_experience": not arguments.no_sharing,
        "profile_values": profile_values(arguments.set),
        "noise": arguments.noise,
    } | goal_values(arguments)
    scenario = parse(Scenario, values, source="simulate")
    scenario.engine.for_model(scenario.profile().model_profile(scenario.model))
    return scenario


def specs_of(arguments: argparse.Namespace, scenario: Scenario) -> list[PolicySpec]:
    """The policies that are named, each once, and `phases` if none is."""
    from agft_ray.study.policy_specs import parse_policy

    labels = list(dict.fromkeys(arguments.policy)) or ["phases"]
    specs = [parse_policy(label, scenario.slo) for label in labels]
    arms = scenario.profile().supported_sm_clocks_mhz
    for spec in specs:
        if spec.settings is not None:
            _refuse_clocks(spec, arms)
    return specs


def _refuse_clocks(spec: PolicySpec, arms: Sequence[int]) -> None:
    """A clock outside the GPU's range cannot be set; one within is moved to its list."""
    problems = [
        f"{name}: {value} is outside what the GPU supports, {arms[0]}..{arms[-1]} MHz"
        for name, value in dict(spec.settings or ()).items()
        if name.endswith("sm_clock_mhz") and isinstance(value, int)
        if not arms[0] <= value <= arms[-1]
    ]
    if problems:
        raise ConfigError(f"--policy {spec.label}", problems)


def _simulate(arguments: argparse.Namespace) -> int:
    from agft_ray.study.console import print_study, wide_console
    from agft_ray.study.policy_specs import parse_seeds
    from agft_ray.study.pool import local_pool, process_count
    from agft_ray.study.study import Study

    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConfigError("simulate", [f"--jobs: must be at least 1, got {arguments.jobs}"])
    if arguments.list_worlds:
        return list_worlds(arguments)
    several = runs_several(arguments)
    scenario = scenario_of(arguments)
    study = Study(
        scenario=scenario,
        specs=specs_of(arguments, scenario),
        seeds=parse_seeds(arguments.seed),
        folder=arguments.out,
        clock_step_mhz=arguments.clock_step_mhz,
        oracle_step_mhz=arguments.oracle_step_mhz,
        oracle_objective=arguments.oracle_objective,
        processes=1 if arguments.ray else process_count(arguments.jobs),
    )
    _check_trace(scenario, study.seeds[0])
    pool = arguments.ray_pool() if arguments.ray else local_pool(arguments.jobs)
    if several:
        return run_several(study, arguments, pool)
    interrupted = _run(study, pool)
    _write(study, arguments, interrupted)
    print_study(study.records, study.notes, wide_console(), details=arguments.details)
    return 130 if interrupted else 0


def _check_trace(scenario: Scenario, seed: int) -> None:
    """Go through the requests once, so that a broken line is found before anything runs."""

    def on_skip(message: str) -> None:
        print(f"skipped: {message}", file=sys.stderr)

    if not sum(1 for _ in scenario.requests(seed, on_skip)):
        raise AgftError("no request arrives within --duration; lengthen it, or raise --keep")


def _run(study: Study, pool: Pool) -> bool:
    """Run it; True if it was interrupted, with what was finished in its records."""
    from agft_ray.study.console import study_progress

    try:
        with study_progress(study.scenario.duration_s) as on_phase:
            study.run(pool, on_phase)
    except KeyboardInterrupt:
        study.notes.append("Interrupted: only what was finished by then is shown and written.")
        return True
    return False


def _write(study: Study, arguments: argparse.Namespace, interrupted: bool) -> None:
    from agft_ray.files import RUNS_FILE, STUDY_FILE, write_json
    from agft_ray.results.record import write_runs

    if arguments.json is not None:
        write_runs(arguments.json, study.records)
    if arguments.out is not None:
        write_runs(arguments.out / RUNS_FILE, study.records)
        about = manifest(study, ["agft-ray", *arguments.argv], interrupted)
        write_json(arguments.out / STUDY_FILE, about)


def manifest(study: Study, command: Sequence[str], interrupted: bool) -> dict[str, Any]:
    """What was run and with what: all that repeats it."""
    import numpy as np

    return {
        "command": list(command),
        "scenario": json.loads(study.scenario.model_dump_json()),
        "policies": [spec.label for spec in study.specs],
        "seeds": list(study.seeds),
        "versions": {
            "agft_ray": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "interrupted": interrupted,
        "notes": study.notes,
    }
