"""An engine whose GPUs are on two nodes: one decision, all of them locked or none.

This file is also the script that runs the cluster, in a process of its own. The GPUs are fakes
(tests/fake_nvml), one state file a node; the engine is a counter that grows.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ray
from cluster_script import fake_nvml, results_of
from ray import serve
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.serve import attach_tuner
from agft_ray.types import EngineSample

pytestmark = pytest.mark.ray

UUIDS = {name: f"GPU-{name}0000000-1111-2222-3333-444444444444" for name in "ab"}
CONFIG = {
    "mode": "control",
    "policy": {"name": "fixed", "sm_clock_mhz": 1200},
    "window_s": 0.5,
    "settle_s": 0.1,
}


def busy(t_s):
    """A made-up engine that generates 100 tokens a second."""
    tokens = int(100 * t_s)
    return EngineSample(
        t_s=t_s,
        running=4,
        generation_tokens=tokens,
        iterations=tokens // 4,
        iteration_tokens=tokens,
        itl_sum_s=tokens * 0.04,
        itl_count=tokens,
    )


@serve.deployment(
    placement_group_bundles=[{"CPU": 0.1, "a": 0.1, "GPU": 1}, {"b": 0.1, "GPU": 1}],
    placement_group_strategy="STRICT_SPREAD",
    ray_actor_options={"num_cpus": 0.1, "resources": {"a": 0.1}},
    health_check_period_s=1,
    graceful_shutdown_wait_loop_s=0.1,
)
class TwoNodes:
    def __init__(self, lease_dir):
        gpu = NvmlGpuConfig(lease_dir=lease_dir)
        self.link = attach_tuner(
            busy, gpu=gpu, engine_model="made up", tensor_parallel=2, config=CONFIG
        )

    async def status(self):
        await self.link.probed()
        try:
            return await self.link._tuner.status.remote()
        except RayError:  # the tuner is restarting
            return {"state": "away"}

    def check_health(self):
        self.link.check_health()

    async def __del__(self):
        await self.link.close()


# -- the script ------------------------------------------------------------------------------------


def until(condition, timeout_s, what):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"after {timeout_s} s still not: {what}")


class Script:
    def __init__(self, directory):
        library = fake_nvml().build(directory)
        self.fakes = {
            name: fake_nvml().FakeNvml(directory / f"{name}.nvml", gpus=1, uuids=[uuid])
            for name, uuid in UUIDS.items()
        }
        self.gpus = {name: fake.gpu(0) for name, fake in self.fakes.items()}
        for gpu in self.gpus.values():
            gpu.busy = 1
        self.leases = directory / "leases"
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=4, include_dashboard=False)
        for name, fake in self.fakes.items():
            self.cluster.add_node(
                num_cpus=1, num_gpus=1, resources={name: 1}, env_vars=fake.env(library)
            )

    def locked(self):
        return {name: gpu.locked_mhz for name, gpu in self.gpus.items()}

    def are(self, locked):
        return lambda: set(self.locked().values()) == {locked}

    def run(self):
        serve.start(proxy_location="Disabled")
        app = TwoNodes.bind(str(self.leases))
        handle = serve.run(app, name="two")
        until(self.are((1200, 1200)), 60, "both locked")
        status = until(lambda: self.status(handle, locked_sm_clock_mhz=1200), 10, "its status")
        found = {"status": status, "leases": sorted(p.name for p in self.leases.glob("*.json"))}

        # One of the two refuses: the other is rolled back.
        self.gpus["b"].fail("set", 4)
        self.gpus["b"].locked_mhz = None
        os.kill(status["tuner_pid"], signal.SIGKILL)
        until(self.are(None), 10, "both reset after the tuner's death")
        found["refused"] = until(lambda: self.status(handle, state="refused"), 30, "the refusal")
        found["locked_when_one_refuses"] = self.locked()

        # Then it does not: new settings have it tried again.
        self.gpus["b"].fail("set", 0)
        again = TwoNodes.options(user_config=None).bind(str(self.leases))
        serve.delete("two")
        until(self.are(None), 10, "none locked after serve.delete")
        until(lambda: not list(self.leases.glob("*.json")), 5, "no lease after serve.delete")
        handle = serve.run(again, name="two")
        until(self.are((1200, 1200)), 60, "both locked again")

        died_s = time.monotonic()
        os.kill(handle.status.remote().result()["tuner_pid"], signal.SIGKILL)
        until(self.are(None), 10, "both reset")
        found["reset_s"] = time.monotonic() - died_s
        until(self.are((1200, 1200)), 30, "both locked by the restarted tuner")
        serve.shutdown()
        until(self.are(None), 10, "none locked after serve.shutdown")
        return found

    def status(self, handle, **expected):
        status = handle.status.remote().result()
        return status if expected.items() <= status.items() else None


def main(directory):
    script = Script(directory)
    try:
        ray.init(address=script.cluster.address, log_to_driver=False)
        (directory / "results.json").write_text(json.dumps(script.run()))
    finally:
        ray.shutdown()
        script.cluster.shutdown()


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(directory):
    return results_of(__file__, directory, timeout_s=300)


def test_one_tuner_reads_and_sets_the_gpus_of_both_nodes(results):
    status = results["status"]
    assert status["gpu_uuid"] == ",".join(UUIDS.values())
    assert status["locked_sm_clock_mhz"] == 1200
    assert status["state"] == "tuning"
    assert results["leases"] == sorted(f"{uuid}.json" for uuid in UUIDS.values())


def test_where_one_refuses_none_is_locked_and_the_reason_names_it(results):
    assert results["locked_when_one_refuses"] == {"a": None, "b": None}
    assert UUIDS["b"] in results["refused"]["reason"]
    assert "\n" not in results["refused"]["reason"]
    assert results["refused"]["windows"] > 0, "it does not observe"


def test_both_nodes_are_reset_when_the_tuner_dies(results):
    print(f"both nodes reset {results['reset_s']:.2f} s after the tuner's death")
    assert results["reset_s"] < 2.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
