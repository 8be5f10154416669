"""How fast the simulator is: `agft-ray bench simulator`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from agft_ray.evaluation.bench import versions
from agft_ray.evaluation.virtual_time import FleetSetup, run_fleet
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.workloads import generate_conversation

GPU, MODEL = "rtx_a6000", "llama-3.1-8b"
POLICIES = {"fixed:1230": {"name": "fixed", "sm_clock_mhz": 1230}, "agft": {"name": "agft"}}


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Simulated seconds per wall second of one replica on one core."""

    policy: str
    jumping: float
    stepping: float
    """The same without jumping over series of decode steps."""

    def __str__(self) -> str:
        ratio = self.jumping / self.stepping
        return (
            f"{self.policy:<12} {self.jumping:8.0f} simulated s/s   step by step "
            f"{self.stepping:8.0f}   ratio {ratio:5.1f}"
        )


def bench_simulator(*, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Speed]:
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
        yield Speed(name, _speed(setup, rate_per_s), _speed(stepwise, rate_per_s))


def _speed(setup: FleetSetup, rate_per_s: float) -> float:
    requests = list(generate_conversation(rate_per_s, setup.duration_s, setup.seed))
    start_s = time.perf_counter()
    totals = run_fleet(requests, setup)
    return totals.duration_s / (time.perf_counter() - start_s)


def conditions(*, rate_per_s: float, duration_s: float, seed: int) -> str:
    """What the speeds depend on."""
    return (
        f"{versions()}; {GPU}, {MODEL}, {rate_per_s:g} requests/s, {duration_s:g} s, "
        f"seed {seed}, one core"
    )
