"""The command `agft-ray calibrate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import AgftError, ConfigError

if TYPE_CHECKING:
    from agft_ray.calibration.calibrate import Calibration
    from agft_ray.calibration.card import OwnBase
    from agft_ray.calibration.csv_table import CsvTable
    from agft_ray.calibration.load_fit import LoadCalibration
    from agft_ray.simulation.profiles import GpuProfile

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

KEEP = ("product", "clocks", "cap_w", "kv_blocks", "host_ms", "all")


def add_command(commands: Commands) -> None:
    """Add it to the parser; it returns its exit status."""
    calibrate = commands.add_parser(
        "calibrate",
        help="fit a simulated GPU's profile to your own measurements",
        description="Fit power and times of a GPU profile to a CSV file: single steps "
        "(sm_clock_mhz, power_w of one GPU, step_ms or tpot_ms, batch, and where known "
        "context_tokens, prefill_tokens, phase), or a load test of a server (sm_clock_mhz, "
        "rate_per_s, prompt_tokens, output_tokens, and what was measured of power_w of the group, "
        "ttft_mean_s, ttft_p50_s, ttft_p99_s and the same of tpot). What the file does not "
        "identify stays as in the base profile, and is marked; see docs/calibrate.md.",
    )
    calibrate.add_argument("file", type=Path, help="the measurements")
    calibrate.add_argument("--base", required=True, metavar="PROFILE", help="a name or a YAML file")
    calibrate.add_argument("--model", required=True, help="the base profile's, or --card's")
    calibrate.add_argument("--out", type=Path, metavar="YAML", help="the new profile")
    calibrate.add_argument("--name", help="of the new profile (default: the file's)")
    calibrate.add_argument(
        "--check",
        action="store_true",
        help="fit nothing: print how far the base is off, line by line",
    )
    _add_card_options(calibrate)
    _add_kind_options(calibrate)
    calibrate.set_defaults(command=_calibrate)


def _add_card_options(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument(
        "--card",
        type=Path,
        metavar="YAML",
        help="what cannot be fitted: product, memory_mib, cap_w, clocks, a model's sizes",
    )
    calibrate.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=KEEP,
        help="what may stay the base card's; `all` where it is the same card and machine",
    )


def _add_kind_options(calibrate: argparse.ArgumentParser) -> None:
    calibrate.add_argument(
        "--observed-clocks",
        action="store_true",
        help="of single steps: sm_clock_mhz is what the GPU ran at, also under its power cap",
    )
    calibrate.add_argument(
        "--arrivals",
        choices=("poisson", "even"),
        default="poisson",
        help="of a load test: how its requests arrived (default: %(default)s)",
    )
    calibrate.add_argument(
        "--requests",
        type=int,
        default=200,
        metavar="N",
        help="of a load test: simulated for each line, three times (default: %(default)s)",
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    from agft_ray.calibration.card import Card, load_card, own_base
    from agft_ray.calibration.csv_table import read_table
    from agft_ray.calibration.load_table import is_load_table
    from agft_ray.simulation.profiles import load_gpu_profile

    if problems := _option_problems(arguments):
        raise ConfigError("calibrate", problems)
    base = load_gpu_profile(arguments.base)
    table = read_table(arguments.file)
    is_load = is_load_table(table)
    card = Card() if arguments.card is None else load_card(arguments.card)
    keep = ["all"] if arguments.check else arguments.keep
    own = own_base(base, arguments.model, card, keep, measures_host=is_load)
    work = _load_test if is_load else _steps
    try:
        unused, calibration = work(table, own.profile, arguments)
    except ConfigError as error:
        if error.source.startswith(str(arguments.file)):
            raise
        raise ConfigError(f"{arguments.file}: {error.source}", error.problems) from None
    if unused:
        print(f"columns not used: {', '.join(unused)}")
    if calibration is not None:
        _write(calibration, own, arguments)
    return 0


def _option_problems(arguments: argparse.Namespace) -> list[str]:
    problems = []
    if arguments.check:
        if arguments.out is not None:
            problems.append(f"--out: {arguments.out} is not written with --check; leave one out")
        if arguments.keep:
            problems.append("--keep: --check keeps all that --card does not state; leave it out")
    elif arguments.out is None:
        problems.append("--out: required, the .yaml file to write; or --check, which fits nothing")
    elif arguments.out.suffix not in {".yaml", ".yml"}:
        problems.append(f"--out: {arguments.out} must end in .yaml")
    if arguments.requests < 20:
        problems.append(f"--requests: {arguments.requests} must be at least 20")
    return problems


def _load_test(
    table: CsvTable, base: GpuProfile, arguments: argparse.Namespace
) -> tuple[Sequence[str], LoadCalibration | None]:
    from agft_ray.calibration.load_fit import LoadTest, calibrate_load
    from agft_ray.calibration.load_table import parse_load_table
    from agft_ray.cli.calibrate_report import load_check_lines, load_fit_lines

    loads = parse_load_table(table)
    test = LoadTest(loads.rows, arguments.arrivals, arguments.requests)
    if arguments.check:
        _print(load_check_lines(test.check(base, arguments.model)))
        return loads.unused_columns, None
    calibration = calibrate_load(
        test, base, arguments.model, name=_name(arguments), progress=_progress
    )
    _print(load_fit_lines(calibration))
    return loads.unused_columns, calibration


def _steps(
    table: CsvTable, base: GpuProfile, arguments: argparse.Namespace
) -> tuple[Sequence[str], Calibration | None]:
    from agft_ray.calibration.calibrate import calibrate
    from agft_ray.calibration.measurements import parse_measurements
    from agft_ray.calibration.step_check import check_steps
    from agft_ray.cli.calibrate_report import step_check_lines, step_fit_lines

    steps = parse_measurements(table)
    if arguments.check:
        _print(step_check_lines(check_steps(steps.rows, base, arguments.model)))
        return steps.unused_columns, None
    calibration = calibrate(
        steps.rows,
        base,
        arguments.model,
        name=_name(arguments),
        observed_clocks=arguments.observed_clocks,
    )
    _print(step_fit_lines(calibration))
    return steps.unused_columns, calibration


def _name(arguments: argparse.Namespace) -> str:
    return str(arguments.name or arguments.out.stem)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _write(
    calibration: Calibration | LoadCalibration, own: OwnBase, arguments: argparse.Namespace
) -> None:
    from agft_ray.calibration.profile_text import profile_yaml

    out = arguments.out
    text = profile_yaml(calibration, arguments.file.name, own.notes)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AgftError(f"--out: {out} cannot be written: {error.strerror}") from None
    if unmeasured := text.count("not measured"):
        print(f"{unmeasured} numbers are {calibration.base}'s, not measured: marked in {out}")
    print(f"{out}: written; use it as `profile: {out}` or `--gpu {out}`")
