"""A replay as records, the format that simulated runs have too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agft_ray.replay.result import ReplayResult
from agft_ray.replay.summary import Comparison, Group
from agft_ray.results.labels import HOLDOUT
from agft_ray.results.record import RunRecord

UNKNOWN = "unknown"


def records_of_replay(
    result: ReplayResult,
    comparison: Comparison,
    *,
    trace: str | None,
    seed: int | None,
    keep: float | None = None,
) -> list[RunRecord]:
    """A record for each role. A holdout keeps default clocks, so its policy is 'default'."""
    return [
        _record_of_group(group, result, comparison, {"trace": trace, "seed": seed, "keep": keep})
        for group in comparison.groups
    ]


def _record_of_group(
    group: Group, result: ReplayResult, comparison: Comparison, origin: dict[str, Any]
) -> RunRecord:
    members = [r for s in result.timeline for r in s.replicas if group.role in (r.role, "all")]
    slo = comparison.slo
    return RunRecord(
        policy="default" if group.role == HOLDOUT else _names(r.policy for r in members) or UNKNOWN,
        gpu=_names(r.gpu_model for r in members),
        model=result.model or None,
        replicas=group.replicas,
        requests=group.e2e_s.count,
        duration_s=comparison.duration_s,
        energy_j=group.energy_j,
        mean_power_w=group.mean_power_w,
        output_tokens=group.output_tokens,
        energy_per_output_token_j=group.energy_per_output_token_j,
        ttft_s=group.ttft_s,
        tpot_s=group.tpot_s,
        e2e_s=group.e2e_s,
        edp_j_s=group.edp_j_s,
        slo_attainment=group.slo_attainment,
        clock_changes=group.clock_changes,
        failed=group.failed,
        prompt_tokens=group.prompt_tokens,
        sm_clock_mhz=group.sm_clock_mhz,
        role=group.role,
        slo_ttft_s=slo.ttft_s if slo else None,
        slo_tpot_s=slo.tpot_s if slo else None,
        **origin,
    )


def _names(names: Iterable[str]) -> str | None:
    """The different ones, joined; None if there are none."""
    return "+".join(sorted({name for name in names if name})) or None
