"""Real Ray Serve, started by `serve run` on a cluster of its own, for each module that asks."""

import contextlib
import json
import time
from pathlib import Path

import yaml

from agft_ray.serve.checks import simulated_app
from agft_ray.serve.run import free_port, serve_run

ROOT = Path(__file__).parents[2]


def shipped_config(name, *, args=None, gpu=None, user_config=None):
    """A config of `configs/` on a free port, with changes."""
    content = yaml.safe_load((ROOT / "configs" / name).read_text())
    content["http_options"]["port"] = free_port()
    (application,) = content["applications"]
    application["args"] |= args or {}
    application["args"]["gpu"] |= gpu or {}
    application["deployments"][0]["user_config"] |= user_config or {}
    return content


def simulated_config(directory, *, args=None, user_config=None):
    """The shipped simulated application, with its GPUs in `directory`."""
    gpu = {"state_dir": str(directory / "gpus"), "history": True}
    return shipped_config("simulated.yaml", args=args, gpu=gpu, user_config=user_config)


@contextlib.contextmanager
def running_app(directory, content):
    path = directory / "app.yaml"
    path.write_text(yaml.safe_dump(content))
    config = simulated_app(path)
    with serve_run(path, config, directory / "serve.log") as app:
        yield app


def gpu_states(directory):
    """The simulated GPUs' state files, read without any of our code."""
    return [json.loads(path.read_text()) for path in sorted((directory / "gpus").glob("*.json"))]


def wait_until(condition, timeout_s, what):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"after {timeout_s} s still not: {what}")
