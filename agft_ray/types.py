"""The vocabulary: frozen values that cross modules, processes and policies.

Nothing here imports anything of ours. Times are seconds on the loop's clock (simulated seconds
under a simulated GPU), counters are cumulative, gauges are momentary.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

Arm = int | None
"""What a policy may choose: an SM clock in MHz (or, where that is the actuator, a power limit in
W), or None for default clocks: nothing locked, no limit but the one found."""

DEFAULT_CLOCKS_KEY = 0
"""How default clocks are written where arms are keyed by MHz (experience, priors, files)."""


class Phase(enum.IntEnum):
    """What an engine does, as far as clocks go; the values are what is sent between processes."""

    PREFILL = 1
    """Prompts are computed, or wait to be; also where nothing is known."""
    DECODE = 2
    """Tokens are generated and no prompt is known that waits for its first one."""
    IDLE = 3
    """Nothing is there to be done."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The arm for each thing an engine does, chosen once a window and followed within it."""

    prefill: Arm
    decode: Arm
    idle: Arm

    @classmethod
    def of(cls, arm: Arm) -> Plan:
        """The same whatever the engine does."""
        return cls(arm, arm, arm)

    @property
    def arms(self) -> tuple[Arm, Arm, Arm]:
        """For prefill, decode and an empty engine."""
        return self.prefill, self.decode, self.idle

    @property
    def is_uniform(self) -> bool:
        """One arm: there is nothing to switch."""
        return self.prefill == self.decode == self.idle

    @property
    def is_default(self) -> bool:
        """Default clocks throughout."""
        return self.arms == (None, None, None)

    def at(self, phase: Phase) -> Arm:
        """What it has for a phase."""
        return self.arms[phase - 1]


class Actuator(enum.StrEnum):
    """What of a GPU is set, and the unit its arms are in."""

    SM_CLOCK = "sm_clock"
    """Locked SM clocks, in MHz."""
    POWER_LIMIT = "power_limit"
    """Power limits in W, for GPUs whose clocks cannot be locked. A cap does not bind in decode,
    where an LLM draws far less than the limit, so it saves much less there."""


class Mode(enum.StrEnum):
    """What a tuner may do: nothing, measure and recommend, or set clocks."""

    OFF = "off"
    OBSERVE = "observe"
    CONTROL = "control"


class EventReason(enum.IntFlag):
    """Why a GPU's clock is what it is: the bits of NVML's clocks event reasons."""

    NONE = 0
    GPU_IDLE = 0x1
    SW_POWER_CAP = 0x4
    HW_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SW_THERMAL = 0x20
    HW_THERMAL = 0x40
    HW_POWER_BRAKE = 0x80


THROTTLED = (
    EventReason.HW_SLOWDOWN
    | EventReason.SW_THERMAL
    | EventReason.HW_THERMAL
    | EventReason.HW_POWER_BRAKE
)
"""Reasons that make a window no evidence about its clock. The software power cap is not one of
them: it binds in ordinary operation, and rewards are credited to the clock that was observed."""


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of a GPU (or of a group of GPUs that act as one)."""

    t_s: float
    power_w: float
    energy_j: float
    """The energy counter: joules since some fixed moment."""
    energy_t_s: float
    """When the counter last changed; it is updated only every 10-100 ms."""
    sm_clock_mhz: int
    """The effective SM clock."""
    locked: Arm
    """The arm last set by us and still in force, or None at default clocks."""
    event_reasons: EventReason = EventReason.NONE
    temperature_c: float | None = None
    power_source: str = "instant"
    """How `power_w` was had: "instant", or "average" (over about a second) on older drivers."""
    energy_source: str = "counter"
    """"counter", or "integrated": from polled power, where the GPU has no energy counter."""
    gpus: int = 1
    """Of how many GPUs it is the reading."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counters over one class of engine steps (decode only, with prefill, or not known)."""

    steps: int = 0
    tokens: int = 0
    time_s: float = 0.0

    def __sub__(self, other: StepTotals) -> StepTotals:
        return StepTotals(
            self.steps - other.steps, self.tokens - other.tokens, self.time_s - other.time_s
        )


LATENCY_BUCKETS, BUCKETS_PER_DECADE = 192, 32
"""Of a `Histogram`: from 1 ms to 1000 s, each 7.5 % wide; what lies beyond is in the outermost."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many latencies lay in each bucket."""

    counts: tuple[int, ...] = (0,) * LATENCY_BUCKETS

    def __sub__(self, other: Histogram) -> Histogram:
        if self.counts is other.counts:
            return Histogram()
        return Histogram(tuple(map(operator.sub, self.counts, other.counts)))


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What an engine has counted since it started; or between two moments: `later - earlier`.

    The one list of them. A new counter is a line here and one where it is counted: `EngineStats`
    for engines in process, the names of vLLM's metrics for those that are not.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    iterations: int = 0
    iteration_tokens: int = 0
    ttft_sum_s: float = 0.0
    ttft_count: int = 0
    itl_sum_s: float = 0.0
    itl_count: int = 0
    e2e_sum_s: float = 0.0
    e2e_count: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    decode_steps: StepTotals = field(default_factory=StepTotals)
    prefill_steps: StepTotals = field(default_factory=StepTotals)
    unknown_steps: StepTotals = field(default_factory=StepTotals)
    """Steps of an engine that does not tell whether they computed prompt tokens."""
    ttft_histogram: Histogram = field(default_factory=Histogram)
    tpot_histogram: Histogram = field(default_factory=Histogram)
    """Of finished requests, each with its own mean."""
    e2e_histogram: Histogram = field(default_factory=Histogram)

    def __sub__(self, other: EngineCounters) -> EngineCounters:
        pairs = zip(counters_of(self), counters_of(other), strict=True)
        return EngineCounters(*[mine - its for mine, its in pairs])


