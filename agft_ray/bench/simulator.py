"""How fast the simulator is: `agft-ray bench simulator`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from agft_ray.bench.decision import versions
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.workloads.generators import generate_conversation

GPU, MODEL = "rtx_a6000", "llama-3.1-8b"
POLICIES = {"fixed:1230": {"name": "fixed", "sm_clock_mhz": 1230}, "agft": {"name": "agft"}}


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Simulated seconds of one replica, per wall second and per second of CPU time.

    The two differ where the core is shared with other programs.
    """

    per_wall_s: float
    per_cpu_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """One policy, jumping over series of decode steps and not."""

    policy: str
    jumping: Speed
    stepping: Speed

    def __str__(self) -> str:
        jumping, stepping = self.jumping, self.stepping
        return (
            f"{self.policy:<12} {jumping.per_wall_s:6.0f} simulated s per wall s "
            f"({jumping.per_cpu_s:.0f} per CPU s)   step by step {stepping.per_wall_s:.0f} "
            f"({stepping.per_cpu_s:.0f})   ratio {jumping.per_cpu_s / stepping.per_cpu_s:.1f}"
        )


def bench_simulator(*, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Comparison]:
    """Time one replica under conversation load, with a fixed clock and while it learns."""
    for name, policy in POLICIES.items():
        setup = FleetSetup(
            gpu=load_gpu_profile(GPU),
            model=MODEL,
            engine=EngineConfig(),
            tuner=TunerConfig.model_validate({"policy": policy}),
            seed=seed,
            duration_s=duration_s,
        )
        stepwise = dataclasses.replace(setup, jumps=False)
        yield Comparison(name, _speed(setup, rate_per_s), _speed(stepwise, rate_per_s))


def _speed(setup: FleetSetup, rate_per_s: float) -> Speed:
    requests = list(generate_conversation(rate_per_s, setup.duration_s, setup.seed))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    totals = run_fleet(requests, setup)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Speed(totals.duration_s / wall_s, totals.duration_s / cpu_s)


def conditions(*, rate_per_s: float, duration_s: float, seed: int) -> str:
    """What the speeds depend on."""
    return (
        f"{versions()}; {GPU}, {MODEL}, {rate_per_s:g} requests/s, {duration_s:g} s, "
        f"seed {seed}, one core"
    )
