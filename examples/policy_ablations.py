"""The policy `phases` with one of its parts taken out: what each is good for.

    PYTHONPATH=examples agft-ray simulate --trace azure2023_conv.csv --keep 0.12 --seed 0..2 \\
        --policy phases --policy phases:clocks=one --policy phases:probe_share=0 \\
        --policy policy_ablations:NoSafeWalk --policy policy_ablations:NoInterference \\
        --policy policy_ablations:NoLag
"""

from dataclasses import fields, replace

import numpy as np

from agft_ray.policy.phases.choice import Models
from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.phases.policy import PhasesPolicy
from agft_ray.policy.phases.step_time import StepTimes
from agft_ray.types import Plan, Window


class _Trusting(StepTimes):
    """Its fit is the truth, also below what was measured."""

    def slowdown(self, clocks_mhz: np.ndarray) -> np.ndarray:
        """What is expected, without error or a worst case."""
        return self.expected(clocks_mhz)


class _Ablated(PhasesPolicy):
    def __init__(self, **settings: object) -> None:
        super().__init__(PhasesConfig.model_validate(settings))


class NoSafeWalk(_Ablated):
    """Goes to whatever clock its fit believes in, a fifth lower at a time."""

    def __init__(self) -> None:
        super().__init__(walk=0.2)

    def _step_times(self, top_mhz: float) -> tuple[StepTimes, StepTimes]:
        prefill, decode = super()._step_times(top_mhz)
        return _trusting(prefill), _trusting(decode)


class NoInterference(_Ablated):
    """TPOT is a decode step: prompts do not come between, and slower batches do not grow."""

    def _models(self, top_mhz: float) -> Models:
        models = super()._models(top_mhz)
        return replace(models, load=replace(models.load, interference=0.0, growth=0.0))


class NoLag(_Ablated):
    """Clocks are taken to change at once."""

    def _models(self, top_mhz: float) -> Models:
        return replace(super()._models(top_mhz), switch_s=0.0)

    def _lag_s(self, window: Window, plan: Plan) -> float:
        return 0.0


def _trusting(times: StepTimes) -> StepTimes:
    return _Trusting(**{field.name: getattr(times, field.name) for field in fields(times)})
