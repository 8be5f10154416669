"""The figures that runs are told and compared by: one list for every command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agft_ray.results.record import STATISTICS


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
    judged: bool = True
    """Less of it is better."""

    @property
    def heading(self) -> str:
        """The label with its unit, as at the head of a row: 'TTFT p99, ms'."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


def _latencies() -> Iterator[Metric]:
    for name, label, unit, scale in (
        ("ttft_s", "TTFT", "ms", 1e3),
        ("tpot_s", "TPOT", "ms", 1e3),
        ("e2e_s", "E2E", "s", 1.0),
    ):
        for statistic in STATISTICS:
            yield Metric(f"{name}.{statistic}", f"{label} {statistic}", unit, scale)


EFFORT = (
    Metric("replicas", "replicas", "", relative=False),
    Metric("requests", "requests", "", relative=False),
    Metric("failed", "failed", "", relative=False),
    Metric("prompt_tokens", "prompt tokens", "", relative=False),
    Metric("output_tokens", "output tokens", "", relative=False),
)
"""How much there was to do."""

METRICS = (
    Metric("energy_j", "energy", "kJ", 1e-3),
    Metric("mean_power_w", "mean power per replica", "W"),
    Metric("energy_per_output_token_j", "energy per output token", "J"),
    *_latencies(),
    Metric("slo_attainment", "SLO attainment", "%", 100.0, relative=False),
    Metric("edp_j_s", "EDP of the run", "MJ·s", 1e-6),
    Metric("sm_clock_mhz", "mean SM clock", "MHz", judged=False),
    Metric("clock_changes", "clock changes", "", relative=False),
    Metric("energy_regret_j", "energy beyond the best clocks'", "kJ", 1e-3, relative=False),
    Metric("energy_regret", "regret against the best clocks", "%", 100.0, relative=False),
    Metric("windows_to_low_regret", "windows until it stays below 2 %", "", relative=False),
    Metric("worst_exploration_tpot_ratio", "worst window before it", "x", relative=False),
    Metric("windows_over_bound", "windows over a latency bound", "%", 100.0, relative=False),
    Metric("regret", "regret against oracle_pair", "%", 100.0, relative=False),
)
"""What people compare runs by."""

LIVE = (
    Metric("windows", "windows", "", relative=False),
    Metric("edp_per_output_token_j_s", "EDP per output token", "J·s"),
)
"""What is told of live replicas beside it."""

METRIC = {metric.name: metric for metric in (*EFFORT, *METRICS, *LIVE)}
