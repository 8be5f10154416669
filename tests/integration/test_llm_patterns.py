"""Every serving pattern of `ray.serve.llm`, each server with its tuner, on a real Ray cluster.

This file is also the script that runs the cluster, in a process of its own. Ray, Serve and the
servers are real. FAKE are the LLM engine (fake_llm_engine.py) and the GPUs' driver
(tests/fake_nvml), one state file for each of two nodes.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import ray
from cluster_script import fake_nvml, results_of
from ray import serve
from ray.cluster_utils import Cluster
from serve_app import wait_until

from agft_ray.actors.experience_aggregator import get_aggregator
from agft_ray.errors import ConfigError, GpuLostError

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

TUNER = {"policy": {"name": "fixed", "sm_clock_mhz": 1200}, "window_s": 0.5, "settle_s": 0.1}
SLOWER = TUNER | {"policy": {"name": "fixed", "sm_clock_mhz": 900}}
FOR_DECODE = TUNER | {"policy": {"name": "fixed", "sm_clock_mhz": 1050}}
ENERGY = {"gpu": {"kind": "nvml"}, "tuner": TUNER}
LOST, NO_PERMISSION = 15, 4
UUIDS = {
    node: [f"GPU-{node}{index}000000-1111-2222-3333-444444444444" for index in range(count)]
    for node, count in (("a", 7), ("b", 3))
}
DEPLOYMENTS = {
    "one": "TunedLLMServer:one",
    "two": "TunedLLMServer:two",
    "ranks": "TunedDPServer:ranks",
    "prefill": "Prefill:pd",
    "decode": "Decode:pd",
}
APPS = {"one": "llm", "two": "llm", "ranks": "dp", "prefill": "pd", "decode": "pd"}
# No request comes in; an ingress would only import vLLM once more.
NONE = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
INGRESS = {"autoscaling_config": NONE, "ray_actor_options": {"num_cpus": 0.1}}


def llm_config(model, nodes, **engine_kwargs):
    """Of an engine with a GPU on each of those nodes ("aa", "ab"); health is asked for by hand."""
    return {
        "model_loading_config": {"model_id": model, "model_source": "none"},
        "engine_kwargs": {"tensor_parallel_size": len(nodes)} | engine_kwargs,
        "placement_group_config": {"bundles": [{"GPU": 1, "CPU": 0.1, n: 0.01} for n in nodes]},
        "deployment_config": {
            "num_replicas": 1,
            "ray_actor_options": {"num_cpus": 0.1},
            "health_check_period_s": 600,
            "graceful_shutdown_wait_loop_s": 0.1,
        },
    }


# -- the script ------------------------------------------------------------------------------------


def apps():
    """An application of Ray's own builder, which names our server, and two of ours."""
    from ray.serve.llm import build_openai_app

    from agft_ray.serve.llm.servers import build_dp_openai_app, build_pd_openai_app

    ours = {
        "server_cls": "agft_ray.serve.llm:TunedLLMServer",
        "experimental_configs": {"energy": ENERGY},
    }
    one, two = llm_config("one", "aa") | ours, llm_config("two", "ab") | ours
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    prefill = llm_config("pd", "a", kv_transfer_config=transfer)
    decode = llm_config("pd", "a", kv_transfer_config=transfer)
    decode["deployment_config"]["user_config"] = FOR_DECODE
    common = {"ingress_deployment_config": INGRESS}
    return {
        "llm": build_openai_app(common | {"llm_configs": [one, two]}),
        # A rank asks for bundles on both nodes; Ray then gives each rank those of one node.
        "dp": build_dp_openai_app(
            common
            | {"llm_config": llm_config("ranks", "ab", data_parallel_size=2)}
            | {"energy": ENERGY}
        ),
        "pd": build_pd_openai_app(
            common | {"prefill_config": prefill, "decode_config": decode, "energy": ENERGY}
        ),
    }


