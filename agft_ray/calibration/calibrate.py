"""A GPU profile fitted to a user's own measurements, starting from another profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agft_ray.calibration.assembling import assembled
from agft_ray.calibration.fitting import Array, Fit, Parameter, fit
from agft_ray.calibration.measurements import Measurement
from agft_ray.errors import ConfigError
from agft_ray.simulation.physics import (
    StepWork,
    busy_power_w,
    idle_power_w,
    prefill_attention_s,
    step_time_s,
)
from agft_ray.simulation.profiles import (
    ActivityDecode,
    GpuProfile,
    ModelProfile,
    PowerProfile,
)

CAPPED_SHARE = 0.985
"""A GPU at this share of its power cap may run below the clock it was set to."""

LONG_PROMPT = 2048
"""Tokens of a step with prefill where they are not said: it computes rather than reads."""

_KNEE = "knee_sm_clock_mhz"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A new profile, and how it came about."""

    profile: GpuProfile
    model: str
    base: str
    step_time: Fit | None
    """Names are dotted paths in the profile; None without measurements of it."""
    power: Fit | None
    capped_rows: int
    """Left out: so near the power cap that their clock is not known."""


def calibrate(
    measurements: Sequence[Measurement],
    base: GpuProfile,
    model: str,
    *,
    name: str,
    observed_clocks: bool = False,
) -> Calibration:
    """Fit voltage, power and step-time numbers of `base` to measurements of one LLM.

    Step times come first, as decode power may depend on them. A number that the measurements do
    not identify keeps the base's value. Lines within 1.5 % of the power cap are left out unless
    `observed_clocks`: the clocks are those the GPU ran at, not those it was set to. Fitted numbers
    get two standard errors either side as their range.

    Raises `ConfigError` if the base does not know the model, a clock is outside its range, or there
    is too little to fit; `AgftError` without scipy.
    """
    check_clocks(measurements, base)
    part = base.model_profile(model)
    cap_w = CAPPED_SHARE * base.power.cap_w
    rows = [r for r in measurements if observed_clocks or (r.power_w or 0.0) < cap_w]
    timed = [row for row in rows if row.step_ms is not None]
    powered = [row for row in rows if row.power_w is not None]
    if max(len(timed), len(powered)) < 2:
        raise _too_few(len(rows), len(measurements))
    step_time = power = None
    power_part = base.power
    if len(timed) >= 2:
        step_time, part = _fit_step_time(timed, part)
    if len(powered) >= 2:
        power, power_part = _fit_power(powered, base, part)
    step_time, power = _prefixed(step_time, f"models.{model}."), _prefixed(power, "power.")
    fitted = {path: n for found in (step_time, power) if found for path, n in found.fitted.items()}
    return Calibration(
        profile=assembled(base, power_part, (model, part), name, fitted),
        model=model,
        base=base.name,
        step_time=step_time,
        power=power,
        capped_rows=len(measurements) - len(rows),
    )


def _too_few(usable: int, lines: int) -> ConfigError:
    return ConfigError(
        "measurements",
        [
            f"{usable} of {lines} lines can be used, and at least 2 of power or of step time are "
            "needed; lines at the power cap count with observed clocks only"
        ],
    )


def check_clocks(rows: Sequence[Measurement], base: GpuProfile) -> None:
    """Raise `ConfigError` with every line whose clock the base cannot run at."""
    low, high = base.min_sm_clock_mhz, base.max_sm_clock_mhz
    problems = [
        f"line {row.line}: sm_clock_mhz: {row.sm_clock_mhz:g} is outside {low}..{high} MHz, the "
        f"range of {base.name}; say the card's own in a --card file"
        for row in rows
        if not low <= row.sm_clock_mhz <= high
    ]
    if problems:
        raise ConfigError("measurements", problems)


def step_work(row: Measurement, model: ModelProfile) -> StepWork:
    """The step that a line was measured of."""
    tokens = row.prefill_tokens
    if row.phase == "prefill" and not tokens:
        tokens = LONG_PROMPT  # only its power was measured
    attention_s = prefill_attention_s(model, tokens, 0) if tokens else 0.0
    return StepWork(tokens, row.batch, row.context_tokens, attention_s)


