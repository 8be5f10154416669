"""Runs of several policies summed up over seeds, and compared with default clocks seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agft_ray.results.figures import METRICS
from agft_ray.results.labels import DEFAULT, ORACLE_PAIR
from agft_ray.results.record import RunRecord, policies_of
from agft_ray.results.spread import Spread


@dataclass(frozen=True, slots=True)
class PolicyStanding:
    """One policy over all seeds: every metric, and its change against default clocks in per cent.

    A metric that does not exist in every run is left out; `partial` says of how many runs it is
    the mean where it exists in some (a run whose regret never stays low has no number of windows).
    """

    policy: str
    runs: tuple[RunRecord, ...]
    values: dict[str, Spread]
    changes_percent: dict[str, Spread]

    def partial(self, name: str) -> str:
        """'3 of 10' if only some of the runs have this metric, else nothing."""
        spread = self.values.get(name)
        if spread is None or spread.count == len(self.runs):
            return ""
        return f"{spread.count} of {len(self.runs)}"


def standings(records: Sequence[RunRecord]) -> list[PolicyStanding]:
    """One for each policy, in the order in which they first come."""
    default = {record.seed: record for record in records if record.policy == DEFAULT}
    return [
        _standing(policy, [record for record in records if record.policy == policy], default)
        for policy in policies_of(records)
    ]


def _standing(
    policy: str, runs: Sequence[RunRecord], default: dict[int | None, RunRecord]
) -> PolicyStanding:
    values, changes = {}, {}
    for metric in METRICS:
        name = metric.name
        known = [value for run in runs if (value := run.value(name)) is not None]
        if (spread := Spread.of(known)) is not None:
            values[name] = spread
        paired = [
            100.0 * (value / base - 1.0)
            for run in runs
            if run.seed in default
            and (value := run.value(name)) is not None
            and (base := default[run.seed].value(name))
        ]
        if metric.relative and (spread := Spread.of(paired)) is not None:
            changes[name] = spread
    return PolicyStanding(policy, tuple(runs), values, changes)


def with_regret(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records with their regret against the run of `oracle_pair` of the same seed."""
    oracle = {record.seed: record.edp_j_s for record in records if record.policy == ORACLE_PAIR}

    def regret(record: RunRecord) -> float | None:
        best = oracle.get(record.seed)
        if not best or record.edp_j_s is None:
            return None
        return record.edp_j_s / best - 1.0

    return [replace(record, regret=regret(record)) for record in records]


def ranking(records: Sequence[RunRecord], name: str = "edp_j_s") -> list[str]:
    """Policies by the mean of a metric, the lowest first; those without it are left out."""
    means = {
        standing.policy: standing.values[name].mean
        for standing in standings(records)
        if name in standing.values
    }
    return sorted(means, key=lambda policy: means[policy])
