"""How fast the simulator is: `agft-ray bench simulator`."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

from agft_ray.bench.decision import versions
from agft_ray.policy.baselines.volta import VoltaConfig
from agft_ray.policy.registry import GovernorConfig, build_governor
from agft_ray.policy.step import StepGovernor
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.virtual.parallel import Workers
from agft_ray.virtual.replica import Listeners
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.workloads.generators import generate_conversation
from agft_ray.workloads.requests import Request

GPU, MODEL = "rtx_a6000", "llama-3.1-8b"
POLICIES: dict[str, dict[str, Any]] = {
    "fixed:1230": {"name": "fixed", "sm_clock_mhz": 1230},
    "pair:1470/1230": {
        "name": "pair",
        "prefill_sm_clock_mhz": 1470,
        "decode_sm_clock_mhz": 1230,
    },
    "agft": {"name": "agft"},
}
GOVERNORS: dict[str, GovernorConfig] = {
    "volta": VoltaConfig(tpot_slo_s=0.05, ttft_slo_s=1.0),
}
"""What must see every step."""
FLEET_POLICIES = ("fixed:1230", "volta")
REPLICAS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Simulated seconds of one replica, per wall second and per second of CPU time.

    The two differ where the core is shared with other programs. With several processes the CPU
    time is that of the busiest one and of the one that hands out: on so many
    cores of its own it would take no less.
    """

    per_wall_s: float
    per_cpu_s: float

    def __str__(self) -> str:
        return f"{self.per_cpu_s:6.0f} simulated s per CPU s ({self.per_wall_s:.0f} per wall s)"


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One policy, jumping over series of decode steps (or counting their tokens) and not."""

    policy: str
    jumping: Speed
    stepping: Speed

    def __str__(self) -> str:
        return (
            f"{self.policy:<16} {self.jumping}   token by token {self.stepping.per_cpu_s:.0f}   "
            f"ratio {self.jumping.per_cpu_s / self.stepping.per_cpu_s:.1f}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class FleetComparison:
    """One fleet in one process, and in several."""

    policy: str
    workers: int
    one: Speed
    several: Speed

    def __str__(self) -> str:
        cpu = self.several.per_cpu_s / self.one.per_cpu_s
        wall = self.several.per_wall_s / self.one.per_wall_s
        return (
            f"{REPLICAS} x {self.policy:<11} {self.one}   in {self.workers} processes "
            f"{self.several.per_cpu_s:.0f} ({self.several.per_wall_s:.0f})   "
            f"ratio {cpu:.2f} ({wall:.2f})"
        )


def bench_simulator(*, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Comparison]:
    """Time one replica under conversation load: fixed clocks, a step governor, and learning."""
    for name in ("fixed:1230", "pair:1470/1230", "volta", "agft"):
        setup = _setup(name, duration_s, seed)
        stepwise = dataclasses.replace(setup, jumps=False)
        yield Comparison(name, _speed(setup, rate_per_s), _speed(stepwise, rate_per_s))


def bench_fleet(
    *, rate_per_s: float, duration_s: float, seed: int, workers: int | None = None
) -> Iterator[FleetComparison]:
    """Time a fleet with so much load for each replica, in one process and over the cores."""
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    if count < 1:
        raise ValueError(f"workers: must be at least 1, got {count}")
    for name in FLEET_POLICIES:
        setup = dataclasses.replace(_setup(name, duration_s, seed), replicas=REPLICAS)
        one = _speed(setup, rate_per_s)
        yield FleetComparison(name, count, one, _spread_speed(setup, rate_per_s, count))


def _setup(name: str, duration_s: float, seed: int) -> FleetSetup:
    settings = GOVERNORS.get(name)
    return FleetSetup(
        gpu=load_gpu_profile(GPU),
        model=MODEL,
        engine=EngineConfig(),
        tuner=TunerConfig.model_validate({"policy": POLICIES.get(name, {"name": "default"})}),
        governor=None if settings is None else functools.partial(_governor, settings),
        seed=seed,
        duration_s=duration_s,
    )


def _governor(settings: GovernorConfig, replica: int) -> StepGovernor:
    return build_governor(settings)


def _requests(setup: FleetSetup, rate_per_s: float) -> list[Request]:
    rate_per_s *= setup.replicas
    return list(generate_conversation(rate_per_s, setup.duration_s, setup.seed))


def _speed(setup: FleetSetup, rate_per_s: float) -> Speed:
    requests = _requests(setup, rate_per_s)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    simulated_s = run_fleet(requests, setup).duration_s * setup.replicas
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Speed(simulated_s / wall_s, simulated_s / cpu_s)


def _spread_speed(setup: FleetSetup, rate_per_s: float, count: int) -> Speed:
    """Without the start of the processes, which a long run does not notice."""
    requests = _requests(setup, rate_per_s)
    workers = Workers(count, setup, Listeners(), ())
    try:
        before_s, wall_s, cpu_s = workers.cpu_s(), time.perf_counter(), time.process_time()
        simulated_s = workers.run(requests, lambda t_s: None) * setup.replicas
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        cpu_s += max(b - a for a, b in zip(before_s, workers.cpu_s(), strict=True))
    finally:
        workers.close()
    return Speed(simulated_s / wall_s, simulated_s / cpu_s)


def conditions(*, rate_per_s: float, duration_s: float, seed: int) -> str:
    """What the speeds depend on."""
    return (
        f"{versions()}; {GPU}, {MODEL}, {rate_per_s:g} requests/s a replica, {duration_s:g} s, "
        f"seed {seed}"
    )
