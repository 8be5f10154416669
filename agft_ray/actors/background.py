"""How our actors run: beside serving, and not in its way."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def background_actor(actor: type, *, node_id: str | None = None, **options: Any) -> Any:
    """A class as an actor that is given no CPU of its own, on a node if one is named.

    Ray keeps no list of the calls it gets: a tuner is told something some times a second, of which
    the cluster's control service would hear one by one.
    """
    if node_id is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(actor).options(num_cpus=0, enable_task_events=False, **options)
