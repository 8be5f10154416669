"""`best_steps`: the energy of every step of the default run at its own best clock, queues ignored.

It looks into the simulator: it records the steps and asks the simulated GPU what each would cost
at every clock, changes of clock being free and instant. It is no lower bound: at slower clocks more
requests decode together, in fewer steps, and no latency bound limits the time of all steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from agft_ray.results.distribution import Distribution
from agft_ray.results.labels import BEST_STEPS
from agft_ray.results.record import RunRecord
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.physics import StepWork, prefill_attention_s
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.study.pool import Report
from agft_ray.study.run import Job, fleet_setup
from agft_ray.virtual.run import FleetSetup, run_fleet
from agft_ray.workloads.requests import Request, RequestTimings

CONTEXT_TOKENS = 1024
"""Decode steps of one batch size whose contexts differ by less choose their clock together: time
and energy are linear in the context, so nothing else is lost."""
SETTLED_S = 1.0
"""After this, a change of clock is in force."""


@dataclass(frozen=True, slots=True)
class LeastEnergy:
    """The least energy of all steps, and how it was reached."""

    energy_j: float
    multiplier_w: float
    """Of delay: what a second of step time is charged, beside its energy above idle."""
    delay_increase: float
    """Time of all steps relative to default clocks, less 1."""


def perform_best_steps(job: Job, report: Report) -> RunRecord:
    """The record of `best_steps` for one seed; latencies do not exist, so neither does EDP.

    `job.default` is the run at default clocks. `choice` is the multiplier.
    """
    assert job.default is not None
    setup = fleet_setup(job.scenario, job.spec, job.seed)
    steps = _Steps()
    for requests in _by_replica(job, setup, report):
        _record_steps(requests, setup, steps)
    record = job.default.record
    least = least_energy(
        *step_costs(setup, steps),
        delay_s=steps.time_s,
        idle_w=_idle_w(setup),
        total_s=record.duration_s * setup.replicas,
        max_increase=job.scenario.bound,
    )
    tokens = record.output_tokens
    return replace(
        record,
        policy=BEST_STEPS,
        energy_j=least.energy_j,
        mean_power_w=least.energy_j / (record.duration_s * setup.replicas),
        energy_per_output_token_j=least.energy_j / tokens if tokens else None,
        ttft_s=Distribution(),
        tpot_s=Distribution(),
        e2e_s=Distribution(),
        edp_j_s=None,
        slo_attainment=None,
        clock_changes=None,
        worst_exploration_tpot_ratio=None,
        sm_clock_mhz=None,
        choice=f"{least.multiplier_w:.0f} W, {least.delay_increase:+.1%}",
    )


def least_energy(
    energy_j: np.ndarray,
    time_s: np.ndarray,
    *,
    delay_s: float,
    idle_w: float,
    total_s: float,
    max_increase: float,
) -> LeastEnergy:
    """Energy over `total_s` with every kind of step at the clock that minimises
    `energy above idle + multiplier * time`.

    Rows are kinds of steps, columns clocks. The multiplier is the smallest, from 0, that keeps the
    summed time within `delay_s` plus `max_increase`; it is found by bisection.
    """
    above_j = energy_j - idle_w * time_s
    limit_s = delay_s * (1.0 + max_increase)

    def spent(multiplier_w: float) -> tuple[float, float]:
        best = np.argmin(above_j + multiplier_w * time_s, axis=1)
        rows = np.arange(len(best))
        return float(above_j[rows, best].sum()), float(time_s[rows, best].sum())

    low, high = 0.0, 1.0
    if spent(low)[1] <= limit_s:
        high = 0.0
    while spent(high)[1] > limit_s and high < 1e9:
        low, high = high, 2.0 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if spent(middle)[1] > limit_s else (low, middle)
    above, time = spent(high)
    return LeastEnergy(above + idle_w * total_s, high, time / delay_s - 1.0 if delay_s else 0.0)


class _Steps:
    """Steps by kind, as a hook of the engine: how many and their mean, and the time of all."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self._prefill: list[StepWork] = []
        self._decode: dict[tuple[int, int], list[int]] = {}

    def before_step(self, t_s: float, work: StepWork) -> None:
        if work.prefill_tokens:
            self._prefill.append(work)
            return
        kind = (work.decode_sequences, work.context_tokens // CONTEXT_TOKENS)
        sums = self._decode.setdefault(kind, [0, 0])
        sums[0] += 1
        sums[1] += work.context_tokens

    def after_step(self, start_s: float, end_s: float) -> None:
        self.time_s += end_s - start_s

    def on_empty(self, t_s: float) -> None:
        """Nothing to record."""

    def kinds(self) -> Iterator[tuple[StepWork, int]]:
        """A step of each kind, and how many there were."""
        for work in self._prefill:
            yield work, 1
        for (sequences, _), (count, context) in self._decode.items():
            yield StepWork(0, sequences, round(context / count)), count


def step_costs(setup: FleetSetup, steps: _Steps) -> tuple[np.ndarray, np.ndarray]:
    """Energy and time of all steps of each kind (rows) at each supported clock (columns)."""
    kinds = list(steps.kinds())
    clocks = setup.gpu.supported_sm_clocks_mhz
    costs = np.empty((2, len(kinds), len(clocks)))
    for column, clock in enumerate(clocks):
        device = _locked(setup, clock)
        for row, (work, count) in enumerate(kinds):
            start_s, start_j = device.t_s, device.energy_j
            device.begin_step(start_s, work)
            costs[1, row, column] = count * (device.finish_step() - start_s)
            costs[0, row, column] = count * (device.energy_j - start_j)
    return costs[0], costs[1]


def _locked(setup: FleetSetup, sm_clock_mhz: int) -> Device:
    device = Device(setup.gpu, setup.gpu.model_profile(setup.model))
    device.lock(0.0, sm_clock_mhz)
    device.advance(SETTLED_S)
    return device


def _idle_w(setup: FleetSetup) -> float:
    device = _locked(setup, setup.gpu.min_sm_clock_mhz)
    start_j = device.energy_j
    device.advance(2.0 * SETTLED_S)
    return (device.energy_j - start_j) / SETTLED_S


def _by_replica(job: Job, setup: FleetSetup, report: Report) -> Iterator[Iterable[Request]]:
    """The requests that each replica had in the default run."""
    routed: dict[str, int] = {}

    def on_request(replica: int, timings: RequestTimings) -> None:
        routed[timings.request_id] = replica

    run_fleet(job.scenario.requests(job.seed), setup, on_request=on_request, on_progress=report)
    for replica in range(setup.replicas):
        requests = job.scenario.requests(job.seed)
        yield (request for request in requests if routed.get(request.request_id) == replica)


def _record_steps(requests: Iterable[Request], setup: FleetSetup, steps: _Steps) -> None:
    """One replica at default clocks once more, step by step."""
    model = setup.gpu.model_profile(setup.model)
    core = BatchingEngine(
        setup.engine.for_model(model), functools.partial(prefill_attention_s, model)
    )
    engine = VirtualEngine(core, Device(setup.gpu, model), hook=steps)
    for request in requests:
        engine.run_until(request.arrival_s)
        engine.submit((request,))
    engine.run_until(math.inf)
