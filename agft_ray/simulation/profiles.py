"""GPU profiles: the simulator's numbers, as data files with the source and grade of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from agft_ray.config import Count, NonNegative, Positive, Share, StrictModel, load_yaml, parse
from agft_ray.errors import ConfigError, GpuArgumentError

Interval = Annotated[tuple[float, float], Field(strict=False)]

_BUNDLED = Path(__file__).with_name("profiles")


class AttentionProfile(StrictModel):
    """Attention time per layer, in microseconds at the model's reference clock."""

    decode_floor_us: NonNegative
    decode_sequence_us: NonNegative
    """Per decoding sequence in a step without prefill."""
    decode_context_us: NonNegative
    """Per token of KV cache read in a step without prefill."""
    mixed_sequence_us: NonNegative
    """Per decoding sequence in a step with prefill."""
    mixed_context_us: NonNegative
    """Per token of KV cache read by decoding sequences in a step with prefill."""
    prefill_floor_us: NonNegative
    prefill_exponent: Positive
    prefill_pair_us: NonNegative
    """Per pair of a chunk's token and a token it attends to."""
    prefill_token_us: NonNegative
    """Per token of the chunk."""
    prefill_context_us: NonNegative
    """Per token computed before the chunk."""


class ModelProfile(StrictModel):
    """One LLM on one GPU or tensor-parallel group: step times, and what it takes of memory.

    Sizes and times are the whole group's.
    """

    tensor_parallel: Count = 1
    """GPUs that share every step evenly, at one clock."""
    layers: Count
    weights_bytes: Count
    kv_bytes_per_token: Count
    kv_blocks: Count
    """How many KV blocks of 16 tokens fit beside the weights."""
    spinning_activity: Share = 0.0
    """Core activity of a loaded engine between its steps, as of workers that spin."""
    reference_sm_clock_mhz: Count
    """The SM clock at which the times below hold."""
    host_ms: NonNegative
    """Scheduling and launching per step; the SM clock does not change it."""
    host_sequence_ms: NonNegative = 0.0
    """More of it for each decoding sequence: sampling, detokenising."""
    prefill_host_ms: NonNegative = 0.0
    """More of it in a step with prefill, whose kernels no CUDA graph launches."""
    all_reduce_ms: NonNegative = 0.0
    """Waiting of the group's GPUs for each other, per step; the SM clock does not change it."""
    all_reduce_token_ms: NonNegative = 0.0
    """More of it for each token of the step."""
    weights_ms: Positive
    """Reading the weights once: the time of a step with few tokens."""
    token_ms: Positive
    """Computing one more token in a large step."""
    dense_exponent: Positive
    head_ms: NonNegative = 0.0
    """LM head and sampling, where the dense times do not include them."""
    issue_share: Share
    """Time that the SMs need to ask for the weights, relative to `weights_ms`."""
    clock_exponent: Positive
    """How sharply reading the weights goes from memory-bound to clock-bound."""
    attention: AttentionProfile


class ActivityDecode(StrictModel):
    """Decode power by batch size: activity `single + (1 - single) (1 - exp(-B / batch_scale))`."""

    form: Literal["activity"]
    single: Share
    batch_scale: Positive


class UtilizationDecode(StrictModel):
    """Power by what keeps the GPU busy, in steps of every kind: `physics.busy_power_w`."""

    form: Literal["utilization"]
    memory_w: NonNegative
    """While memory is read at its full rate."""
    issue_activity: NonNegative
    """Core activity of SMs that only ask for weights; 1 is that of matrix products."""
    activity_exponent: Positive
    """How the activity of asking and computing add up: a p-norm."""
    attention_activity: NonNegative
    """Core activity of decode attention."""


class PowerProfile(StrictModel):
    """Coefficients of the power formulas in `physics`: one GPU's, relative to a reference clock."""

    cap_w: Positive
    reference_sm_clock_mhz: Count
    knee_sm_clock_mhz: Count
    """Below it the voltage is constant."""
    voltage_rise: NonNegative
    """Relative rise of the voltage from the knee to the reference clock."""
    voltage_exponent: Positive
    idle_base_w: NonNegative
    idle_clock_w: NonNegative
    idle_leakage_w: NonNegative
    busy_base_w: NonNegative
    busy_clock_w: NonNegative
    decode: Annotated[ActivityDecode | UtilizationDecode, Field(discriminator="form")]