COUNTERS = tuple(counter.name for counter in fields(EngineCounters))
"""The names of an engine's counters."""
counters_of: Callable[[object], tuple[Any, ...]] = operator.attrgetter(*COUNTERS)
"""An engine's counters, from whatever has them all: a sample, or `EngineStats`. In order, not by
name: by name a sample takes 1.6 times as long, and the simulator takes many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSample(EngineCounters):
    """An LLM engine's statistics at one moment: gauges, and its cumulative counters."""

    t_s: float
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of KV blocks in use, 0..1."""

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.running == 0 and self.waiting == 0


@dataclass(frozen=True, slots=True)
class ServeSample:
    """What Ray Serve's own metrics say of one replica. A missing series is None, never zero.

    `t_s` is when the values were scraped; Ray exports them every report interval, so they are at
    most that much older.
    """

    t_s: float
    requests: float | None
    """Requests completed since the replica started."""
    latency_sum_s: float | None
    latency_count: float | None
    in_flight: float | None


@dataclass(frozen=True, slots=True)
class ServeWindow:
    """Ray Serve's view of a replica between two scrapes."""

    request_rate_per_s: float
    mean_latency_s: float | None
    in_flight: float | None
    age_s: float
    """Age of the newer scrape at the end of the window."""


@dataclass(frozen=True, slots=True)
class Rises:
    """How often prompts came whose clock had to be set first, for they met another one."""

    from_decode: int = 0
    """The clock of decode steps."""
    from_idle: int = 0
    """The clock of an empty engine."""

    def after(self, phase: Phase) -> Rises:
        """One more, from what the engine did before."""
        is_idle = phase is Phase.IDLE
        return Rises(self.from_decode + (not is_idle), self.from_idle + is_idle)

    def __sub__(self, other: Rises) -> Rises:
        return Rises(self.from_decode - other.from_decode, self.from_idle - other.from_idle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window(EngineCounters):
    """One observation interval of the loop: deltas of counters, means of gauges, energy."""

    start_s: float
    end_s: float
    arm: Arm
    """What was locked during the window; of a plan with several, that for decode steps."""
    energy_j: float
    """Energy of the window: mean power between the counter's own updates times the duration."""
    mean_power_w: float
    sm_clock_mhz: float
    """Mean of the effective SM clock while the engine worked (all samples if it never did)."""
    event_reasons: EventReason
    running: float
    waiting: float
    kv_cache_usage: float
    request_rate_per_s: float
    """From Ray Serve where fresh, else the engine's first tokens per second."""
    serve: ServeWindow | None = None
    plan: Plan | None = None
    """The plan in force during the window; None where nobody has told: the arm throughout."""
    rises: Rises = Rises()
    """Changes within the plan to the clock of prefill; those of a plan with one arm are none."""
    clock_change_s: float | None = None
    """How long a change of the clock takes on this GPU, the call included: the median of the last
    ones; None while it is not known."""
    gpus: int = 1
    """How many GPUs serve the engine and are set as one."""

    @property
    def duration_s(self) -> float:
        """From its start to its end."""
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float | None:
        """Mean TTFT of the requests that got their first token in the window."""
        return self.ttft_sum_s / self.ttft_count if self.ttft_count else None

    @property
    def tpot_s(self) -> float | None:
        """Mean inter-token latency of the window, the delay AGFT calls TPOT."""
        return self.itl_sum_s / self.itl_count if self.itl_count else None

    @property
    def is_idle(self) -> bool:
        """The engine was seen, and did nothing: no tokens, nothing running or waiting."""
        return self.iterations == 0 and self.running == 0 and self.waiting == 0

    @property
    def edp_j_s(self) -> float | None:
        """Energy-delay product of the window as AGFT defines it: energy times mean TPOT."""
        return None if self.tpot_s is None else self.energy_j * self.tpot_s


@dataclass(frozen=True, slots=True)
class Context:
    """A window's feature vector, scaled by the constants of the feature schema."""

    features: tuple[float, ...]
    schema: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy's choice and its one-word reason ('baseline', 'sweep', 'explore', 'exploit'...).

    `arm` is one for everything, or with a `plan` its arm for decode steps.
    """

    arm: Arm
    reason: str
    plan: Plan | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, plan: Plan, reason: str) -> Decision:
        """For a plan; one with a single arm is that arm."""
        return cls(plan.decode, reason, plan=None if plan.is_uniform else plan)

    @property
    def chosen(self) -> Plan:
        """The plan: that of the one arm where none was given."""
        return self.plan or Plan.of(self.arm)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a decision: the window it led to and its reward.

    `requested` is the arm that was chosen, `arm` the one the reward is credited to: the clock
    that was observed, on the GPU's supported list.
    """

    requested: Arm
    arm: Arm
    context: Context
    reward: float
    window: Window
