"""Settings of the policy `phases`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from agft_ray.config import Count, StrictModel

MAX_PROBE_SHARE = 0.01


class PhasesConfig(StrictModel):
    """Settings of the policy `phases`."""

    name: Literal["phases"] = "phases"
    """The policy."""
    margin: Annotated[float, Field(ge=0, lt=0.1)] = 0.002
    """How far below the bound predictions must stay."""
    clocks: Literal["auto", "one", "pair"] = "auto"
    """One clock for prefill and decode, or one each; auto: one each on a single GPU whose clock
    changes while most of a prompt is still to be computed."""
    baseline_decode_steps: Count = 100
    """Decode steps at default clocks before the first step down."""
    baseline_prefill_steps: Count = 12
    """Steps with prefill at default clocks before the first step down of their clock."""
    walk: Annotated[float, Field(gt=0, le=0.2)] = 0.08
    """How far below the lowest clock measured a clock may lie, as a share of it."""
    gain: Annotated[float, Field(ge=0, lt=0.1)] = 0.002
    """Predicted gain for which a plan is changed, as a share."""
    memory_s: Annotated[float, Field(ge=10)] = 150.0
    """Time over which the load is averaged."""
    forgetting: Annotated[float, Field(gt=0.99, le=1)] = 0.999
    """Discount of what the models know, per window: half is forgotten in 693."""
    probe_share: Annotated[float, Field(ge=0, le=MAX_PROBE_SHARE)] = 0.003
    """Share of the time spent at default clocks to measure them again."""
    max_drift: Annotated[float, Field(gt=0)] = 0.15
    """Mean relative error of predicted step times beyond which all is learned anew."""
