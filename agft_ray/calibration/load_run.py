"""One steady load on a simulated GPU: what a load test of a real server would measure there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import prefill_attention_s
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.workloads.requests import Request, RequestTimings

Arrivals = Literal["even", "poisson"]
WARM_UP_SHARE = 0.15
"""Share of the requests that come first and only fill the engine."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one size at one rate, on a GPU (or group) locked at one clock."""

    sm_clock_mhz: int | None
    """None: default clocks."""
    rate_per_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What was measured of a load, once it was steady."""

    power_w: float
    """Mean of the whole group."""
    ttft_s: np.ndarray
    """Of each request, in order of completion."""
    tpot_s: np.ndarray


def run_load(
    gpu: GpuProfile,
    model: str,
    load: Load,
    *,
    arrivals: Arrivals = "poisson",
    requests: int = 300,
    seed: int = 0,
    engine: EngineConfig | None = None,
) -> LoadResult:
    """Serve so many requests after a warm-up and measure until the last has arrived.

    The same seed gives the same arrivals at every clock, so that rows can be compared.
    """
    profile = gpu.model_profile(model)
    config = (engine or EngineConfig()).for_model(profile)
    device = Device(gpu, profile, seed=seed)
    timings: list[RequestTimings] = []
    scheduler = BatchingEngine(
        config, lambda tokens, offset: prefill_attention_s(profile, tokens, offset)
    )
    virtual = VirtualEngine(scheduler, device, timings.append)
    if load.sm_clock_mhz is not None:
        device.lock(0.0, load.sm_clock_mhz)
    warm_up = int(WARM_UP_SHARE * requests)
    queued = list(_requests(load, arrivals, warm_up + requests, seed))
    virtual.submit(queued)
    start_s, end_s = queued[warm_up].arrival_s, queued[-1].arrival_s
    energy_j = []
    for t_s in (start_s, end_s):
        virtual.run_until(t_s)
        device.advance(t_s)
        energy_j.append((device.t_s, device.energy_j))
    (t0_s, begin_j), (t1_s, end_j) = energy_j
    while not virtual.drained:
        t1 = device.t_s + 60.0
        virtual.run_until(t1)
    measured = [t for t in timings if t.arrival_s >= start_s]
    return LoadResult(
        power_w=(end_j - begin_j) / (t1_s - t0_s),
        ttft_s=np.array([t.ttft_s for t in measured]),
        tpot_s=np.array([t.tpot_s for t in measured if t.tpot_s is not None]),
    )


def _requests(load: Load, arrivals: Arrivals, count: int, seed: int) -> Iterator[Request]:
    gaps = np.ones(count)
    if arrivals == "poisson":
        gaps = np.random.default_rng(seed).exponential(size=count)
    for i, arrival_s in enumerate(np.cumsum(gaps) / load.rate_per_s):
        # Half a second to let the lock act.
        yield Request(str(i), 0.5 + float(arrival_s), load.prompt_tokens, load.output_tokens)
