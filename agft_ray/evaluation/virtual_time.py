"""One replica in virtual time: the loop, the policies and the engine that run under Ray."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from agft_ray.clock import ManualClock
from agft_ray.gpu.simulated import InMemoryGpu
from agft_ray.settings import PUSH_INTERVAL_S, TunerConfig
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import prefill_attention_s
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.telemetry.engine_inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import EngineSample, Request, RequestTimings


@dataclass(frozen=True, slots=True)
class VirtualRun:
    """What came of a run: energy until the last request was answered, requests, windows."""

    duration_s: float
    energy_j: float
    timings: tuple[RequestTimings, ...]
    records: tuple[WindowRecord, ...]
    clock_changes: int
    final: EngineSample
    tuner: Tuner


def run_virtual(
    requests: Iterable[Request],
    tuner_config: TunerConfig,
    *,
    gpu: str = "rtx_a6000",
    model: str = "llama-3.1-8b",
    engine_config: EngineConfig | None = None,
    push_interval_s: float = PUSH_INTERVAL_S,
    duration_s: float = 0.0,
    seed: int = 0,
) -> VirtualRun:
    """Run requests through one tuned replica, as fast as the machine computes.

    Args:
        requests: the workload, in order of arrival.
        tuner_config: the tuner's settings; policy `default` is the baseline.
        gpu: a GPU profile's name or path.
        model: the engine model, one of the profile's.
        engine_config: the scheduler's settings.
        push_interval_s: simulated time between the engine's pushes of statistics.
        duration_s: run at least so long, so that runs of the same workload can be compared.
        seed: seeds the GPU's noise.

    The same arguments give the same result.
    """
    profile = load_gpu_profile(gpu)
    model_profile = profile.model_profile(model)
    config = (engine_config or EngineConfig()).for_model(model_profile)
    device = Device(profile, model_profile, seed=seed)
    core = BatchingEngine(config, functools.partial(prefill_attention_s, model_profile))
    timings: list[RequestTimings] = []
    records: list[WindowRecord] = []
    engine = VirtualEngine(core, device, timings.append)
    engine.submit(requests)
    clock, inbox = ManualClock(), EngineInbox()
    tuner = Tuner(
        tuner_config,
        gpu=InMemoryGpu(device, clock),
        engine=inbox,
        serve=ServeMetrics(max_age_s=0.0),
        clock=clock,
        on_record=records.append,
    )
    loop = tuner.run()
    push_s = 0.0
    while not engine.drained or clock.now_s() < duration_s:
        wake_s = next(loop)
        while push_s <= wake_s:
            engine.run_until(push_s)
            device.advance(push_s)
            inbox.push(engine.sample(push_s))
            push_s += push_interval_s
        engine.run_until(wake_s)
        device.advance(wake_s)
        clock.advance_to(wake_s)
    end_s = clock.now_s()
    run = VirtualRun(
        duration_s=end_s,
        energy_j=device.energy_j,
        timings=tuple(timings),
        records=tuple(records),
        clock_changes=tuner.clock_changes,
        final=engine.sample(end_s),
        tuner=tuner,
    )
    loop.close()
    return run