class GovernorProfile(StrictModel):
    """The driver's default governor: maximum clock while busy, less while idle."""

    idle_sm_clock_mhz: Count
    """Its SM clock while the engine is loaded but idle."""
    idle_delay_s: NonNegative
    """How long after the last step it goes there."""


class ClockChangeProfile(StrictModel):
    """The delay from a call to lock or reset until the clock changes: log-normal."""

    median_s: Positive
    p95_to_median: Annotated[float, Field(ge=1)]
    """95th percentile, relative to the median."""


class NoiseProfile(StrictModel):
    """What varies on a real card and server. The defaults are a card without noise.

    Only simulations that ask for it have it, save the counter's update period, which is always in
    force; a power reading's noise is `power_noise`.
    """

    step_cv: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Relative standard deviation of a step's time, which is log-normal with mean 1."""
    outlier_share: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    """Share of the steps that take `outlier_factor` times as long."""
    outlier_factor: Annotated[float, Field(ge=1)] = 3.0
    counter_noise: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    """Standard deviation of the energy counter, relative to the energy of one update's period; it
    does not add up over updates."""
    counter_update_s: Positive = 0.1
    """How often the energy counter is updated."""


class TemperatureProfile(StrictModel):
    """GPU temperature, linear in power."""

    zero_power_c: float
    rise_c_per_w: NonNegative


class GpuProfile(StrictModel):
    """A simulated GPU: its clocks, power, governor and the LLMs it can run."""

    name: str
    product: str
    """The name NVML gives."""
    min_sm_clock_mhz: Count
    max_sm_clock_mhz: Count
    sm_clock_step_mhz: Count
    power_noise: Share
    """Relative standard deviation of a power reading."""
    noise: NoiseProfile = NoiseProfile()
    power: PowerProfile
    governor: GovernorProfile
    clock_change: ClockChangeProfile
    temperature: TemperatureProfile
    models: dict[str, ModelProfile]
    ranges: dict[str, Interval] = Field(default_factory=dict)
    """Uncertain numbers, to be swept: dotted path of the number -> lowest and highest value."""

    @cached_property
    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """The clocks that can be locked, ascending."""
        step = self.sm_clock_step_mhz
        return tuple(range(self.min_sm_clock_mhz, self.max_sm_clock_mhz + 1, step))

    def supported_at_or_below(self, sm_clock_mhz: int) -> int:
        """The nearest supported clock at or below one inside the supported range.

        Raises `GpuArgumentError` for a clock outside the range.
        """
        low, high = self.min_sm_clock_mhz, self.max_sm_clock_mhz
        if not low <= sm_clock_mhz <= high:
            raise GpuArgumentError(
                f"sm_clock_mhz={sm_clock_mhz} is outside what {self.product} supports: "
                f"choose from {low}..{high} MHz in steps of {self.sm_clock_step_mhz}"
            )
        return sm_clock_mhz - (sm_clock_mhz - low) % self.sm_clock_step_mhz

    def model_profile(self, model: str) -> ModelProfile:
        """The profile of one LLM; raises `ConfigError` listing the known ones."""
        if model not in self.models:
            known = ", ".join(sorted(self.models))
            raise ConfigError(
                f"GPU profile {self.name}",
                [f"model: {model!r} has no profile on this GPU, choose one of: {known}"],
            )
        return self.models[model]

    def numbers(self) -> dict[str, float]:
        """Every number but those of `ranges`, by its dotted path."""
        flat = _flatten(self.model_dump(exclude={"ranges"}))
        return {path: value for path, value in flat if isinstance(value, int | float)}

    def with_value(self, path: str, value: float) -> GpuProfile:
        """This profile with one number changed, such as `governor.idle_sm_clock_mhz`.

        Raises `ConfigError` if there is no such number, or if the new one is invalid, crosses
        others, or lies outside its entry in `ranges`.
        """
        return self.with_values({path: value})

    def with_values(self, changes: Mapping[str, float]) -> GpuProfile:
        """This profile with several numbers changed at once; raises as `with_value`."""
        source = f"GPU profile {self.name}"
        values = self.model_dump()
        unknown = [path for path, value in changes.items() if not _replace(values, path, value)]
        if unknown:
            problems = [f"{path}: names no number of this profile" for path in unknown]
            raise ConfigError(source, problems)
        return parse_gpu_profile(values, source) if changes else self


