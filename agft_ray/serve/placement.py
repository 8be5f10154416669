"""Which physical GPUs a replica has, on which nodes."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from agft_ray.errors import GpuError, GpuTransientError
from agft_ray.gpu.identity import visible_uuids

PROBE_TIMEOUT_S = 60.0
"""How long the probes of a replica's GPUs may take, together."""


@dataclass(frozen=True, slots=True)
class NodeGpus:
    """The GPUs that a replica has on one node."""

    node_id: str
    uuids: tuple[str, ...]
    """NVML UUIDs, in ascending order."""
    fraction: float
    """The smallest share that the replica has of one of them: 1.0 if they are all its own."""


@dataclass(frozen=True, slots=True)
class _Probe:
    """A task that tells which GPUs one share of the replica's is made of."""

    share: str
    gpus: float
    ref: Any


def own_node_id() -> str:
    """The node of the calling process."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def own_gpu_amounts(bundles: Sequence[int] | None = None) -> tuple[float, ...]:
    """How many GPUs Ray has given the calling replica, by itself and in each bundle; none is ().

    Takes a call to the cluster's control service, but no probe. `bundles` as in `probe_gpus`.
    """
    return tuple(gpus for _, gpus in _shares(bundles))


def probe_gpus(
    bundles: Sequence[int] | None = None, *, timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[NodeGpus, ...]:
    """The GPUs of the calling replica, its own node first; none at all for an engine on CPUs.

    They are those the replica holds itself and those of its placement group. Call it before the
    engine takes the group's GPUs, and in a thread (`asyncio.to_thread`), for it waits seconds for
    probe tasks: no NVML or CUDA call is made in the replica's own process.

    Args:
        bundles: which of its placement group's bundles are the replica's, the one it runs in
            first; all of them, unless Serve's gang scheduling has replicas share the group.
        timeout_s: how long to wait for the probes.

    Raises `GpuTransientError`, naming the share, for a probe that does not come back (its GPUs are
    in use, its node is gone), otherwise the `GpuError` that a probe met with on its node.
    """
    probes = [
        _probe_own(gpus) if share is None else _probe_bundle(share, gpus)
        for share, gpus in _shares(bundles)
    ]
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for probe, (node_id, uuids) in zip(probes, _answers(probes, timeout_s), strict=True):
        found[node_id] += [(probe.gpus, uuid) for uuid in uuids]
    here = own_node_id()
    order = sorted(found, key=lambda node_id: (node_id != here, node_id))
    return tuple(_node_gpus(node_id, found[node_id]) for node_id in order if found[node_id])


def _node_gpus(node_id: str, shares: Sequence[tuple[float, str]]) -> NodeGpus:
    parts = Counter(uuid for _, uuid in shares)
    fraction = min(1.0, min(gpus for gpus, _ in shares), 1 / max(parts.values()))
    return NodeGpus(node_id, tuple(sorted(parts)), fraction)


def _shares(bundles: Sequence[int] | None) -> Iterator[tuple[int | None, float]]:
    """GPUs of each share of the calling replica: its own (None), and those of its bundles."""
    own = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    if own:
        yield None, own
    group = get_current_placement_group()
    if group is None:
        return
    resources = placement_group_table(group)["bundles"]
    indices = sorted(resources) if bundles is None else bundles
    for index in indices:
        # What the replica holds itself is part of the bundle that Serve places it in, the first.
        gpus = resources[index].get("GPU", 0.0) - (own if index == indices[0] else 0.0)
        if gpus > 0:
            yield index, gpus


def _probe_own(gpus: float) -> _Probe:
    ids = ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    order = {name: value for name, value in os.environ.items() if name == "CUDA_DEVICE_ORDER"}
    node_id = own_node_id()
    task = _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
    share = f"the replica's own GPUs ({ids}) on node {node_id}"
    return _Probe(share, gpus, task.remote(order | {"CUDA_VISIBLE_DEVICES": ids}))


def _probe_bundle(index: int, gpus: float) -> _Probe:
    group = get_current_placement_group()
    strategy = PlacementGroupSchedulingStrategy(
        group, index, placement_group_capture_child_tasks=False
    )
    # All of the bundle's GPUs: asked for fewer, Ray would name only so many.
    task = _look.options(num_gpus=gpus, scheduling_strategy=strategy)
    share = f"bundle {index} ({gpus:g} GPU) of placement group {group.id.hex()}"
    return _Probe(share, gpus, task.remote(None))


def _visible(environ: Mapping[str, str] | None) -> tuple[str, tuple[str, ...]]:
    """In a probe: this node, and the GPUs CUDA shows under `environ`; None: those assigned."""
    from agft_ray.gpu.nvml.backend import list_devices

    assigned = ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    # Set even where Ray was told not to (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES).
    os.environ.update(environ or {"CUDA_VISIBLE_DEVICES": assigned})
    return own_node_id(), visible_uuids(os.environ, list_devices())


# One call a process, since CUDA reads its variables only once.
_look = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(_visible)


def _answers(probes: Sequence[_Probe], timeout_s: float) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not probes:
        return
    refs = [probe.ref for probe in probes]
    _, late = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    for ref in late:
        ray.cancel(ref, force=True)
    for probe in probes:
        if probe.ref in late:
            raise GpuTransientError(
                f"{probe.share}: no answer within {timeout_s:g} s; its GPUs are in use or its node "
                "is gone; probe before the engine starts"
            )
        yield _answer(probe)


def _answer(probe: _Probe) -> tuple[str, tuple[str, ...]]:
    try:
        node_id, uuids = ray.get(probe.ref)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, GpuError):
            raise type(cause)(f"{probe.share}: {cause}") from None
        reason = str(error).strip().splitlines()[-1]
        raise GpuTransientError(f"{probe.share}: the probe failed: {reason}") from None
    return node_id, uuids
