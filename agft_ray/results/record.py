"""One run of one policy as a record: the stable format of `--json`, see docs/evaluation.md."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agft_ray.errors import AgftError
from agft_ray.files import write_json
from agft_ray.results.distribution import Distribution

STATISTICS = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What came of a run. None is "does not exist", and null in JSON.

    Fields may be added; the meaning of those that are there does not change.
    """

    policy: str
    gpu: str | None
    model: str | None
    trace: str | None
    """The trace's file name, or the generated workload."""
    seed: int | None
    replicas: int | None
    requests: int
    """Answered in full."""
    duration_s: float
    """Simulated, until the last answer."""
    energy_j: float | None
    mean_power_w: float | None
    """Of one replica: energy by duration and replicas."""
    output_tokens: int
    energy_per_output_token_j: float | None
    ttft_s: Distribution
    tpot_s: Distribution
    e2e_s: Distribution
    edp_j_s: float | None
    """Energy of the run times mean E2E latency."""
    slo_attainment: float | None
    """Share of the requests, failed ones included, that kept the SLO; None without an SLO."""
    clock_changes: int | None
    energy_regret_j: float | None = None
    """Of a simulated run: energy beyond that at the best clocks for the same work."""
    energy_regret: float | None = None
    """The same, relative to the energy at the best clocks."""
    windows_to_low_regret: int | None = None
    """After how many windows it stays below 2 %; None if it never does."""
    windows_over_bound: float | None = None
    """Share of the windows with steps in which these took longer than the best clocks may."""
    worst_exploration_tpot_ratio: float | None = None
    """Largest TPOT of a window before regret stays low, relative to default clocks in it."""
    regret: float | None = None
    """EDP relative to that of `oracle_pair`, less 1."""
    failed: int = 0
    """Requests that failed or could never be served."""
    prompt_tokens: int | None = None
    sm_clock_mhz: float | None = None
    """Effective SM clock, mean over time and replicas."""
    choice: str | None = None
    """What a search chose: '1230', or '1500/1230/210' for prefill, decode and idle."""
    role: str | None = None
    """Of a replay: which of the server's replicas, 'tuned', 'holdout' or 'all'."""
    keep: float | None = None
    """Share of the trace that was kept."""
    router: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    profile_change: str | None = None
    """Of a sweep of uncertain numbers: what was changed in the GPU's profile, as 'path=value'."""
    noise: bool | None = None
    """Whether step times and energy counters had noise; None of a replay."""
    world: str | None = None
    """Of --worlds: its name."""

    def to_json(self) -> dict[str, Any]:
        """The fields, with distributions as {mean, p50, p95, p99}."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Distribution):
                values[name] = {s: getattr(value, s) for s in STATISTICS}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunRecord:
        """What `to_json` gave; fields of a later version are left out. Raises `TypeError`."""
        known = {field.name for field in fields(cls)} & values.keys()
        record = cls(**{name: values[name] for name in known})
        count = record.requests
        return replace(
            record,
            ttft_s=Distribution(count, **values["ttft_s"]),
            tpot_s=Distribution(count, **values["tpot_s"]),
            e2e_s=Distribution(count, **values["e2e_s"]),
        )

    def value(self, name: str) -> float | None:
        """A number by its name, dotted into a distribution ('ttft_s.p99'); None if there is none.

        Raises `AttributeError` for a name that is no field.
        """
        value: object = self
        for part in name.split("."):
            value = getattr(value, part)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def write_runs(path: Path, records: Iterable[RunRecord]) -> None:
    """Write `{"runs": [...]}`, replacing the file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"runs": [record.to_json() for record in records]})


def read_runs(path: Path) -> list[RunRecord]:
    """What `write_runs` wrote; raises `AgftError` naming the file and what is wrong."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [RunRecord.from_json(run) for run in runs]
    except OSError as error:
        raise AgftError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AgftError(
            f"{path}: is not what --json of agft-ray writes ({type(error).__name__}: {error})"
        ) from None


def policies_of(records: Sequence[RunRecord]) -> list[str]:
    """The policies, in the order in which they first come."""
    return list(dict.fromkeys(record.policy for record in records))
