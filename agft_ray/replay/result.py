"""What a replay measured: a row a request, the server's time line, and what was in the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from agft_ray.files import write_csv, write_json

OK = "ok"
INTERRUPTED = "interrupted"

MAX_PATH_SHARE = 1.0
"""Client TTFT above the engine's, per engine TTFT: beyond 1 the path is slower than the engine."""
MAX_PATH_WALL_S = 0.1
"""The same in wall seconds. Ray Serve's streaming path costs 20-50 ms when two cores are all there
is, CPU-bound at the upper end (our own measurement on Ray 2.60): 100 ms is a queue in the path."""
MAX_LATENESS_P99_WALL_S = 0.02
"""asyncio's timers are good to 1-2 ms; a p99 of 20 ms means that the client had no CPU to send."""
MAX_LATE_STEP_SHARE, MAX_VALID_LATE_STEP_SHARE = 0.05, 0.10
"""Simulated engines keep to absolute deadlines: a step that is completed late on the wall took its
time all the same, and energy is counted for it. But clocks are set that much later in simulated
time, and tokens reach the client later. Said from one step in twenty on; beyond one in ten, of
which nothing has been measured, a comparison is not valid (docs/concepts.md has the figures)."""


class _Answer(BaseModel):
    """Base of what a server tells us: unknown fields are ignored, NaN and infinity refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class ReplicaStatus(_Answer):
    """One replica at one moment: gauges, and counters since it started.

    Seconds are simulated, but for `max_lateness_s`, by which a step was late on the wall.
    """

    replica: str
    role: str
    mode: str = ""
    policy: str = ""
    gpu_uuid: str = ""
    gpu_model: str = ""
    t_s: float
    energy_j: float
    energy_t_s: float
    sm_clock_mhz: float
    locked_sm_clock_mhz: float | None = None
    running: int
    waiting: int
    prompt_tokens: int
    generation_tokens: int
    requests: int = 0
    clock_changes: int = 0
    windows: int = 0
    steps: int = 0
    late_steps: int = 0
    max_lateness_s: float = 0.0
    alive: bool = True


class ServerStatus(_Answer):
    """The answer of `/agft/status`: how fast simulated time runs, its present value, the fleet."""

    speed: float = Field(gt=0)
    now_s: float
    replicas: tuple[ReplicaStatus, ...]
    """Those whose engine and GPU have been read: counters that are not known are not zero."""

    @field_validator("replicas", mode="before")
    @classmethod
    def _drop_silent(cls, replicas: Any) -> Any:
        if not isinstance(replicas, list):
            return replicas
        known = {"generation_tokens", "energy_j"}
        return [r for r in replicas if not isinstance(r, dict) or known <= r.keys()]

    @property
    def is_at_rest(self) -> bool:
        """No replica that is alive runs anything or has anything waiting."""
        return not any(r.running or r.waiting for r in self.replicas if r.alive)

    @property
    def generation_tokens(self) -> dict[str, int]:
        """Tokens generated so far, by replica."""
        return {replica.replica: replica.generation_tokens for replica in self.replicas}


@dataclass(frozen=True, slots=True)
class RequestRow:
    """What one request experienced, in simulated seconds but for the lateness.

    `ttft_s` to the first chunk with text, `tpot_s` from there to the last one per token after the
    first, `e2e_s` to the end of the stream, all from the moment it was sent; `engine_*` and the
    replica as the server states them. None (an empty cell) is what was not measured or stated.
    """

    request_id: str
    arrival_s: float
    dispatch_lateness_wall_s: float
    """Moment of sending minus arrival time, in wall seconds."""
    status: str
    """'ok', 'interrupted', 'HTTP <code>: <message>', or what else went wrong."""
    retries: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    replica: str | None = None
    role: str | None = None
    engine_ttft_s: float | None = None
    engine_tpot_s: float | None = None
    engine_e2e_s: float | None = None

    @property
    def is_failed(self) -> bool:
        """It went wrong, and not because the replay was interrupted."""
        return self.status not in (OK, INTERRUPTED)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """A finished replay: rows in order of arrival, the time line in order of polls."""

    rows: tuple[RequestRow, ...]
    timeline: tuple[ServerStatus, ...]
    """Empty if the server has no `/agft/status`."""
    started_s: float
    """The server's simulated time at the start; 0 if it does not tell."""
    ended_s: float
    """The same clock when the last answer was complete."""
    wall_s: float
    speed: float
    """Simulated seconds per wall second."""
    model: str = ""
    """The model asked for."""
    interrupted: bool = False
    settled: bool = True
    """The server came to rest before the last status was taken."""
    missed_polls: int = 0

    def write(self, directory: str | Path, *, summary: Any) -> None:
        """Write the three files into `directory`, each replaced as a whole or not at all.

        `requests.csv` has the fields of `RequestRow`, a row a request; `timeline.csv` has `now_s`
        (the server's simulated time at the poll) and the fields of `ReplicaStatus`, a row a poll
        and replica; `summary.json` is `summary`, of `Comparison.to_json()`. An empty cell is
        "no value".
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        names = [field.name for field in fields(RequestRow)]
        write_csv(target / "requests.csv", names, (astuple(row) for row in self.rows))
        header = ["now_s", *ReplicaStatus.model_fields]
        write_csv(target / "timeline.csv", header, self._timeline_rows())
        write_json(target / "summary.json", summary)

    def _timeline_rows(self) -> Iterator[Iterable[Any]]:
        for status in self.timeline:
            for replica in status.replicas:
                yield [status.now_s, *replica.model_dump().values()]


def bottlenecks(result: ReplayResult) -> list[str]:
    """Where the client or the HTTP path, not the engine, set the pace: sentences with numbers.

    Empty if nothing exceeds the thresholds above, each of which says why it stands where it does.
    """
    checks = (_slow_path(result), _late_dispatch(result), _late_steps(result))
    return [sentence for sentence in checks if sentence]


def _slow_path(result: ReplayResult) -> str | None:
    pairs = [
        (row.ttft_s, row.engine_ttft_s)
        for row in result.rows
        if row.ttft_s is not None and row.engine_ttft_s is not None
    ]
    if not pairs:
        return None
    client_s, engine_s = np.array(pairs).T
    overhead_s, own_s = float(np.median(client_s - engine_s)), float(np.median(engine_s))
    wall_s = overhead_s / result.speed
    if overhead_s <= MAX_PATH_SHARE * own_s and wall_s <= MAX_PATH_WALL_S:
        return None
    return (
        f"Between engine and client, {overhead_s * 1e3:.0f} ms (simulated; {wall_s * 1e3:.0f} ms "
        f"wall) are added to a median engine TTFT of {own_s * 1e3:.0f} ms: client-side latencies "
        "measure the HTTP path; use the engine-side ones, or a lower speed."
    )


def _late_dispatch(result: ReplayResult) -> str | None:
    lateness_s = [row.dispatch_lateness_wall_s for row in result.rows]
    p99_s = float(np.percentile(lateness_s, 99)) if lateness_s else 0.0
    if p99_s <= MAX_LATENESS_P99_WALL_S:
        return None
    return (
        f"The client sent late: p99 {p99_s * 1e3:.0f} ms wall ({p99_s * result.speed * 1e3:.0f} ms "
        "simulated) after the arrival time, so bursts are smoother than in the trace; give the "
        "client a core of its own, or lower the speed."
    )


def late_steps(result: ReplayResult) -> tuple[int, int]:
    """How many steps of simulated engines ended late, by more than they lasted; of how many."""
    before = {r.replica: r for r in result.timeline[0].replicas} if result.timeline else {}
    after = result.timeline[-1].replicas if result.timeline else ()
    pairs = [(before.get(replica.replica), replica) for replica in after]
    late = sum(now.late_steps - (then.late_steps if then else 0) for then, now in pairs)
    return late, sum(now.steps - (then.steps if then else 0) for then, now in pairs)


def is_valid(result: ReplayResult) -> bool:
    """Simulated engines kept up with their clock well enough for what was measured to be told."""
    late, steps = late_steps(result)
    return late <= MAX_VALID_LATE_STEP_SHARE * steps


def _late_steps(result: ReplayResult) -> str | None:
    late, steps = late_steps(result)
    if late <= MAX_LATE_STEP_SHARE * steps:
        return None
    worst_s = max(replica.max_lateness_s for replica in result.timeline[-1].replicas)
    return (
        f"{late / steps:.1%} of the simulated engines' steps ended late ({late} of {steps}, at "
        f"worst by {worst_s * 1e3:.0f} ms of wall time): the server had too little CPU for speed "
        f"{result.speed:g}. Step times and energy are right for the clocks that were in force, "
        "but clocks were set that much later than they should have been, and tokens reached the "
        "client later; lower the speed."
    )