def refusals():
    """What the builders say to mistakes."""
    from ray.serve.llm import build_openai_app as rays

    from agft_ray.serve.llm import servers as llm

    plain = llm_config("bad", "a")
    bad_energy = plain | {"experimental_configs": {"energy": {"tuner": {"window_s": 0.1}}}}
    deployment = plain["deployment_config"] | {"user_config": {"mode": "contol"}}
    bad_user_config = plain | {"deployment_config": deployment}
    server = {"server_cls": "agft_ray.serve.llm:TunedLLMServer"}
    attempts = {
        "rays": lambda: rays({"llm_configs": [bad_energy | server]}),
        "ours": lambda: llm.build_openai_app({"llm_configs": [bad_energy, bad_user_config]}),
        "dp": lambda: llm.build_dp_openai_app({"llm_config": bad_user_config}),
        "pd": lambda: llm.build_pd_openai_app(
            {"prefill_config": bad_energy, "decode_config": bad_user_config}
        ),
        "args": lambda: llm.build_openai_app({"llm_configs": [plain], "enregy": ENERGY}),
    }
    return {name: refusal(attempt) for name, attempt in attempts.items()}


def refusal(attempt):
    try:
        attempt()
    except ConfigError as error:
        return str(error)
    return "none"


def known_to(aggregator):
    """In the aggregator: each live replica's status, with the key its experience is kept under."""
    return {
        replica: member.report.status
        | {"deployment": member.report.deployment, "key": dataclasses.asdict(member.report.key)}
        for replica, member in aggregator._store._members.items()
        if member.alive
    }


