"""The driver of a Ray cluster, in a process of its own so that it can be killed as well.

`python driver.py local` starts a cluster of one node with one GPU, `python driver.py nodes` one
whose head has none, for `add_gpu_node`. Then each line read is a command, `["name", arguments]`
of a method of `Driver`, and each line written its answer, `{"result": ...}` or `{"error": ...}`.
The end of the input ends the driver.
"""

import json
import os
import sys
import time

import ray
from ray import serve
from ray.cluster_utils import Cluster
from victim import CONFIG, Victim

APP = "chaos"
TIMEOUT_S = 30


class Driver:
    def __init__(self, kind):
        self._requests = []
        if kind == "local":
            ray.init(
                address="local",
                num_cpus=1,
                num_gpus=1,
                include_dashboard=False,
                log_to_driver=False,
            )
        else:
            self._cluster = Cluster()
            self._cluster.add_node(num_cpus=1, include_dashboard=False)
            ray.init(address=self._cluster.address, log_to_driver=False)

    def deploy(self, lease_dir, version=1, fails=False, slow_s=0, **settings):
        """Start the app, or turn it into this; returns once it serves.

        As with a config file, a live replica is kept as long as all but the settings stay.
        """
        victim = Victim.options(
            user_config=CONFIG | settings, version=f"{version}{fails}{slow_s}", _internal=True
        )
        serve.start(proxy_location="Disabled")
        serve.run(victim.bind(lease_dir, version, fails, slow_s), name=APP, route_prefix=None)

    def delete(self):
        serve.delete(APP)

    def shutdown(self):
        serve.shutdown()

    def call(self, method, *arguments):
        return self._request(method, *arguments).result(timeout_s=TIMEOUT_S)

    def send(self, method, *arguments):
        """As `call`, without waiting for the answer."""
        self._requests.append(self._request(method, *arguments))

    def latencies_s(self, duration_s):
        """Of requests one after the other for so long."""
        latencies, end_s = [], time.monotonic() + duration_s
        while (start_s := time.monotonic()) < end_s:
            self.call("ping")
            latencies.append(time.monotonic() - start_s)
            time.sleep(0.02)
        return latencies

    def kill_replica(self):
        actors = ray.util.list_named_actors(all_namespaces=True)
        (name,) = (a["name"] for a in actors if a["name"].startswith(f"SERVE_REPLICA::{APP}#"))
        ray.kill(ray.get_actor(name, namespace="serve"))

    def add_gpu_node(self, env_vars):
        self._node = self._cluster.add_node(num_cpus=1, num_gpus=1, env_vars=env_vars)

    def kill_raylet(self):
        """With SIGKILL; and reap it, for its workers live on for as long as it is a zombie."""
        self._node.kill_raylet()

    def remove_gpu_node(self, graceful):
        self._cluster.remove_node(self._node, allow_graceful=graceful)

    def _request(self, method, *arguments):
        return getattr(serve.get_app_handle(APP), method).remote(*arguments)


def answer(driver, name, arguments, settings):
    try:
        return {"result": getattr(driver, name)(*arguments, **settings)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(kind):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # for whatever else prints
    driver = Driver(kind)
    answers.write('{"result": "ready"}\n')
    for line in sys.stdin:
        answers.write(json.dumps(answer(driver, *json.loads(line))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
