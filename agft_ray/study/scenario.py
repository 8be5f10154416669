"""What is simulated: a GPU, a model, a workload and a fleet; everything but the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from agft_ray.config import Count, Positive, StrictModel, parse
from agft_ray.errors import ConfigError
from agft_ray.policy.goals import Objective
from agft_ray.policy.reference.policy import REFERENCE_WINDOW_S, AgftReferenceConfig
from agft_ray.results.distribution import Slo
from agft_ray.settings import SloConfig, TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import GpuProfile, load_gpu_profile
from agft_ray.telemetry.energy_weight import EnergyWeightConfig, read_series
from agft_ray.virtual.routers import RouterName
from agft_ray.workloads.generators import generate, thin, until, workload_name
from agft_ray.workloads.requests import Request
from agft_ray.workloads.traces import find_trace, open_trace


class Scenario(StrictModel):
    """One setting in which policies are compared. The same scenario, seed and policy give the same
    run."""

    gpu: str = "rtx_a6000"
    """A GPU profile's name or path."""
    model: str = "llama-3.1-8b"
    """The LLM, one of the profile's."""
    trace: str | None = None
    """A trace's path, or its name in the data folder."""
    workload: str = "conversation"
    """Which workload is generated where there is no trace."""
    rate_per_s: Positive = 1.5
    """Requests per simulated second of a generated workload."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Further settings of the generated workload."""
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the requests, seeded, taken before routing."""
    duration_s: Positive | None = None
    """Requests that arrive later are left out; a run lasts at least so long."""
    skip_broken: bool = False
    """Pass over broken trace lines."""
    replicas: Count = 1
    router: RouterName = "power_of_two"
    engine: EngineConfig = Field(default_factory=EngineConfig)
    slo: SloConfig = Field(default_factory=SloConfig)
    """Bounds on each request, and what policies are told to keep."""
    window_s: float = Field(default=2.0, ge=0.5)
    """Length of a tuner's window (of `agft_reference` always its own, 0.8 s), and of the windows
    that are reported."""
    objective: Objective | None = None
    """What policies are told to lower; None: each its own."""
    bound: Annotated[float, Field(gt=0, le=1)] = 0.10
    """How much longer latencies may be than at default clocks where no SLO bounds them, as a
    share; policies are told, and best clocks in hindsight keep it."""
    energy_weight: EnergyWeightConfig | None = None
    """What energy counts for over time; the first row is of the run's start."""
    share_experience: bool = True
    """Replicas exchange what they learned."""
    profile_values: dict[str, float] = Field(default_factory=dict)
    """Numbers of the GPU profile to replace, by dotted path."""
    noise: bool = False
    """Step times and energy counters vary as the GPU profile's section `noise` says."""
    world: str | None = None
    """The name of the world (`study.worlds`) that `profile_values` and `noise` make up."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trace is None and self.duration_s is None:
            raise ValueError("duration_s: required, a generated workload has no end; --duration S")
        return self

    @model_validator(mode="after")
    def _weights_can_be_read(self) -> Self:
        if self.energy_weight is None:
            return self
        if "://" in (source := self.energy_weight.source):
            raise ValueError(f"energy_weight: must be a file in virtual time, got {source!r}")
        try:
            read_series(self.energy_weight)
        except (OSError, ValueError) as error:
            raise ValueError(f"energy_weight: {source}: {error}") from None
        return self

    @property
    def trace_name(self) -> str:
        """The trace's file name, or the generated workload and its rate."""
        return workload_name(self.trace, self.workload, self.rate_per_s)

    @property
    def profile_change(self) -> str | None:
        """The replaced numbers as 'path=value', None if there are none."""
        return ", ".join(f"{k}={v:g}" for k, v in self.profile_values.items()) or None

    @property
    def request_slo(self) -> Slo | None:
        """The bounds on each request, None if there are none."""
        bounds_s = (self.slo.ttft_s, self.slo.tpot_s, self.slo.e2e_s)
        return None if bounds_s == (None, None, None) else Slo(*bounds_s)

    def profile(self) -> GpuProfile:
        """The GPU, with the replaced numbers; raises `ConfigError` for what is invalid."""
        return load_gpu_profile(self.gpu).with_values(self.profile_values)

    def tuner(self, policy: StrictModel) -> TunerConfig:
        """A tuner's settings with this policy."""
        is_reference = isinstance(policy, AgftReferenceConfig)
        values = {
            "policy": policy,
            "objective": self.objective,
            "bound": self.bound,
            "energy_weight": self.energy_weight,
            "slo": self.slo,
            "window_s": REFERENCE_WINDOW_S if is_reference else self.window_s,
            "share_experience": self.share_experience,
        }
        return parse(TunerConfig, values, source="tuner")

    def requests(
        self, seed: int, on_skip: Callable[[str], None] | None = None
    ) -> Iterator[Request]:
        """The requests of one run, streamed in order of arrival.

        Raises `AgftError` for a trace that cannot be read (a broken line while iterating) or
        workload settings that are wrong.
        """
        try:
            return self._bounded(thin(self._source(seed, on_skip), self.keep, seed))
        except ValueError as error:
            raise ConfigError("workload", [str(error)]) from None

    def _source(self, seed: int, on_skip: Callable[[str], None] | None) -> Iterator[Request]:
        if self.trace is None:
            settings = {"rate_per_s": self.rate_per_s, "seed": seed} | self.parameters
            return generate(self.workload, **settings)
        strict = not self.skip_broken
        return open_trace(find_trace(self.trace), strict=strict, on_skip=on_skip)

    def _bounded(self, requests: Iterator[Request]) -> Iterator[Request]:
        return requests if self.duration_s is None else until(requests, self.duration_s)
