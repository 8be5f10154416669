"""What `agft-ray calibrate` prints: fits, and tables of misfits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agft_ray.calibration.calibrate import Calibration
    from agft_ray.calibration.fitting import Fit, FittedNumber
    from agft_ray.calibration.load_check import LoadCheck, Misfit
    from agft_ray.calibration.load_fit import LoadCalibration
    from agft_ray.calibration.load_run import Load
    from agft_ray.calibration.step_check import StepMisfit


def step_fit_lines(calibration: Calibration) -> Iterator[str]:
    """A fit to single steps."""
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
    yield from _numbers(fit.fitted, fit.kept)


def _numbers(fitted: Mapping[str, FittedNumber], kept: Mapping[str, str]) -> Iterator[str]:
    for path, number in fitted.items():
        yield f"  {path:<48} {number.value:>10.5g} +- {number.standard_error:.2g}"
    for path, reason in kept.items():
        yield f"  {path:<48} {'kept':>10}: {reason}"


def load_fit_lines(calibration: LoadCalibration) -> Iterator[str]:
    """A fit to a load test: its numbers, and how far base and fit are off."""
    yield "numbers that the load test determines, with standard errors:"
    yield from _numbers(calibration.fitted, calibration.kept)
    if not calibration.fitted:
        yield f"warning: none of it is identified, all as in {calibration.base}"
    yield "mean absolute errors, with other arrivals than in the fit:"
    before = calibration.before.quality()
    for quantity, found in calibration.after.quality().items():
        yield (
            f"  {quantity:<12} {found.mean_absolute:>6.1%}, worst line {found.worst.row.line} "
            f"{found.worst.error:+.1%} ({_load(found.worst.row.load)}); "
            f"base {before[quantity].mean_absolute:.1%}"
        )


def load_check_lines(check: LoadCheck) -> Iterator[str]:
    """Every line of a load test beside the simulator's, and changes against the highest clock."""
    lines = dict.fromkeys(misfit.row.line for misfit in check.misfits)
    quality = check.quality()
    names = list(quality)
    yield "measured / simulated (error):"
    yield "  line  " + f"{'load':<36}" + "".join(f"{name:>30}" for name in names)
    for line in lines:
        cells = {m.quantity: _cell(m) for m in check.misfits if m.row.line == line}
        load = next(m.row.load for m in check.misfits if m.row.line == line)
        shown = "".join(f"{cells.get(name, ''):>30}" for name in names)
        yield f"  {line:>4}  {_load(load):<36}{shown}"
    yield "errors:"
    for name, found in quality.items():
        yield (
            f"  {name:<12} mean absolute {found.mean_absolute:.1%}, mean {found.mean:+.1%}, worst "
            f"{found.worst.error:+.1%} (line {found.worst.row.line}), {found.count} lines"
        )
    yield from _change_lines(check)


def _cell(misfit: Misfit) -> str:
    return f"{misfit.measured:.4g} / {misfit.simulated:.4g} ({misfit.error:+.1%})"


def _change_lines(check: LoadCheck) -> Iterator[str]:
    changes = check.changes()
    if not changes:
        return
    yield "changes against the highest clock at equal load, interpolated: measured / simulated:"
    names = list(dict.fromkeys(change.quantity for change in changes))
    cells: dict[tuple[float, int, int], dict[str, str]] = {}
    for change in changes:
        key = change.rate_per_s, change.sm_clock_mhz, change.reference_sm_clock_mhz
        cell = f"{change.measured:+.0%} / {change.simulated:+.0%}"
        cells.setdefault(key, {})[change.quantity] = cell
    yield "  " + f"{'load':<36}" + "".join(f"{name:>20}" for name in names)
    for (rate, clock, reference), found in cells.items():
        load = f"{rate:g}/s, {clock} against {reference} MHz"
        yield f"  {load:<36}" + "".join(f"{found.get(name, ''):>20}" for name in names)


def _load(load: Load) -> str:
    clock = "default clocks" if load.sm_clock_mhz is None else f"{load.sm_clock_mhz} MHz"
    if not load.rate_per_s:
        return f"{clock}, loaded and empty"
    return f"{clock}, {load.rate_per_s:g}/s, {load.prompt_tokens}+{load.output_tokens} tokens"


def step_check_lines(misfits: Sequence[StepMisfit]) -> Iterator[str]:
    """Every measured number of single steps beside the profile's."""
    yield "measured, simulated, error:"
    for m in misfits:
        row = m.row
        load = f"{row.phase}, {row.batch} running, {row.prefill_tokens} prompt tokens"
        yield (
            f"  {row.line:>4}  {row.sm_clock_mhz:>5g} MHz  {load:<44} {m.quantity:<8} "
            f"{m.measured:>9.4g} {m.simulated:>9.4g} {m.error:>+7.1%}"
        )
    yield "errors:"
    for quantity in ("power_w", "step_ms"):
        if found := [m for m in misfits if m.quantity == quantity]:
            worst = max(found, key=lambda m: abs(m.error))
            absolute = sum(abs(m.error) for m in found) / len(found)
            mean = sum(m.error for m in found) / len(found)
            yield (
                f"  {quantity:<12} mean absolute {absolute:.1%}, mean {mean:+.1%}, worst "
                f"{worst.error:+.1%} (line {worst.row.line}), {len(found)} lines"
            )