class Script:
    def __init__(self, directory):
        self.directory = directory
        library = fake_nvml().build(directory)
        os.environ |= {
            "AGFT_RAY_LEASE_DIR": str(directory / "leases"),
            "FAKE_ENGINE_DIR": str(directory),
            "RAYLLM_VLLM_ENGINE_CLS": "fake_llm_engine.FakeLLMEngine",
            "PYTHONPATH": str(Path(__file__).parent),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=16, include_dashboard=False)
        self.gpus = {}
        for name, uuids in UUIDS.items():
            fake = fake_nvml().FakeNvml(directory / f"{name}.nvml", uuids=uuids)
            self.gpus |= {uuid: fake.gpu(index) for index, uuid in enumerate(uuids)}
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}
            self.cluster.add_node(
                num_cpus=16,
                num_gpus=len(uuids),
                resources={name: 1},
                env_vars=fake.env(library) | visible,
            )

    def tuners(self):
        """Each replica's status, by replica."""
        return ray.get(get_aggregator().__ray_call__.remote(known_to))

    def of(self, name):
        """The statuses of one deployment's replicas."""
        deployment = f"{APPS[name]}#{DEPLOYMENTS[name]}"
        return [s for s in self.tuners().values() if s["deployment"] == deployment]

    def one(self, name):
        """The status of a deployment's only replica, as soon as it has one."""
        return wait_until(lambda: self.of(name), 30, f"the status of {name}")[0]

    def handle(self, name):
        return serve.get_deployment_handle(DEPLOYMENTS[name], APPS[name])

    def locked(self, *names):
        """What is locked on the GPUs of those deployments, or on all."""
        # A tuner that Ray has just restarted does not know its GPUs yet.
        groups = [s.get("gpu_uuid", "") for name in names for s in self.of(name)]
        uuids = ",".join(groups if names else self.gpus).split(",")
        return [self.gpus[uuid].locked_mhz for uuid in uuids if uuid]

    def until_locked(self, mhz, *names):
        expected = (mhz, mhz) if mhz else None
        wait_until(lambda: set(self.locked(*names)) == {expected}, 30, f"{names} at {mhz}")

    def engines(self):
        """What each replica's engine has found, by replica."""
        found = {path.stem: path for path in self.directory.glob("*.json")}
        return {replica: json.loads(path.read_text()) for replica, path in found.items()}

    def run(self):
        found = {"refusals": refusals()}
        for gpu in self.gpus.values():  # as somebody may have left them
            gpu.locked_mhz = (600, 600)
        serve.start(proxy_location="Disabled")
        serve.run_many(
            [
                serve.RunTarget(app, name=name, route_prefix=f"/{name}")
                for name, app in apps().items()
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        return (
            found | self.start() | self.refuse() | self.reconfigure() | self.health() | self.end()
        )

    def start(self):
        wait_until(
            lambda: [s.get("reset_due") for s in self.tuners().values()] == [False] * 6,
            240,
            "six tuners that have reset their GPUs",
        )
        waiting = {"tuners": self.tuners(), "engines": self.engines(), "locked": self.locked()}
        (self.directory / "go").touch()
        wait_until(lambda: len(self.engines()) == 6, 120, "six engines")
        self.until_locked(1200, "one", "two", "ranks", "prefill")
        self.until_locked(1050, "decode")
        wait_until(
            lambda: all(s["locked_sm_clock_mhz"] for s in self.tuners().values()),
            30,
            "statuses that say so",
        )
        return {"waiting": waiting, "tuners": self.tuners(), "engines": self.engines()}

    def refuse(self):
        """One of a replica's two GPUs refuses a clock."""
        status = self.one("one")
        refusing = status["gpu_uuid"].split(",")[1]
        self.gpus[refusing].fail("set", NO_PERMISSION)
        self.handle("one").reconfigure.remote(SLOWER).result(timeout_s=30)
        (status,) = wait_until(
            lambda: [s for s in self.of("one") if s["state"] == "refused"], 30, "the refusal"
        )
        refused = {"status": status, "locked": self.locked("one"), "uuid": refusing}
        self.gpus[refusing].fail("set", 0)
        return {"refused": refused}

    def reconfigure(self):
        for name in ("two", "prefill"):
            self.handle(name).reconfigure.remote(SLOWER).result(timeout_s=30)
            self.until_locked(900, name)
        self.handle("prefill").reconfigure.remote({"window_s": -1}).result(timeout_s=30)
        (status,) = wait_until(
            lambda: [s for s in self.of("prefill") if s["config_error"]], 30, "the mistake named"
        )
        return {
            "reconfigured": self.tuners(),
            "mistaken": {"status": status, "locked": self.locked("prefill")},
        }

    def health(self):
        """What the servers say of their health while a tuner is dead, and when a GPU is lost."""
        status = self.one("prefill")
        (uuid,) = status["gpu_uuid"].split(",")
        check = self.handle("prefill").check_health
        os.kill(status["tuner_pid"], signal.SIGKILL)
        self.until_locked(None, "prefill")
        check.remote().result(timeout_s=30)
        self.until_locked(900, "prefill")
        self.gpus[uuid].fail("any", LOST)

        def lost():
            try:
                check.remote().result(timeout_s=30)
            except GpuLostError as error:
                return str(error.cause if hasattr(error, "cause") else error)
            return None

        message = wait_until(lost, 30, "the loss of the GPU noticed")
        self.handle("decode").check_health.remote().result(timeout_s=30)
        self.gpus[uuid].locked_mhz = None  # as the reset or reboot does that brings it back
        self.gpus[uuid].fail("any", 0)
        return {"health": {"lost": uuid, "message": message}}

    def end(self):
        uuids = [uuid for status in self.of("ranks") for uuid in status["gpu_uuid"].split(",")]
        before = [self.gpus[uuid].locked_mhz for uuid in uuids]
        serve.delete("dp")
        wait_until(lambda: {self.gpus[uuid].locked_mhz for uuid in uuids} == {None}, 10, "resets")
        others = self.locked("two", "decode")
        serve.shutdown()
        self.until_locked(None)
        return {"deleted": {"before": before, "others": others}}


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
    return results_of(__file__, directory, timeout_s=900)


def of(results, name):
    """The statuses of one deployment's replicas, by replica."""
    deployment = f"{APPS[name]}#{DEPLOYMENTS[name]}"
    tuners = results["tuners"].items()
    return {replica: s for replica, s in tuners if s["deployment"] == deployment}


def uuids_of(status):
    return status["gpu_uuid"].split(",")


def test_the_tuners_are_there_before_the_engines(results):
    waiting = results["waiting"]
    assert waiting["engines"] == {}
    assert set(waiting["locked"]) == {None}, "clocks are not default for the engine that loads"
    assert len(waiting["tuners"]) == 6
    assert {s["reason"] for s in waiting["tuners"].values()} == {"vLLM has not started yet"}


def test_each_tuner_has_exactly_its_engines_gpus(results):
    assert results["engines"].keys() == results["tuners"].keys()
    for replica, status in results["tuners"].items():
        assert sorted(uuids_of(status)) == results["engines"][replica]["gpus"], status
        assert status["replica_pid"] == results["engines"][replica]["pid"]
        assert status["state"] == "tuning"
        assert status["generation_tokens"] > 0
    everywhere = [uuid for status in results["tuners"].values() for uuid in uuids_of(status)]
    assert sorted(everywhere) == sorted(UUIDS["a"] + UUIDS["b"])


def test_a_replica_on_two_nodes_has_one_tuner(results):
    (status,) = of(results, "two").values()
    assert [uuid[4] for uuid in uuids_of(status)] == ["a", "b"]
    assert status["key"]["tensor_parallel"] == 2


def test_each_rank_has_the_bundles_that_it_was_given(results):
    bundles = sorted(results["engines"][replica]["bundles"] for replica in of(results, "ranks"))
    assert bundles == [["0", "2"], ["1", "3"]], "the ranks' bundles were not interleaved"
    nodes = [{uuid[4] for uuid in uuids_of(status)} for status in of(results, "ranks").values()]
    assert sorted(nodes, key=min) == [{"a"}, {"b"}]
    assert {status["rank"] for status in of(results, "ranks").values()} == {0, 1}


def test_prefill_and_decode_learn_apart(results):
    (prefill,) = of(results, "prefill").values()
    (decode,) = of(results, "decode").values()
    assert (prefill["key"]["role"], decode["key"]["role"]) == ("prefill", "decode")
    assert prefill["key"] | {"role": "decode"} == decode["key"]
    for name in ("one", "two", "ranks"):
        assert {status["key"]["role"] for status in of(results, name).values()} == {"mixed"}


def test_where_one_gpu_refuses_none_is_locked(results):
    refused = results["refused"]
    assert refused["locked"] == [None, None]
    assert refused["uuid"] in refused["status"]["reason"]


def test_a_user_config_takes_the_place_of_the_first_settings(results):
    (decode,) = of(results, "decode").values()
    assert decode["locked_sm_clock_mhz"] == 1050
    others = [s for s in results["tuners"].values() if s != decode]
    assert {status["locked_sm_clock_mhz"] for status in others} == {1200}


def test_settings_reach_the_tuners_of_live_replicas(results):
    assert results["reconfigured"].keys() == results["tuners"].keys()
    for replica, status in results["reconfigured"].items():
        assert status["tuner_pid"] == results["tuners"][replica]["tuner_pid"]


def test_a_mistake_in_live_settings_changes_nothing_and_is_named(results):
    mistaken = results["mistaken"]
    assert mistaken["locked"] == [[900, 900]]
    assert "window_s" in mistaken["status"]["config_error"]


def test_health_fails_for_a_lost_gpu_and_names_it(results):
    health = results["health"]
    assert health["lost"] in health["message"]


def test_what_is_deleted_is_reset_and_nothing_else(results):
    deleted = results["deleted"]
    assert deleted["before"] == [[1200, 1200]] * 4
    assert deleted["others"] == [[900, 900]] * 2 + [[1050, 1050]]


@pytest.mark.parametrize(
    ("builder", "named"),
    [
        ("rays", ["experimental_configs.energy.tuner.window_s"]),
        (
            "ours",
            [
                "llm_configs.0.experimental_configs.energy",
                "llm_configs.1.deployment_config.user_config.mode",
            ],
        ),
        ("dp", ["llm_config.deployment_config.user_config.mode", "'contol'"]),
        ("pd", ["prefill_config.experimental_configs.energy", "decode_config.deployment_config"]),
        ("args", ["enregy: unknown setting; did you mean 'energy'?"]),
    ],
)
def test_mistakes_are_refused_where_the_application_is_built(results, builder, named):
    for part in named:
        assert part in results["refusals"][builder]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
