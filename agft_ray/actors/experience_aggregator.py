"""The fleet's one aggregator: an `ExperienceStore` as a named, detached actor."""

from __future__ import annotations

from typing import Any

from agft_ray.actors.background import background_actor
from agft_ray.actors.names import AGGREGATOR, NAMESPACE
from agft_ray.clock import WallClock
from agft_ray.priors.store import ExperienceStore, FleetReply, ReplicaReport

EXPIRY_S = 6.0
"""A replica silent for this long (six reports) is no longer counted as live."""


class ExperienceAggregator:
    """Thin Ray shell; see `ExperienceStore` for what is promised.

    It lives until the cluster ends, over redeployments of applications, so that what was learned
    stays. Nothing waits for it: a tuner that cannot reach it goes on with what it knows.
    """

    def __init__(self) -> None:
        self._store = ExperienceStore(clock=WallClock(), expiry_s=EXPIRY_S)

    async def report(self, report: ReplicaReport) -> FleetReply:
        """See `ExperienceStore.report`."""
        return self._store.report(report)

    async def statuses(self, deployment: str | None = None) -> list[dict[str, Any]]:
        """See `ExperienceStore.statuses`."""
        return self._store.statuses(deployment)


def get_aggregator() -> Any:
    """A handle to the cluster's aggregator, which is started if there is none yet."""
    return background_actor(
        ExperienceAggregator,
        name=AGGREGATOR,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=100,
    ).remote()
