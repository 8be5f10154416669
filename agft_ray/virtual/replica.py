"""One replica in virtual time: the engine, loop and policy that run under Ray, or a governor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from agft_ray.clock import ManualClock
from agft_ray.gpu.simulated import InMemoryGpu
from agft_ray.policy.registry import build_policy
from agft_ray.policy.static import StaticPolicy
from agft_ray.policy.step import StepGovernor
from agft_ray.settings import TunerConfig
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import prefill_attention_s
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.simulation.work_done import WorkDone
from agft_ray.telemetry.energy_weight import USUAL, EnergyWeightConfig, Weigh, read_series
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.tuner import READINGS_PER_WINDOW, Tuner, WindowRecord
from agft_ray.types import Arm, EngineSample
from agft_ray.virtual.best_clocks import BestClocks
from agft_ray.virtual.governed import GovernedSteps
from agft_ray.virtual.routers import RouterName
from agft_ray.virtual.switched import SwitchedClocks
from agft_ray.workloads.requests import Request, RequestTimings

INBOX_SAMPLES = 4 * READINGS_PER_WINDOW
"""Engine statistics kept for a tuner: more than a window's, one for each time it wakes."""


@dataclass(frozen=True, slots=True)
class FleetSetup:
    """What is simulated: replicas with a GPU each, behind a router.

    Attributes:
        gpu: the GPU's profile.
        model: the engine model, one of the profile's.
        engine: the scheduler's settings.
        tuner: the tuner's settings, the same for every replica.
        governor: makes the step governor of a replica (given its number), which then takes the
            tuner's place.
        replicas: how many.
        router: how requests find a replica.
        seed: seeds GPU noise, policies and router, each replica with a stream of its own.
        duration_s: simulate at least so long, and until every request is answered.
        grid_s: length of the measured windows, which are the same for every policy.
        share_interval_s: time between exchanges of experience, where the tuner shares it.
        jumps: jump over series of decode steps; without, the same takes longer.
        noise: step times and energy counters vary as the profile's section `noise` says.
    """

    gpu: GpuProfile
    model: str
    engine: EngineConfig
    tuner: TunerConfig
    governor: Callable[[int], StepGovernor] | None = None
    replicas: int = 1
    router: RouterName = "power_of_two"
    seed: int = 0
    duration_s: float = 0.0
    grid_s: float = 2.0
    share_interval_s: float = 1.0
    jumps: bool = True
    noise: bool = False

    def stream(self, replica: int) -> int:
        """A seed for one replica, independent of the others'."""
        return int(np.random.SeedSequence([self.seed, replica]).generate_state(1)[0])


@dataclass(frozen=True, slots=True)
class GridWindow:
    """What happened on a replica between two points of a fixed grid of time, whatever the tuner
    did meanwhile."""

    replica: int
    index: int
    start_s: float
    end_s: float
    energy_j: float
    """The device's own, exact."""
    sm_clock_mhz: float
    """Mean effective SM clock over time, idle or not."""
    itl_sum_s: float
    itl_count: int
    ttft_sum_s: float
    ttft_count: int
    generation_tokens: int
    prompt_tokens: int
    running: int
    """At the end."""
    waiting: int
    """At the end."""
    arm: Arm
    """What was locked at the end."""
    best_energy_j: float
    """Expected at the best clocks for the same work; see `BestClocks`."""
    regret_j: float
    """Energy beyond that; what was saved by exceeding a bound is not subtracted."""
    busy_s: float
    """How long steps ran."""
    over_bound: int
    """1 if steps with prefill, or the others, took longer than they may, else 0."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told what happens, with the number of the replica."""

    on_request: Callable[[int, RequestTimings], None] = lambda replica, timings: None
    """A request is answered."""
    on_window: Callable[[GridWindow], None] = lambda window: None
    """A window of the grid is over."""
    on_record: Callable[[int, WindowRecord], None] = lambda replica, record: None
    """A tuner has finished a control step."""


