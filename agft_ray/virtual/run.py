"""A fleet in virtual time: the loop, policies and engine that run under Ray, behind a router."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agft_ray.clock import ManualClock
from agft_ray.settings import TunerConfig
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.tuner import WindowRecord
from agft_ray.types import EngineSample
from agft_ray.virtual.parallel import Workers
from agft_ray.virtual.replica import LISTENERS, Listeners, ReplicaTotals, VirtualReplica
from agft_ray.virtual.replica import FleetSetup as FleetSetup
from agft_ray.virtual.replica import GridWindow as GridWindow
from agft_ray.virtual.routers import build_router, fewest
from agft_ray.virtual.sharing import ExperienceSharing, shares
from agft_ray.workloads.requests import Request, RequestTimings


@dataclass(frozen=True, slots=True)
class FleetTotals:
    """What came of a run. Requests that could never be served are `rejected`, not `requests`."""

    duration_s: float
    energy_j: float
    requests: int
    rejected: int
    prompt_tokens: int
    output_tokens: int
    clock_changes: int
    replicas: tuple[ReplicaTotals, ...]


def _to_nobody(*told: Any) -> None:
    """A callback that nobody has given: nothing need be sent to it from other processes."""


def run_fleet(
    requests: Iterable[Request],
    setup: FleetSetup,
    *,
    workers: int = 1,
    on_request: Callable[[int, RequestTimings], None] = _to_nobody,
    on_window: Callable[[GridWindow], None] = _to_nobody,
    on_record: Callable[[int, WindowRecord], None] = _to_nobody,
    on_progress: Callable[[float], None] = lambda t_s: None,
) -> FleetTotals:
    """Run requests, in order of arrival, through a fleet, as fast as the machine computes.

    Nothing that grows with the run is kept: answered requests, windows of the grid and the tuners'
    records go out through the callbacks, in order of time for each replica. `on_progress` is told
    the simulated time about once a window. The run ends on the grid, at or after `duration_s`,
    with every request answered. The same arguments give the same result.

    With several `workers` the replicas are spread over so many freshly started processes. The
    result is the same, and so are the calls back, but for `on_progress`, which come in batches.
    `setup` must be picklable. Replicas that share experience meet too often for that: such a fleet
    runs in one process.
    """
    listeners = Listeners(on_request, on_window, on_record)
    if workers > 1 and setup.replicas > 1 and not shares(setup):
        wanted = [n for n in LISTENERS if getattr(listeners, n) is not _to_nobody]
        return _run_spread(requests, setup, workers, listeners, wanted, on_progress)
    fleet = _Fleet(setup, listeners, on_progress)
    for request in requests:
        fleet.take(request)
    return fleet.finish()


def _run_spread(
    requests: Iterable[Request],
    setup: FleetSetup,
    count: int,
    listeners: Listeners,
    wanted: Sequence[str],
    on_progress: Callable[[float], None],
) -> FleetTotals:
    workers = Workers(count, setup, listeners, wanted)
    try:
        duration_s = workers.run(requests, on_progress)
        return _summed(workers.totals(), duration_s, workers.rejected)
    finally:
        workers.close()


def _summed(replicas: Sequence[ReplicaTotals], duration_s: float, rejected: int) -> FleetTotals:
    return FleetTotals(
        duration_s=duration_s,
        energy_j=sum(total.energy_j for total in replicas),
        requests=sum(total.engine.e2e_count for total in replicas),
        rejected=rejected,
        prompt_tokens=sum(total.engine.prompt_tokens for total in replicas),
        output_tokens=sum(total.engine.generation_tokens for total in replicas),
        clock_changes=sum(total.clock_changes for total in replicas),
        replicas=tuple(replicas),
    )


class _Fleet:
    def __init__(
        self, setup: FleetSetup, listeners: Listeners, on_progress: Callable[[float], None]
    ) -> None:
        self._setup, self._on_progress = setup, on_progress
        self._clock = ManualClock()
        self._replicas = [VirtualReplica(setup, i, listeners) for i in range(setup.replicas)]
        self._router = build_router(setup.router, setup.replicas, setup.seed)
        self._sharing = ExperienceSharing(setup, self._replicas, self._clock)
        self._sharing.exchange()
        self._exchanges = 1
        self._shares = self._sharing.is_needed
        self._windows = self._rejected = 0

    def take(self, request: Request) -> None:
        """Let time pass until the request arrives, and route it."""
        t_s = request.arrival_s
        self._pass(t_s)
        replica = self._replicas[fewest(self._router.candidates(), self._ongoing)]
        replica.advance_to(t_s)
        try:
            replica.submit(request)
        except ValueError:
            self._rejected += 1

    def _ongoing(self, index: int) -> int:
        """Replicas that nobody asks about stay behind."""
        replica = self._replicas[index]
        replica.advance_to(self._clock.now_s())
        return replica.ongoing

    def _pass(self, t_s: float) -> None:
        """Move the fleet's time, with all replicas abreast for each exchange of experience."""
        while self._shares and (due_s := self._exchanges * self._setup.share_interval_s) <= t_s:
            self._clock.advance_to(due_s)
            self._advance_all()
            self._sharing.exchange()
            self._exchanges += 1
        self._clock.advance_to(t_s)
        if t_s >= self._windows * self._setup.grid_s:
            self._on_progress(t_s)
            self._windows = math.floor(t_s / self._setup.grid_s) + 1

    def _advance_all(self) -> None:
        for replica in self._replicas:
            replica.advance_to(self._clock.now_s())

    def finish(self) -> FleetTotals:
        """Go on to a point of the grid where the duration is over and everything is answered."""
        setup, replicas = self._setup, self._replicas
        windows = math.ceil(max(setup.duration_s, self._clock.now_s()) / setup.grid_s)
        while True:
            self._pass(windows * setup.grid_s)
            self._advance_all()
            if all(replica.drained for replica in replicas):
                break
            windows += 1
        totals = [replica.totals() for replica in replicas]
        for replica in replicas:
            replica.close()
        return _summed(totals, self._clock.now_s(), self._rejected)


@dataclass(frozen=True, slots=True)
class VirtualRun:
    """All that came of a short run of one replica."""

    duration_s: float
    energy_j: float
    timings: tuple[RequestTimings, ...]
    records: tuple[WindowRecord, ...]
    clock_changes: int
    final: EngineSample


def run_virtual(
    requests: Iterable[Request],
    tuner_config: TunerConfig,
    *,
    gpu: str = "rtx_a6000",
    model: str = "llama-3.1-8b",
    engine_config: EngineConfig | None = None,
    duration_s: float = 0.0,
    seed: int = 0,
) -> VirtualRun:
    """`run_fleet` of one replica with everything kept in memory: for tests and short runs."""
    setup = FleetSetup(
        gpu=load_gpu_profile(gpu),
        model=model,
        engine=engine_config or EngineConfig(),
        tuner=tuner_config,
        seed=seed,
        duration_s=duration_s,
        grid_s=tuner_config.window_s,
    )
    timings: list[RequestTimings] = []
    records: list[WindowRecord] = []
    totals = run_fleet(
        requests,
        setup,
        on_request=lambda replica, timing: timings.append(timing),
        on_record=lambda replica, record: records.append(record),
    )
    return VirtualRun(
        duration_s=totals.duration_s,
        energy_j=totals.energy_j,
        timings=tuple(timings),
        records=tuple(records),
        clock_changes=totals.clock_changes,
        final=totals.replicas[0].engine,
    )
