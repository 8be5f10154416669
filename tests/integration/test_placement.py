"""`probe_gpus` from replica-like actors on a real Ray cluster, on two nodes with fake NVMLs.

This file is also the script that runs the cluster, in a process of its own: node A's Ray knows its
GPUs by UUID, node B's by number, and B's two differ.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import ray
from cluster_script import fake_nvml, results_of
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from agft_ray.errors import GpuError
from agft_ray.serve.placement import own_gpu_amounts, own_node_id, probe_gpus

pytestmark = pytest.mark.ray

A0 = "GPU-a0000000-1111-2222-3333-444444444444"
A1 = "GPU-a1000000-1111-2222-3333-444444444444"
B0 = "GPU-b0000000-1111-2222-3333-444444444444"
B1 = "GPU-b1000000-1111-2222-3333-444444444444"


# -- the script ------------------------------------------------------------------------------------


class Replica:
    """As Serve's replicas are: an asyncio actor."""

    def __init__(self, environ):
        os.environ.update(environ)

    async def probe(self, **arguments):
        """Node, UUIDs and fraction of each node's GPUs, or the error; and facts about here."""
        stall_s = asyncio.ensure_future(longest_stall_s())
        start_s = time.monotonic()
        try:
            gpus = await asyncio.to_thread(probe_gpus, **arguments)
            found = {"gpus": [dataclasses.astuple(node) for node in gpus]}
        except GpuError as error:
            found = {"error": type(error).__name__, "message": str(error)}
        took_s = time.monotonic() - start_s
        stall_s.cancel()
        here = {"node_id": own_node_id(), "visible": visible(), "amounts": own_gpu_amounts()}
        return found | here | {"took_s": took_s, "stall_s": await stall_s}


async def longest_stall_s():
    """The longest time for which the event loop did not run, until cancelled."""
    loop, longest_s = asyncio.get_running_loop(), 0.0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            before_s = loop.time()
            await asyncio.sleep(0.01)
            longest_s = max(longest_s, loop.time() - before_s)
    return longest_s


