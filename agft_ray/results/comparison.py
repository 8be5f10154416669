"""Runs of several policies summed up over seeds, and compared with default clocks seed by seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agft_ray.results.labels import DEFAULT, ORACLE_PAIR
from agft_ray.results.record import STATISTICS, RunRecord, policies_of
from agft_ray.results.spread import Spread


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a record, and how people want to see it."""

    name: str
    """In the record, dotted into a distribution."""
    label: str
    unit: str
    scale: float = 1.0
    """From the record's unit to `unit`."""
    relative: bool = True
    """A change against default clocks means something."""


def _latencies() -> Iterator[Metric]:
    for name, label, unit, scale in (
        ("ttft_s", "TTFT", "ms", 1e3),
        ("tpot_s", "TPOT", "ms", 1e3),
        ("e2e_s", "E2E", "s", 1.0),
    ):
        for statistic in STATISTICS:
            yield Metric(f"{name}.{statistic}", f"{label} {statistic}", unit, scale)


METRICS = (
    Metric("energy_j", "energy", "kJ", 1e-3),
    Metric("mean_power_w", "mean power per replica", "W"),
    Metric("energy_per_output_token_j", "energy per output token", "J"),
    *_latencies(),
    Metric("slo_attainment", "SLO attainment", "%", 100.0, relative=False),
    Metric("edp_j_s", "EDP of the run", "MJ·s", 1e-6),
    Metric("sm_clock_mhz", "mean SM clock", "MHz"),
    Metric("clock_changes", "clock changes", "", relative=False),
    Metric("windows_to_converge", "windows to convergence", "", relative=False),
    Metric("worst_exploration_tpot_ratio", "worst window before it", "x", relative=False),
    Metric("regret", "regret against oracle_pair", "%", 100.0, relative=False),
)
METRIC = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class PolicyStanding:
    """One policy over all seeds: every metric, and its change against default clocks in per cent.

    A metric that does not exist in every run is left out; `partial` says of how many runs it is
    the mean where it exists in some (a run that never converged has no number of windows).
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
