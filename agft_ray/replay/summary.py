"""Statistics of a replay: each role's requests, energy and latencies, and what tuning changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agft_ray.replay.equal_work import BLOCK_S, MIN_BLOCKS, PERCENTILES, figures_of, needed
from agft_ray.replay.result import (
    INTERRUPTED,
    OK,
    ReplayResult,
    RequestRow,
    bottlenecks,
    is_valid,
)
from agft_ray.replay.timeline import (
    Interval,
    edges,
    growth,
    intervals,
    mean_clocks_mhz,
    replica_notes,
)
from agft_ray.results.distribution import Distribution, Slo
from agft_ray.results.labels import HOLDOUT
from agft_ray.results.spread import Spread

FORMAT = 2
ROLES = ("tuned", HOLDOUT)
LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
MAX_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Group:
    """The replicas of one role. None is "no value"; energy and tokens are those of the whole run.

    `requests`, `failed` and the latencies are those of this replay; energy, tokens, clock changes
    and windows are what the replicas' counters grew by, other clients' traffic included.
    """

    role: str
    """'tuned', 'holdout', or 'all' if the server does not tell replicas apart."""
    replicas: int | None
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    energy_j: float | None
    mean_power_w: float | None
    """Of one replica."""
    energy_per_output_token_j: float | None
    ttft_s: Distribution
    tpot_s: Distribution
    e2e_s: Distribution
    edp_j_s: float | None
    """Energy of the run times mean E2E latency."""
    edp_per_output_token_j_s: float | None
    """Energy per output token times mean E2E latency."""
    slo_attainment: float | None
    """Share of the completed and failed requests that kept the SLO; a failed one does not."""
    sm_clock_mhz: float | None
    """Mean over time and replicas, idle time included, readings joined by straight lines."""
    clock_changes: int | None
    windows: int | None
    sm_clock_over_time_mhz: tuple[float | None, ...]
    """The same mean in each sixtieth of the time line."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A replay summed up: a group a role ('tuned' first), and the change of tuned to holdout."""

    groups: tuple[Group, ...]
    changes_percent: dict[str, Spread]
    """Of tuned to holdout at equal work, by the names of a group's fields, 'ttft_s.mean' and the
    like; see `equal_work`. Without what either has not, or too few requests of."""
    latency_source: str
    """Whose latencies the groups have: 'engine' or 'client'."""
    client_ttft_s: Distribution
    client_e2e_s: Distribution
    requests: int
    failed: int
    interrupted_requests: int
    errors: dict[str, int]
    """The most frequent errors and how often each occurred."""
    duration_s: float
    """Simulated, to the last answer."""
    wall_s: float
    speed: float
    valid: bool
    """Simulated engines kept up with their clock: see `result.is_valid`."""
    interrupted: bool
    slo: Slo | None
    notes: tuple[str, ...]
    bottlenecks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields of this class, nested, and `format`, which changes if their meaning does.

        Fields may be added within a format. Values that do not exist are null, never NaN.
        """
        return {"format": FORMAT, **asdict(self)}


def summarise(result: ReplayResult, *, slo: Slo | None = None) -> Comparison:
    """Group a replay by role; latencies are the engine's where every answer has them."""
    seen = list(intervals(result))
    roles = {a.role for a, _ in seen} | {row.role for row in result.rows if row.role}
    source = _latency_source(result.rows)
    edges_s = edges(seen)
    groups = tuple(
        _group(
            role,
            [row for row in result.rows if row.role == role or not roles],
            [interval for interval in seen if interval[0].role == role],
            source=source,
            slo=slo,
            edges_s=edges_s,
        )
        for role in sorted(roles, key=lambda role: (role not in ROLES, role != "tuned", role))
        or ["all"]
    )
    done = [row for row in result.rows if row.status == OK]
    errors = Counter(row.status for row in result.rows if row.is_failed)
    return Comparison(
        groups=groups,
        changes_percent=_changes(result, seen, source) if set(ROLES) <= roles else {},
        latency_source=source,
        client_ttft_s=Distribution.of(row.ttft_s for row in done),
        client_e2e_s=Distribution.of(row.e2e_s for row in done),
        requests=len(result.rows),
        failed=errors.total(),
        interrupted_requests=sum(row.status == INTERRUPTED for row in result.rows),
        errors=dict(errors.most_common(MAX_ERRORS)),
        duration_s=_duration_s(result),
        wall_s=result.wall_s,
        speed=result.speed,
        valid=is_valid(result),
        interrupted=result.interrupted,
        slo=slo,
        notes=tuple(_notes(result, groups)),
        bottlenecks=tuple(bottlenecks(result)),
    )


def _latency_source(rows: Sequence[RequestRow]) -> str:
    done = [row for row in rows if row.status == OK]
    has_engine = done and all(row.engine_e2e_s is not None for row in done)
    return "engine" if has_engine else "client"


def _latencies_s(row: RequestRow, source: str) -> tuple[float | None, float | None, float | None]:
    if source == "engine":
        return row.engine_ttft_s, row.engine_tpot_s, row.engine_e2e_s
    return row.ttft_s, row.tpot_s, row.e2e_s