def _fit_step_time(rows: Sequence[Measurement], base: ModelProfile) -> tuple[Fit, ModelProfile]:
    points = [(step_work(row, base), row.sm_clock_mhz) for row in rows]

    def predict(model: ModelProfile) -> Array:
        return np.array([step_time_s(model, work, clock) * 1e3 for work, clock in points])

    clock = _one_clock(rows)
    parameters = [
        Parameter("token_ms", low=1e-6),
        Parameter("weights_ms", low=1e-3),
        Parameter("issue_share", high=1.0, starts=(0.3, 0.5, 0.7, 0.9), missing=clock),
        Parameter("clock_exponent", low=1.0, high=50.0, starts=(3.0, 10.0), missing=clock),
    ]
    return fit(base, parameters, predict, np.array([row.step_ms or 0.0 for row in rows]))


def _fit_power(
    rows: Sequence[Measurement], base: GpuProfile, model: ModelProfile
) -> tuple[Fit, PowerProfile]:
    points = [(row.phase == "idle", step_work(row, model), row.sm_clock_mhz) for row in rows]

    spinning = model.spinning_activity

    def predict(power: PowerProfile) -> Array:
        gpu = base.model_copy(update={"power": power})
        return np.array(
            [
                idle_power_w(power, clock, spinning)
                if idle
                else busy_power_w(gpu, model, work, clock)
                for idle, work, clock in points
            ]
        )

    measured = np.array([row.power_w or 0.0 for row in rows])
    found, power = fit(base.power, _power_parameters(rows, base), predict, measured)
    if (knee := found.fitted.get(_KNEE)) is None:
        return found, power
    # A float while it was fitted.
    whole = dataclasses.replace(knee, value=round(knee.value))
    found = dataclasses.replace(found, fitted={**found.fitted, _KNEE: whole})
    return found, power.model_copy(update={_KNEE: whole.value})


def _power_parameters(rows: Sequence[Measurement], base: GpuProfile) -> list[Parameter]:
    """In order of importance."""
    phases = {row.phase for row in rows}
    clock = _one_clock(rows)
    idle = None if "idle" in phases else "no idle line"
    is_activity = isinstance(base.power.decode, ActivityDecode)
    shows_busy = "prefill" in phases or (is_activity and "decode" in phases)
    busy = None if shows_busy else "no line with prefill"
    low, high = float(base.min_sm_clock_mhz), base.power.reference_sm_clock_mhz - 1.0
    clocks = [row.sm_clock_mhz for row in rows]
    knees = np.linspace(max(min(clocks), low), min(max(clocks), high), 14)[1:-1]
    return [
        Parameter("busy_clock_w", missing=busy),
        Parameter("busy_base_w", missing=busy or clock),
        Parameter("idle_base_w", missing=idle),
        Parameter("idle_clock_w", missing=idle or clock),
        Parameter("voltage_rise", missing=clock),
        Parameter(_KNEE, low, high, tuple(knees.tolist()), missing=clock),
        *_decode_parameters(rows, is_activity),
        Parameter("idle_leakage_w", missing=idle or clock),
    ]


def _decode_parameters(rows: Sequence[Measurement], is_activity: bool) -> list[Parameter]:
    loads = {row.batch if row.phase == "decode" else "prefill" for row in rows}
    loads -= {"prefill"} if all(row.phase != "prefill" for row in rows) else set()
    decode = None if any(row.phase == "decode" for row in rows) else "no decode line"
    few = decode or ("one load only" if len(loads) < 2 else None)
    if is_activity:
        return [
            Parameter("decode.single", high=1.0, missing=few),
            Parameter("decode.batch_scale", low=0.1, missing=few),
        ]
    return [
        Parameter("decode.issue_activity", missing=decode or _one_clock(rows)),
        Parameter("decode.memory_w", missing=few),
    ]


def _one_clock(rows: Sequence[Measurement]) -> str | None:
    return "one clock only" if len({row.sm_clock_mhz for row in rows}) < 2 else None


def _prefixed(found: Fit | None, prefix: str) -> Fit | None:
    if found is None:
        return None
    return dataclasses.replace(
        found,
        fitted={prefix + name: number for name, number in found.fitted.items()},
        kept={prefix + name: reason for name, reason in found.kept.items()},
    )
