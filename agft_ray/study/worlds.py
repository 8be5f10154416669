"""Worlds: one GPU and LLM as they may be, for policies to be judged in the median and the worst."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from agft_ray.errors import AgftError, ConfigError
from agft_ray.results.comparison import standings
from agft_ray.results.labels import DEFAULT
from agft_ray.results.record import RunRecord
from agft_ray.simulation.profiles import GpuProfile
from agft_ray.study.pool import OnProgress, Pool
from agft_ray.study.sensitivity import ranges_of
from agft_ray.study.study import OnPhase, Study

WORLDS = 24
DRAW = "draw-"
"""A world so called, with a number from 1, is drawn at random: the number is its seed."""
ATTEMPTS = 100
DIGITS = 6
"""Significant, of what is drawn: as many as a record shows."""
JUDGED = (
    ("energy", "energy_j"),
    ("EDP", "edp_j_s"),
    ("TTFT mean", "ttft_s.mean"),
    ("TTFT p99", "ttft_s.p99"),
    ("TPOT mean", "tpot_s.mean"),
    ("TPOT p99", "tpot_s.p99"),
    ("E2E mean", "e2e_s.mean"),
    ("E2E p99", "e2e_s.p99"),
)
"""The figures by which policies are judged: less is better."""

Ends = Mapping[str, Literal["low", "high"]]
_PREFILL = "model.attention.prefill_*_us"
CORNERS: Mapping[str, tuple[str, Ends]] = {
    "nominal": ("the profile as it is", {}),
    "decode-power-low": (
        "decode draws little",
        {
            "power.decode.single": "low",
            "power.decode.batch_scale": "high",
            "power.decode.memory_w": "low",
            "power.decode.*_activity": "low",
        },
    ),
    "decode-power-high": (
        "decode draws much",
        {
            "power.decode.single": "high",
            "power.decode.batch_scale": "low",
            "power.decode.memory_w": "high",
            "power.decode.*_activity": "high",
        },
    ),
    "issue-share-low": ("decode hardly slows with the clock", {"model.issue_share": "low"}),
    "issue-share-high": ("decode slows with the clock", {"model.issue_share": "high"}),
    "idle-clock-low": ("default clocks drop soon when empty", {"governor.*": "low"}),
    "idle-clock-high": ("default clocks stay up when empty", {"governor.*": "high"}),
    "idle-power-low": ("an empty GPU draws little", {"power.idle_*": "low"}),
    "idle-power-high": ("an empty GPU draws much", {"power.idle_*": "high"}),
    "slow-clock-changes": ("clocks change late (200 ms)", {"clock_change.*": "high"}),
    "noisy-steps": (
        "much noise and many outliers",
        {
            "noise.step_cv": "high",
            "noise.outlier_*": "high",
            "noise.counter_noise": "high",
            "power_noise": "high",
        },
    ),
    "steep-voltage": (
        "voltage rises early and far: high clocks cost more",
        {"power.voltage_rise": "high", "power.knee_sm_clock_mhz": "low"},
    ),
    "flat-voltage": (
        "voltage rises late and little",
        {"power.voltage_rise": "low", "power.knee_sm_clock_mhz": "high"},
    ),
    "slow-host": (
        "the host takes long for each step",
        {"model.*host_*ms": "high", "model.all_reduce_*": "high"},
    ),
    "strong-prefill": ("prefill computes fast", {"model.token_ms": "low", _PREFILL: "low"}),
    "weak-prefill": ("prefill computes slowly", {"model.token_ms": "high", _PREFILL: "high"}),
}
"""What each is, and the ends its ranges are at; `model.` stands for the LLM's own."""


@dataclass(frozen=True, slots=True)
class World:
    """A GPU profile as it may be, with noise: the numbers in which it differs, by dotted path."""

    name: str
    about: str
    values: Mapping[str, float]


def worlds_of(profile: GpuProfile, model: str) -> tuple[World, ...]:
    """The 24 worlds of a profile and one of its LLMs: corners, then random draws.

    Corners that the profile has no range for are left out, and drawn ones take their place. Always
    the same ones. Raises `AgftError` for a profile without ranges.
    """
    corners = [world for name in CORNERS if (world := _corner(profile, model, name)) is not None]
    draws = range(1, WORLDS - len(corners) + 1)
    return (*corners, *(_drawn(profile, model, number) for number in draws))