def _group(
    role: str,
    rows: Sequence[RequestRow],
    intervals: Sequence[Interval],
    *,
    source: str,
    slo: Slo | None,
    edges_s: np.ndarray,
) -> Group:
    done = [row for row in rows if row.status == OK]
    latencies_s = [_latencies_s(row, source) for row in done]
    ttft_s, tpot_s, e2e_s = (Distribution.of(row[i] for row in latencies_s) for i in range(3))
    failed = sum(row.is_failed for row in rows)
    counters = _counters(rows, intervals)
    energy_j = counters["energy_j"]
    edp_j_s = None if energy_j is None or e2e_s.mean is None else energy_j * e2e_s.mean
    met = sum(slo.is_met(row) for row in latencies_s) if slo else None
    names = {a.replica for a, _ in intervals} or {row.replica for row in rows if row.replica}
    return Group(
        role=role,
        replicas=len(names) or None,
        requests=len(rows),
        failed=failed,
        prompt_tokens=int(counters["prompt_tokens"] or 0),
        output_tokens=int(counters["generation_tokens"] or 0),
        energy_j=energy_j,
        mean_power_w=_ratio(energy_j, counters["energy_t_s"]),
        energy_per_output_token_j=_ratio(energy_j, counters["generation_tokens"]),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=e2e_s,
        edp_j_s=edp_j_s,
        edp_per_output_token_j_s=_ratio(edp_j_s, counters["generation_tokens"]),
        slo_attainment=_ratio(met, len(done) + failed),
        sm_clock_mhz=mean_clocks_mhz(intervals, edges_s[[0, -1]])[0],
        clock_changes=_whole(counters["clock_changes"]),
        windows=_whole(counters["windows"]),
        sm_clock_over_time_mhz=mean_clocks_mhz(intervals, edges_s),
    )


def _counters(
    rows: Sequence[RequestRow], intervals: Sequence[Interval]
) -> Mapping[str, float | None]:
    """Growth over the run; the tokens alone, from the answers, if the server keeps no count."""
    names = ("energy_j", "energy_t_s", "clock_changes", "windows")
    tokens = ("prompt_tokens", "generation_tokens")
    if not intervals:
        return dict.fromkeys(names) | {
            "prompt_tokens": sum(row.prompt_tokens or 0 for row in rows),
            "generation_tokens": sum(row.output_tokens or 0 for row in rows),
        }
    return {name: sum(growth(interval, name) for interval in intervals) for name in names + tokens}


def _ratio(value: float | None, per: float | None) -> float | None:
    return None if value is None or not per else value / per


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _duration_s(result: ReplayResult) -> float:
    return result.ended_s - result.started_s


def _changes(result: ReplayResult, seen: Sequence[Interval], source: str) -> dict[str, Spread]:
    def latency(index: int) -> Callable[[RequestRow], float | None]:
        return lambda row: _latencies_s(row, source)[index]

    figures = figures_of(
        {role: [r for r in result.rows if r.role == role and r.status == OK] for role in ROLES},
        {role: [interval for interval in seen if interval[0].role == role] for role in ROLES},
        {name: latency(index) for index, name in enumerate(LATENCIES)},
        roles=ROLES,
        started_s=result.started_s,
        duration_s=_duration_s(result),
    )
    return figures.changes_percent()


def _notes(result: ReplayResult, groups: Sequence[Group]) -> Iterator[str]:
    roles = {group.role for group in groups}
    if "all" in roles:
        yield "No comparison: the server does not say which replicas are tuned."
    elif not set(ROLES) <= roles:
        seen = " and ".join(sorted(roles))
        yield f"No comparison: every replica is {seen}; it takes tuned ones and holdouts."
    else:
        yield from _doubts(result, groups)
    if not result.timeline:
        yield "No energy: the server has no /agft/status."
    if result.interrupted:
        yield "The replay was interrupted: requests then under way have no latencies."
    if not result.settled:
        yield "The server was not at rest at the last poll: energy of what still ran is missing."
    if result.missed_polls:
        yield f"{result.missed_polls} polls of the status failed."
    lost = sum(row.is_failed and row.role is None for row in result.rows)
    if lost and "all" not in roles:
        yield f"{lost} failed requests name no replica and are in no group."
    yield from replica_notes(result)


def _doubts(result: ReplayResult, groups: Sequence[Group]) -> Iterator[str]:
    """What the changes do not tell, for want of requests, time or knowledge."""
    if _duration_s(result) < MIN_BLOCKS * BLOCK_S:
        yield (
            f"Too short for intervals: it takes {MIN_BLOCKS * BLOCK_S:g} s, which are {MIN_BLOCKS} "
            f"blocks of {BLOCK_S:g} s to tell chance by."
        )
    fewest = min(group.e2e_s.count for group in groups if group.role in ROLES)
    if few := [name for name, q in PERCENTILES.items() if fewest < needed(q)]:
        yield (
            f"Too few requests for a change of {' and '.join(few)}: {few[0]} takes "
            f"{needed(PERCENTILES[few[0]]):,} of each role."
        )
    if any(row.output_tokens is None for row in result.rows if row.status == OK):
        yield "Requests are compared whatever their lengths: the server does not state tokens."
