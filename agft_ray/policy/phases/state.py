"""What the policy `phases` remembers besides the sums that its models are fitted to."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from agft_ray.policy.phases import load as loads
from agft_ray.policy.phases.work import FEATURES

CALL_S, CHANGE_S = 0.005, 0.025
"""From the knowledge that a prompt is there until the GPU is called; how long its clock takes to
change, until that is measured."""


class State(BaseModel):
    """JSON-able, without NaN or infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    load: list[float] = [0.0] * loads.SIZE
    decode_work: list[float] = [0.0] * FEATURES
    """Of the last window with decode steps."""
    now: tuple[int | None, int | None, int | None] = (None, None, None)
    """The plan of the last window."""
    held: tuple[int | None, int | None, int | None] = (None, None, None)
    """The last plan that was not default clocks: where to go on after them."""
    seen_s: float = 0.0
    """Time learned from since the last probe, or since the baseline was there."""
    probe_s: float = 0.0
    """How long a probe takes: the length of a window."""
    errors: tuple[float, float] = (0.0, 0.0)
    """Mean relative errors of predicted times of prefill and decode steps."""
    ready: tuple[bool, bool] = (False, False)
    """Enough was seen of prefill, of decode, at default clocks."""
    relearned: int = 0
    """How often what was learned was given up."""
    windows: int = 0
    switch_s: float = CALL_S + CHANGE_S
    """Time from the knowledge that a prompt is there until its clock is: the last one measured."""
    is_timed: bool = False
    """That was measured."""
    is_one: bool = False
    """One clock: several GPUs would have to change at once, or steps are short for a change."""
