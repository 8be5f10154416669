"""From settings to a policy or a step governor."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from agft_ray.policy.agft.policy import AgftConfig, AgftPolicy
from agft_ray.policy.base import Policy
from agft_ray.policy.baselines.activity import ActivityConfig, ActivityPolicy
from agft_ray.policy.baselines.default import DefaultConfig, DefaultPolicy
from agft_ray.policy.baselines.fixed import FixedConfig, FixedPolicy
from agft_ray.policy.baselines.pair import PairConfig, PairPolicy
from agft_ray.policy.baselines.pid import PidConfig, PidPolicy
from agft_ray.policy.baselines.predictive import PredictiveConfig, PredictivePolicy
from agft_ray.policy.baselines.rules import RulesConfig, RulesPolicy
from agft_ray.policy.baselines.volta import VoltaConfig, VoltaGovernor
from agft_ray.policy.imported import ImportedConfig, is_imported
from agft_ray.policy.phases.config import PhasesConfig
from agft_ray.policy.phases.policy import PhasesPolicy
from agft_ray.policy.reference.policy import AgftReferenceConfig, AgftReferencePolicy
from agft_ray.policy.step import StepGovernor

BuiltinConfig = Annotated[
    DefaultConfig
    | FixedConfig
    | PairConfig
    | AgftConfig
    | PhasesConfig
    | AgftReferenceConfig
    | RulesConfig
    | ActivityConfig
    | PidConfig
    | PredictiveConfig,
    Field(discriminator="name"),
]
"""Settings of a policy of this package; the field `name` says which."""

PolicyConfig = Annotated[
    Annotated[BuiltinConfig, Tag("ours")] | Annotated[ImportedConfig, Tag("yours")],
    Discriminator(lambda values: "yours" if is_imported(values) else "ours"),
]
"""Settings of any policy."""

GovernorConfig = VoltaConfig
"""Settings of any step governor: there is one."""


def build_policy(config: PolicyConfig) -> Policy:
    """A fresh policy with these settings."""
    match config:
        case DefaultConfig():
            return DefaultPolicy(config)
        case FixedConfig():
            return FixedPolicy(config)
        case PairConfig():
            return PairPolicy(config)
        case AgftConfig():
            return AgftPolicy(config)
        case PhasesConfig():
            return PhasesPolicy(config)
        case AgftReferenceConfig():
            return AgftReferencePolicy(config)
        case RulesConfig():
            return RulesPolicy(config)
        case ActivityConfig():
            return ActivityPolicy(config)
        case PidConfig():
            return PidPolicy(config)
        case PredictiveConfig():
            return PredictivePolicy(config)
        case ImportedConfig():
            return config.build()


def build_governor(config: GovernorConfig) -> StepGovernor:
    """A fresh step governor with these settings."""
    return VoltaGovernor(config)
