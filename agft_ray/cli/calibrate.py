"""The command `agft-ray calibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agft_ray.errors import AgftError, ConfigError

if TYPE_CHECKING:
    from agft_ray.calibration.calibrate import Calibration
    from agft_ray.calibration.fitting import Fit

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Add it to the parser; it returns its exit status."""
    calibrate = commands.add_parser(
        "calibrate",
        help="fit a simulated GPU's profile to your own measurements",
        description="Fit power and step times of a GPU profile to a CSV file with the columns "
        "sm_clock_mhz, power_w (of one GPU), step_ms or tpot_ms, batch (decoding sequences), and "
        "where known context_tokens (in their KV caches), prefill_tokens (in the step) and phase "
        "(idle, prefill or decode). What the file does not identify stays as in the base profile.",
    )
    calibrate.add_argument("file", type=Path, help="the measurements")
    calibrate.add_argument("--base", required=True, metavar="PROFILE", help="a name or a YAML file")
    calibrate.add_argument("--model", required=True, help="one of the base profile's")
    calibrate.add_argument(
        "--out", required=True, type=Path, metavar="YAML", help="the new profile"
    )
    calibrate.add_argument("--name", help="of the new profile (default: the file's)")
    calibrate.add_argument(
        "--observed-clocks",
        action="store_true",
        help="sm_clock_mhz is what the GPU ran at, also where its power cap slowed it",
    )
    calibrate.set_defaults(command=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from agft_ray.calibration.calibrate import calibrate
    from agft_ray.calibration.measurements import read_measurements
    from agft_ray.calibration.profile_text import profile_yaml
    from agft_ray.simulation.profiles import load_gpu_profile

    if arguments.out.suffix not in {".yaml", ".yml"}:
        raise ConfigError("calibrate", [f"--out: {arguments.out} must end in .yaml"])
    base = load_gpu_profile(arguments.base)
    measurements = read_measurements(arguments.file)
    try:
        calibration = calibrate(
            measurements.rows,
            base,
            arguments.model,
            name=arguments.name or arguments.out.stem,
            observed_clocks=arguments.observed_clocks,
        )
    except ConfigError as error:
        raise ConfigError(f"{arguments.file}: {error.source}", error.problems) from None
    try:
        arguments.out.write_text(profile_yaml(calibration, arguments.file.name), encoding="utf-8")
    except OSError as error:
        raise AgftError(f"--out: {arguments.out} cannot be written: {error.strerror}") from None
    for line in _report(calibration):
        print(line)
    if measurements.unused_columns:
        print(f"columns not used: {', '.join(measurements.unused_columns)}")
    print(
        f"{arguments.out}: written; use it as `profile: {arguments.out}` or `--gpu {arguments.out}`"
    )
    return 0


def _report(calibration: Calibration) -> Iterator[str]:
    for what, fit in (("step time", calibration.step_time), ("power", calibration.power)):
        if fit is None:
            yield f"{what}: fewer than two lines, all as in {calibration.base}"
            continue
        yield from _fit_lines(what, fit)
        if not fit.fitted:
            yield f"warning: {what}: none of it is identified, all as in {calibration.base}"
    if calibration.capped_rows:
        yield (
            f"{calibration.capped_rows} lines left out: at the power cap, so that their clock is "
            "not known (--observed-clocks takes them)"
        )


def _fit_lines(what: str, fit: Fit) -> Iterator[str]:
    yield (
        f"{what}: {fit.rows} lines, R2 {fit.r2:.4f}, MAPE {fit.mape:.2%}, "
        f"worst line {fit.worst:.1%}"
    )
    for path, number in fit.fitted.items():
        yield f"  {path:<48} {number.value:>10.5g} +- {number.standard_error:.2g}"
    for path, reason in fit.kept.items():
        yield f"  {path:<48} {'kept':>10}: {reason}"
