"""From settings to a policy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agft_ray.policy.agft import AgftConfig, AgftPolicy
from agft_ray.policy.base import Policy
from agft_ray.policy.default import DefaultConfig, DefaultPolicy
from agft_ray.policy.fixed import FixedConfig, FixedPolicy

PolicyConfig = Annotated[DefaultConfig | FixedConfig | AgftConfig, Field(discriminator="name")]
"""Settings of any policy; the field `name` says which."""


def build_policy(config: PolicyConfig) -> Policy:
    """A fresh policy with these settings."""
    match config:
        case DefaultConfig():
            return DefaultPolicy(config)
        case FixedConfig():
            return FixedPolicy(config)
        case AgftConfig():
            return AgftPolicy(config)