def named_worlds(profile: GpuProfile, model: str, names: Sequence[str]) -> tuple[World, ...]:
    """Some worlds by name; `draw-N` may have any number from 1. Raises `ConfigError`."""
    known = {world.name: world for world in worlds_of(profile, model)}
    found, problems = [], []
    for name in dict.fromkeys(names):
        drawn = re.fullmatch(rf"{DRAW}([1-9][0-9]*)", name)
        if name in known:
            found.append(known[name])
        elif drawn is not None:
            found.append(_drawn(profile, model, int(drawn[1])))
        else:
            problems.append(f"there is no world {name!r}; choose of: {', '.join(known)}, or draw-N")
    if problems:
        raise ConfigError("--worlds", problems)
    return tuple(found)


def _ranges(profile: GpuProfile, model: str) -> dict[str, tuple[float, float]]:
    ranges = ranges_of(profile, model)
    if not ranges:
        raise AgftError(
            f"GPU profile {profile.name} has no ranges to make worlds of; give its uncertain "
            "numbers one under `ranges`"
        )
    return ranges


def _corner(profile: GpuProfile, model: str, name: str) -> World | None:
    about, ends = CORNERS[name]
    values = {}
    for path, (low, high) in _ranges(profile, model).items():
        local = path.replace(f"models.{model}.", "model.")
        for pattern, end in ends.items():
            if fnmatchcase(local, pattern):
                values[path] = low if end == "low" else high
    return World(name, about, values) if values or not ends else None


def _drawn(profile: GpuProfile, model: str, number: int) -> World:
    """Every range uniform and by itself; drawn again if the numbers together are not valid."""
    name, ranges = f"{DRAW}{number}", _ranges(profile, model)
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{profile.name}/{model}/{number}/{attempt}")
        values = {path: _draw(profile, path, ranges[path], rng) for path in sorted(ranges)}
        try:
            profile.with_values(values)
        except ConfigError:
            continue
        return World(name, "every range at random", values)
    raise AgftError(f"GPU profile {profile.name}: no valid draw from its ranges; narrow them")


def _draw(profile: GpuProfile, path: str, ends: tuple[float, float], rng: random.Random) -> float:
    value = rng.uniform(*ends)
    if path == "governor.idle_sm_clock_mhz":
        return max(profile.supported_at_or_below(round(value)), ends[0])
    if isinstance(profile.numbers()[path], int):
        return float(round(value))
    return min(max(float(f"{value:.{DIGITS}g}"), ends[0]), ends[1])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the policies in one world."""

    world: World
    records: tuple[RunRecord, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One figure of one policy: its change in %, mean over seeds, against default clocks in the
    same world, by world."""

    policy: str
    metric: str
    changes_percent: Mapping[str, float]

    @property
    def ordered(self) -> list[str]:
        """Worlds, that of the largest change last."""
        return sorted(self.changes_percent, key=lambda world: self.changes_percent[world])

    @property
    def median(self) -> str:
        """The world in the middle; of two the worse one."""
        return self.ordered[len(self.changes_percent) // 2]

    @property
    def worst(self) -> str:
        """The world with the largest change."""
        return self.ordered[-1]


def run_worlds(
    study: Study, worlds: Sequence[World], pool: Pool, on_phase: OnPhase
) -> Iterator[Outcome]:
    """The study in one world after the other, always with noise."""
    for number, world in enumerate(worlds, 1):
        scenario = study.scenario
        values = {**scenario.profile_values, **world.values}
        update = {"profile_values": values, "noise": True, "world": world.name}
        inner = replace(
            study, scenario=scenario.model_copy(update=update), folder=None, records=[], notes=[]
        )
        title = f"world {number} of {len(worlds)}, {world.name}"

        def on_phase_in_it(name: str, runs: int, title: str = title) -> OnProgress:
            return on_phase(f"{title}: {name}", runs)

        yield Outcome(world, tuple(inner.run(pool, on_phase_in_it)))


def judge(outcomes: Sequence[Outcome]) -> list[Judgement]:
    """Every judged figure of every policy but default clocks, in the order of the policies."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for outcome in outcomes:
        for standing in standings(outcome.records):
            for _, metric in JUDGED:
                change = standing.changes_percent.get(metric)
                if change is not None and standing.policy != DEFAULT:
                    by_world = found.setdefault((standing.policy, metric), {})
                    by_world[outcome.world.name] = change.mean
    return [Judgement(policy, metric, changes) for (policy, metric), changes in found.items()]