def visible():
    """What an engine in this process would go by."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def start_cluster(directory):
    fake = fake_nvml()
    library = fake.build(directory)
    fake_a = fake.FakeNvml(directory / "a.nvml", gpus=2, uuids=[A0, A1])
    names = ["NVIDIA A100-SXM4-80GB", "NVIDIA T4"]
    fake_b = fake.FakeNvml(directory / "b.nvml", gpus=2, uuids=[B0, B1], names=names)
    by_uuid = {"CUDA_VISIBLE_DEVICES": f"{A1},{A0[:8]}"}
    by_number = {"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    environments = {"a": fake_a.env(library) | by_uuid, "b": fake_b.env(library) | by_number}
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    for name, env_vars in environments.items():
        cluster.add_node(num_cpus=1, num_gpus=2, resources={name: 1}, env_vars=env_vars)
    return cluster


class Scenarios:
    """Replicas and their placement groups, started, probed at once and removed again."""

    def __init__(self):
        self._actors, self._groups = [], []

    def reserve(self, *bundles, strategy="PACK"):
        """A placement group; each bundle is (node, GPUs)."""
        bundles = [{node: 0.01, "GPU": gpus} for node, gpus in bundles]
        self._groups.append(ray.util.placement_group(bundles, strategy=strategy))
        return self._groups[-1]

    def start(self, node=None, num_gpus=0, group=None, bundle=0, environ=None):
        """A replica on the node, or in the group's bundle as Serve places it."""
        actor = ray.remote(Replica).options(
            num_cpus=0,
            num_gpus=num_gpus,
            resources={node: 0.01} if node else None,
            scheduling_strategy=in_bundle(group, bundle) if group else None,
        )
        self._actors.append(actor.remote(environ or {}))
        return self._actors[-1]

    def collect(self, **refs):
        """What they found; ends the replicas."""
        found = dict(zip(refs, ray.get(list(refs.values())), strict=True))
        while self._actors:
            ray.kill(self._actors.pop())
        while self._groups:
            ray.util.remove_placement_group(self._groups.pop())
        return found

    def whole_gpus(self):
        """On two nodes for one replica, one for another, and none."""
        group = self.reserve(("a", 2), ("b", 1), strategy="STRICT_SPREAD")
        spread = self.start(group=group).probe.remote()
        own, cpu = self.start("b", num_gpus=1), self.start()
        ray.wait([spread], timeout=60)
        engine = ray.remote(visible).options(
            num_cpus=0, num_gpus=1, scheduling_strategy=in_bundle(group, 1)
        )
        return self.collect(
            cpu=cpu.probe.remote(),
            spread=spread,
            own=own.probe.remote(),
            engine=engine.remote(),
        )

    def halves(self):
        """Of a GPU each for two replicas, twice one for a third; and an id that says too little."""
        half_0, half_1 = self.start("a", num_gpus=0.5), self.start("a", num_gpus=0.5)
        pieces = self.start(group=self.reserve(("b", 0.5), ("b", 0.5)))
        unclear = self.start("b", num_gpus=1, environ={"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
        return self.collect(
            half_0=half_0.probe.remote(),
            half_1=half_1.probe.remote(),
            pieces=pieces.probe.remote(),
            unclear=unclear.probe.remote(),
        )

    def shared_groups(self):
        """A group whose GPU a replica holds itself, and one that two replicas share."""
        holder = self.start(group=self.reserve(("a", 1), ("a", 1)), num_gpus=1)
        group = self.reserve(("b", 1), ("b", 1))
        member = self.start(group=group, bundle=1)
        ray.get(self.start(group=group, num_gpus=1).__ray_ready__.remote())
        return self.collect(
            holder=holder.probe.remote(),
            late=member.probe.remote(bundles=[0], timeout_s=1.0),
            member=member.probe.remote(bundles=[1]),
        )


def in_bundle(group, index):
    return PlacementGroupSchedulingStrategy(group, index, placement_group_capture_child_tasks=True)


def main(directory):
    cluster = start_cluster(directory)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        scenarios = Scenarios()
        found = scenarios.whole_gpus() | scenarios.halves() | scenarios.shared_groups()
        (directory / "results.json").write_text(json.dumps(found))
    finally:
        ray.shutdown()
        cluster.shutdown()


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(directory):
    return results_of(__file__, directory, timeout_s=150)


def gpus_of(found):
    """[(UUIDs, fraction)] of a replica's nodes."""
    assert "gpus" in found, found
    return [(uuids, fraction) for _, uuids, fraction in found["gpus"]]


def test_a_replica_without_gpus_has_none(results):
    assert results["cpu"]["gpus"] == []


def test_bundles_on_two_nodes(results):
    spread = results["spread"]
    (here, on_a, a_fraction), (there, on_b, b_fraction) = spread["gpus"]
    assert here == spread["node_id"] != there
    assert (on_a, a_fraction, b_fraction) == ([A0, A1], 1.0, 1.0)
    assert on_b == [[B0, B1][int(results["engine"])]], "the engine gets another GPU"


def test_a_gpu_of_ones_own(results):
    own = results["own"]
    assert gpus_of(own) == [([[B0, B1][int(own["visible"])]], 1.0)]
    assert own["gpus"][0][0] == own["node_id"]
    assert own["gpus"][0][1] != results["spread"]["gpus"][1][1]


def test_two_replicas_on_halves(results):
    for found in (results["half_0"], results["half_1"]):
        ((uuids, fraction),) = gpus_of(found)
        assert (len(uuids), fraction) == (1, 0.5)
        assert uuids[0].startswith(found["visible"])


def test_two_bundles_on_one_gpu(results):
    ((uuids, fraction),) = gpus_of(results["pieces"])
    assert (len(uuids), fraction) == (1, 0.5)


def test_a_replica_that_holds_a_gpu_of_its_group(results):
    assert gpus_of(results["holder"]) == [([A0, A1], 1.0)]


def test_amounts_are_known_without_a_probe(results):
    amounts = {name: found["amounts"] for name, found in results.items() if name != "engine"}
    group = [1.0, 1.0]
    assert amounts == {
        "cpu": [],
        "spread": [2.0, 1.0],
        "own": [1.0],
        "half_0": [0.5],
        "half_1": [0.5],
        "pieces": [0.5, 0.5],
        "unclear": [1.0],
        "holder": group,
        "late": group,
        "member": group,
    }


def test_a_member_of_a_gang_has_its_own_bundles_only(results):
    ((uuids, fraction),) = gpus_of(results["member"])
    assert (len(uuids), fraction) == (1, 1.0)


def test_refusals_cross_processes_and_name_what_and_where(results):
    unclear = results["unclear"]
    assert unclear["error"] == "GpuNotSupportedError"
    assert unclear["node_id"] in unclear["message"]
    assert "NVIDIA T4" in unclear["message"]
    assert unclear["message"].count("\n") == 0


def test_gpus_in_use_are_not_waited_for_forever(results):
    late = results["late"]
    assert late["error"] == "GpuTransientError"
    assert "bundle 0 (1 GPU)" in late["message"]
    assert "within 1 s" in late["message"]


def test_the_event_loop_runs_meanwhile(results):
    assert results["spread"]["stall_s"] < 0.5 * results["spread"]["took_s"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