def bundled_profiles() -> tuple[str, ...]:
    """The names of the profiles that come with the package."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.yaml")))


def load_gpu_profile(name_or_path: str | Path) -> GpuProfile:
    """A bundled profile by name, or a user's own by the path of its YAML file.

    Raises `ConfigError` with every problem found: an unknown name, bad or crossed values.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        if str(name_or_path) not in bundled_profiles():
            raise ConfigError("GPU profile", [_unknown_profile(str(name_or_path))])
        path = _BUNDLED / f"{name_or_path}.yaml"
    return parse_gpu_profile(load_yaml(path), str(path))


def parse_gpu_profile(values: object, source: str) -> GpuProfile:
    """Values as a profile's file holds them; raises `ConfigError` with every problem found."""
    profile = parse(GpuProfile, values, source=source)
    if problems := list(_crossed_values(profile)):
        raise ConfigError(source, problems)
    return profile


def _unknown_profile(name: str) -> str:
    known = ", ".join(bundled_profiles())
    return f"gpu: no profile named {name!r}, choose one of: {known}, or the path of a .yaml file"


def _crossed_values(profile: GpuProfile) -> Iterator[str]:
    yield from _crossed_clocks(profile)
    if profile.power.knee_sm_clock_mhz >= profile.power.reference_sm_clock_mhz:
        yield (
            f"power.knee_sm_clock_mhz: {profile.power.knee_sm_clock_mhz} must be below "
            f"power.reference_sm_clock_mhz, which is {profile.power.reference_sm_clock_mhz}"
        )
    if not profile.models:
        yield "models: must name at least one LLM"
    yield from _crossed_ranges(profile)


def _crossed_clocks(profile: GpuProfile) -> Iterator[str]:
    low, high, step = profile.min_sm_clock_mhz, profile.max_sm_clock_mhz, profile.sm_clock_step_mhz
    if low > high:
        yield f"min_sm_clock_mhz: {low} must not exceed max_sm_clock_mhz, which is {high}"
    elif (high - low) % step:
        yield f"sm_clock_step_mhz: {step} must divide the span from {low} to {high} MHz"
    elif (idle := profile.governor.idle_sm_clock_mhz) not in profile.supported_sm_clocks_mhz:
        yield (
            f"governor.idle_sm_clock_mhz: {idle} is not a supported clock, "
            f"choose from {low}..{high} MHz in steps of {step}"
        )
    else:
        yield from _clocks_out_of_range(profile)


def _clocks_out_of_range(profile: GpuProfile) -> Iterator[str]:
    low, high = profile.min_sm_clock_mhz, profile.max_sm_clock_mhz
    clocks = {
        "power.knee_sm_clock_mhz": profile.power.knee_sm_clock_mhz,
        "power.reference_sm_clock_mhz": profile.power.reference_sm_clock_mhz,
    } | {
        f"models.{name}.reference_sm_clock_mhz": model.reference_sm_clock_mhz
        for name, model in profile.models.items()
    }
    for field, clock in clocks.items():
        if not low <= clock <= high:
            yield f"{field}: {clock} is outside the supported range {low}..{high} MHz"


def _crossed_ranges(profile: GpuProfile) -> Iterator[str]:
    values = profile.numbers()
    for key, (low, high) in profile.ranges.items():
        value = values.get(key)
        if value is None:
            yield f"ranges.{key}: names no number of this profile"
        elif not low <= value <= high:
            yield f"ranges.{key}: [{low:g}, {high:g}] does not contain the value used, {value:g}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _replace(values: dict[str, Any], path: str, value: float) -> bool:
    """Set the number at a dotted path, whose keys may hold dots as well; False if there is none."""
    for key, old in values.items():
        if isinstance(old, dict) and path.startswith(f"{key}."):
            if _replace(old, path.removeprefix(f"{key}."), value):
                return True
        elif key == path and isinstance(old, int | float):
            whole = isinstance(old, int) and float(value).is_integer()
            values[key] = int(value) if whole else value
            return True
    return False
