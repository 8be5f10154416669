"""What the fleet's aggregator does, in virtual time: experience is added up and handed out."""

from __future__ import annotations

from collections.abc import Sequence

from agft_ray.clock import Clock
from agft_ray.policy.experience import Prior, PriorKey
from agft_ray.policy.registry import build_policy
from agft_ray.policy.reward import REWARD_SCHEMA
from agft_ray.priors.store import ExperienceStore, ReplicaReport
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.features import FEATURE_SCHEMA
from agft_ray.tuner import Tuner
from agft_ray.virtual.replica import FleetSetup, VirtualReplica

_DEPLOYMENT = "simulated"
_EXPIRY_ROUNDS = 6.0
"""Exchanges after which a silent replica would not count as live; none is silent here."""


def shares(setup: FleetSetup) -> bool:
    """Whether there is anything to exchange again and again: holdouts are settled at once."""
    return (
        setup.governor is None
        and setup.replicas > 1
        and setup.tuner.share_experience
        and build_policy(setup.tuner.policy).experience() is not None
    )


class ExperienceSharing:
    """One `ExperienceStore` for all tuned replicas, which report in the order of their numbers."""

    def __init__(self, setup: FleetSetup, replicas: Sequence[VirtualReplica], clock: Clock) -> None:
        self._setup = setup
        self._store = ExperienceStore(clock=clock, expiry_s=_EXPIRY_ROUNDS * setup.share_interval_s)
        self._priors: dict[int, Prior | None] = {}
        self._tuned = [
            (replica.index, replica.tuner) for replica in replicas if replica.tuner is not None
        ]

    @property
    def is_needed(self) -> bool:
        """See `shares`."""
        return shares(self._setup)

    def exchange(self) -> None:
        """Every replica reports, learns whether it is held out, and takes its prior."""
        config = self._setup.tuner
        for index, tuner in self._tuned:
            shared = tuner.policy.experience() if config.share_experience else None
            held = self._priors.get(index)
            report = ReplicaReport(
                str(index),
                _DEPLOYMENT,
                index,
                self._key(tuner),
                shared,
                prior_version=-1 if held is None else held.version,
            )
            reply = self._store.report(report)
            prior = self._priors[index] = reply.prior_after(held)
            tuner.holdout = reply.order < config.holdout_replicas
            if prior is not None and config.share_experience:
                tuner.offer_prior(prior)

    def _key(self, tuner: Tuner) -> PriorKey:
        config: TunerConfig = self._setup.tuner
        return PriorKey(
            gpu_model=tuner.gpu.model,
            engine_model=self._setup.model,
            tensor_parallel=1,
            role=tuner.role,
            quantization="none",
            objective=tuner.reward.learned_by(tuner.policy),
            window_s=config.window_s,
            feature_schema=FEATURE_SCHEMA,
            reward_schema=REWARD_SCHEMA,
            policy=config.policy.name,
        )
