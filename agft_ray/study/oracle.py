"""The oracle `oracle_pair`: the best constant clocks on this very trace, in hindsight.

One for steps with prefill, one for steps that only decode, one while the engine is empty. It stands
outside the policy interface and looks into the simulator: it knows the trace, the power cap and
what every plan would have come to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from agft_ray.results.labels import ORACLE_PAIR
from agft_ray.results.record import RunRecord
from agft_ray.simulation.physics import StepWork, effective_sm_clock_mhz
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.study.bounds import Bounds, BoundsWatch, allowed
from agft_ray.study.plan_search import Point, search
from agft_ray.study.policy_specs import PolicySpec, pair
from agft_ray.study.run import Job, Run
from agft_ray.study.static import clock_grid

OracleObjective = Literal["edp", "energy"]
Measure = Callable[[Sequence[Job]], Sequence[RunRecord | None]]
"""The records of all jobs, in their order; None for what was abandoned."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Clocks to choose from in MHz, ascending; while the engine is empty default clocks, too."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    idle: tuple[int, ...]

    @classmethod
    def of(cls, profile: GpuProfile, model: str, step_mhz: int) -> Axes:
        """A grid from the highest clock down, and the lowest one while empty.

        Clocks that the power cap makes alike are taken once: for steps with prefill, and for decode
        steps of a single sequence, which draw the least. They differ only in the 25 ms until a
        change of clock acts, when the lowest draws the least: that one is kept.
        """
        grid = clock_grid(profile, step_mhz, "--oracle-step-mhz")
        return cls(
            prefill=distinct(grid, profile, model, StepWork(prefill_tokens=1)),
            decode=distinct(grid, profile, model, StepWork(0, 1, 1)),
            idle=tuple(sorted({profile.min_sm_clock_mhz, *grid})),
        )

    @property
    def sizes(self) -> Point:
        """As `search` counts them."""
        return len(self.prefill), len(self.decode), len(self.idle) + 1

    def spec(self, point: Point) -> PolicySpec:
        """The policy of a plan."""
        prefill, decode, idle = point
        busy_mhz = self.prefill[prefill], self.decode[decode]
        return pair(*busy_mhz, self.idle[idle] if idle < len(self.idle) else "default")


def distinct(
    clocks: Sequence[int], profile: GpuProfile, model: str, work: StepWork
) -> tuple[int, ...]:
    """The clocks that are different machines for such a step: the lowest of those that the power
    cap makes equal."""
    model_profile = profile.model_profile(model)
    effective: dict[int, int] = {}
    for clock in sorted(clocks):
        effective.setdefault(effective_sm_clock_mhz(profile, model_profile, work, clock), clock)
    return tuple(effective.values())


@dataclass(frozen=True, slots=True)
class Oracle:
    """Judges plans over all seeds together, each relative to default clocks with the same seed."""

    templates: Mapping[int, Job]
    """A job of each seed, of whatever policy."""
    defaults: Mapping[int, Run]
    """The runs at default clocks by seed."""
    axes: Axes
    objective: OracleObjective
    measure: Measure

    def best(self) -> list[RunRecord]:
        """The records of the best plan within the bounds, one a seed; empty if there is none."""
        point = search(self._scores, self.axes.sizes)
        if point is None:
            return []
        spec = self.axes.spec(point)
        jobs = [
            replace(template, spec=spec, default=self.defaults[seed])
            for seed, template in self.templates.items()
        ]
        choice = spec.label.partition(":")[2]
        records = [record for record in self.measure(jobs) if record is not None]
        return [replace(record, policy=ORACLE_PAIR, choice=choice) for record in records]

    def _scores(self, points: Sequence[Point]) -> list[float]:
        seeds = list(self.templates)
        bounds = [self._bounds(seed) for seed in seeds]
        jobs = [
            replace(
                self.templates[seed],
                spec=self.axes.spec(point),
                watch=BoundsWatch(bound, len(seeds)),
                keeps_requests=True,
            )
            for point in points
            for seed, bound in zip(seeds, bounds, strict=True)
        ]
        records = iter(self.measure(jobs))
        return [self._score(bounds, [next(records) for _ in seeds]) for _ in points]

    def _bounds(self, seed: int) -> Bounds:
        scenario = self.templates[seed].scenario
        return Bounds.of(self.defaults[seed].record, scenario.slo, scenario.bound)

    def _score(self, bounds: Sequence[Bounds], runs: Sequence[RunRecord | None]) -> float:
        """Energy or EDP relative to default clocks, mean over seeds; infinite out of bounds."""
        finished = [run for run in runs if run is not None]
        if len(finished) < len(runs) or not allowed(bounds, finished):
            return math.inf
        name = "edp_j_s" if self.objective == "edp" else "energy_j"
        changes = []
        for run, default in zip(finished, self.defaults.values(), strict=True):
            value, base = run.value(name), default.record.value(name)
            changes.append(value / base if value is not None and base else math.inf)
        return fmean(changes)