LISTENERS = tuple(field.name for field in fields(Listeners))


@dataclass(frozen=True, slots=True)
class _GridPoint:
    """The cumulative figures at a point of the grid."""

    engine: EngineSample
    energy_j: float
    sm_clock_mhz_s: float


@dataclass(frozen=True, slots=True)
class ReplicaTotals:
    """What came of one replica."""

    energy_j: float
    clock_changes: int
    engine: EngineSample
    """Its engine's statistics at the end, counted from the start."""


class VirtualReplica:
    """Engine, GPU and tuner (or governor) of one replica; time moves with `advance_to` only.

    What the tuner sees is what it sees under Ray, save that statistics are pushed whenever it
    wakes and so are always fresh, and that there are no metrics of Ray Serve.
    """

    def __init__(self, setup: FleetSetup, index: int, listeners: Listeners) -> None:
        model = setup.gpu.model_profile(setup.model)
        self.index = index
        self.ongoing = 0
        """Requests submitted and not yet answered."""
        self.clock = ManualClock()
        self._setup, self._listeners = setup, listeners
        self._done = WorkDone()
        self._device = Device(
            setup.gpu, model, seed=setup.stream(index), noise=setup.noise, done=self._done
        )
        self._best = BestClocks(setup.gpu, model, setup.tuner.slo, setup.tuner.bound)
        core = BatchingEngine(
            setup.engine.for_model(model), functools.partial(prefill_attention_s, model)
        )
        self._gpu = InMemoryGpu(self._device, self.clock, uuid=f"GPU-simulated-{index}")
        self._inbox = EngineInbox(INBOX_SAMPLES)
        self._governed: GovernedSteps | None = None
        self.tuner: Tuner | None = None
        self._wake_s = math.inf
        if setup.governor is not None:
            arms = setup.tuner.arms(self._gpu.arms)
            self._governed = GovernedSteps(setup.governor(index), arms, self._device, core)
        self._switched: SwitchedClocks | None = None
        if self._governed is None:
            self.tuner = self._new_tuner()
            self._switched = SwitchedClocks(self.tuner, self.clock)
        self._engine = VirtualEngine(
            core,
            self._device,
            self._on_finish,
            hook=self._governed,
            phases=self._switched,
            jumps=setup.jumps,
        )
        self._grid_index = 0
        self._grid_end_s = setup.grid_s
        self._grid_start = self._grid_point()
        if self.tuner is not None:
            self._loop = self.tuner.run()
            self._wake_s = next(self._loop)
        if self._governed is not None:
            self._governed.on_empty(0.0)
        if self._switched is not None:
            self._switched.on_empty(0.0)

    def _new_tuner(self) -> Tuner:
        config = _reseeded(self._setup.tuner, self._setup.stream(self.index))
        policy = build_policy(config.policy)
        # Each reading cuts a series of decode steps. A policy that learns nothing needs none
        # within the window: they place its energy, and average its clock and queue.
        readings = 1 if isinstance(policy, StaticPolicy) else READINGS_PER_WINDOW
        return Tuner(
            config,
            policy=policy,
            readings_per_window=readings,
            gpu=self._gpu,
            engine=self._inbox,
            serve=ServeMetrics(max_age_s=0.0),
            clock=self.clock,
            weigh=_weigher(config.energy_weight, self.clock),
            on_record=functools.partial(self._listeners.on_record, self.index),
        )

    @property
    def drained(self) -> bool:
        """Everything submitted is answered."""
        return self._engine.drained

    @property
    def energy_j(self) -> float:
        """Energy since the start, exact."""
        return self._device.energy_j

    @property
    def clock_changes(self) -> int:
        """How often the policy's or governor's clock changed."""
        if self._governed is not None:
            return self._governed.clock_changes
        assert self.tuner is not None
        return self.tuner.control.changes

    def sample(self) -> EngineSample:
        """The engine's statistics now."""
        return self._engine.sample(self.clock.now_s())

    def totals(self) -> ReplicaTotals:
        """What has come of it so far."""
        return ReplicaTotals(self.energy_j, self.clock_changes, self.sample())

    def submit(self, request: Request) -> None:
        """Hand over a request that arrives now, and wake a tuner that waits for work, as under Ray.

        Raises `ValueError` if the request can never be served.
        """
        self._engine.submit((request,))
        self.ongoing += 1
        if self._switched is not None:
            self._switched.on_arrival(request.arrival_s)
        if self.ongoing == 1 and self.tuner is not None and self.tuner.waits_for_work:
            self._resume_loop()

    def advance_to(self, t_s: float) -> None:
        """Let time pass: engine, tuner and grid, each when it is due, up to and including `t_s`."""
        while (due_s := min(self._wake_s, self._grid_end_s)) <= t_s:
            self._run_to(due_s)
            if due_s == self._grid_end_s:
                self._close_window()
            if due_s == self._wake_s:
                self._resume_loop()
        self._run_to(t_s)

    def close(self) -> None:
        """End the tuner's loop, which resets the clocks."""
        if self.tuner is not None:
            self._loop.close()

    def _resume_loop(self) -> None:
        self._inbox.push(self.sample())
        self._wake_s = next(self._loop)

    def _run_to(self, t_s: float) -> None:
        self._engine.run_until(t_s)
        self._device.advance(t_s)
        self.clock.advance_to(t_s)

    def _on_finish(self, timings: RequestTimings) -> None:
        self.ongoing -= 1
        self._listeners.on_request(self.index, timings)

    def _grid_point(self) -> _GridPoint:
        return _GridPoint(self.sample(), self._device.energy_j, self._device.sm_clock_mhz_s)

    def _close_window(self) -> None:
        start, end = self._grid_start, self._grid_point()
        before, after = start.engine, end.engine
        energy_j, duration_s = end.energy_j - start.energy_j, after.t_s - before.t_s
        regret = self._best.regret(self._done, duration_s, energy_j)
        busy_s = self._done.busy_s
        self._done.clear()
        window = GridWindow(
            replica=self.index,
            index=self._grid_index,
            start_s=before.t_s,
            end_s=after.t_s,
            energy_j=energy_j,
            sm_clock_mhz=(end.sm_clock_mhz_s - start.sm_clock_mhz_s) / duration_s,
            itl_sum_s=after.itl_sum_s - before.itl_sum_s,
            itl_count=after.itl_count - before.itl_count,
            ttft_sum_s=after.ttft_sum_s - before.ttft_sum_s,
            ttft_count=after.ttft_count - before.ttft_count,
            generation_tokens=after.generation_tokens - before.generation_tokens,
            prompt_tokens=after.prompt_tokens - before.prompt_tokens,
            running=after.running,
            waiting=after.waiting,
            arm=self._device.locked,
            best_energy_j=regret.best_energy_j,
            regret_j=regret.regret_j,
            busy_s=busy_s,
            over_bound=int(regret.is_over_bound),
        )
        self._grid_start = end
        self._grid_index += 1
        self._grid_end_s = (self._grid_index + 1) * self._setup.grid_s
        self._listeners.on_window(window)


def _weigher(config: EnergyWeightConfig | None, clock: ManualClock) -> Weigh:
    """Weights of a file whose first row is of the run's start."""
    if config is None:
        return lambda _: USUAL
    series = read_series(config)
    return lambda _: series.at(series.start_s + clock.now_s())


def _reseeded(config: TunerConfig, stream: int) -> TunerConfig:
    """The settings with a seed of the replica's own, where the policy has one."""
    if not hasattr(config.policy, "seed"):
        return config
    policy = config.policy.model_copy(update={"seed": config.policy.seed + stream})
    return config.model_copy(update={"policy": policy})
