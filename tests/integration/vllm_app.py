"""Real vLLM behind Ray Serve LLM, for the modules that test it."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import openai
import yaml
from serve_app import ROOT, free_port, wait_until

MODEL = "tiny"
DEPLOYMENT = f"TunedLLMServer:{MODEL}"
DISCOVERY = "prom_metrics_service_discovery.json"
PROMPTS = ["Hello", "What is the clock of an idle GPU?", "energy " * 40]
TUNER = {"window_s": 1.0, "settle_s": 0.1, "policy": {"name": "fixed", "sm_clock_mhz": 1200}}


def gcs_address(app):
    """Where the app's cluster is to be joined: `serve run` on a local cluster does not say it."""
    session = Path(app.environment["RAY_TMPDIR"], "ray", "session_latest")
    (port,) = session.glob("gcs_server_port_*")
    (metrics,) = json.loads((session.parent / DISCOVERY).read_text())
    return f"{metrics['targets'][0].rsplit(':', 1)[0]}:{port.read_text()}"


class Statuses:
    """The newest answer of a running `agft-ray status --watch`."""

    def __init__(self, app):
        command = [Path(sys.executable).with_name("agft-ray"), "status", "--json", "--watch", "0.5"]
        self._process = subprocess.Popen(
            [*command, "--address", gcs_address(app)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **app.environment},
        )
        self.replicas = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            self.replicas = [r for r in json.loads(line)["replicas"] if r["alive"]]

    def until(self, condition, timeout_s, what):
        """The live replicas' statuses, as soon as they are as they should be."""
        try:
            return wait_until(
                lambda: self.replicas if condition(self.replicas) else None, timeout_s, what
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {self.replicas}") from error

    def close(self):
        self._process.kill()
        self._process.wait()


def shipped(model, *, replicas, energy):
    """The shipped CPU config, with a GPU for each replica and settings for quick tests."""
    content = yaml.safe_load((ROOT / "configs" / "vllm_cpu.yaml").read_text())
    content["http_options"]["port"] = free_port()
    (application,) = content["applications"]
    (llm_config,) = application["args"]["llm_configs"]
    application["args"]["energy"] = energy
    llm_config["model_loading_config"]["model_source"] = str(model)
    deployment = llm_config["deployment_config"]
    deployment |= {"num_replicas": replicas, "health_check_period_s": 1}
    deployment |= {"graceful_shutdown_wait_loop_s": 0.1}
    deployment["ray_actor_options"] |= {"num_gpus": 1 if "uuids" not in energy["gpu"] else 0}
    return content


def client(app):
    return openai.AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=3)


async def stream(api, prompt, tokens):
    """Text chunks and the usage of one streamed completion."""
    chunks = await api.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    texts, usage = [], None
    async for chunk in chunks:
        texts += [choice.text for choice in chunk.choices]
        usage = chunk.usage or usage
    return texts, usage


@contextlib.contextmanager
def under_load(app, clients=8):
    """Streamed requests, one after the other of each client."""
    stop = threading.Event()

    async def ask():
        async with client(app) as api:
            while not stop.is_set():
                await stream(api, "Hello", 32)

    async def all_clients():
        await asyncio.gather(*(ask() for _ in range(clients)))

    failures = []

    def run():
        try:
            asyncio.run(all_clients())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


def until_rays_metrics(app, statuses, replicas):
    """Wait until each replica's tuner has seen it at work in Ray Serve's own metrics."""
    figures = ("serve_request_rate_per_s", "serve_latency_s", "serve_in_flight")
    with under_load(app):
        statuses.until(
            lambda found: len(found) == replicas and all(r.get(f) for r in found for f in figures),
            60,
            "request rate, latency and requests in flight of Ray Serve's metrics",
        )


async def load(app, requests):
    """So many streamed requests at once; their prompt and completion tokens, by usage."""
    async with client(app) as api:
        answers = await asyncio.gather(
            *(stream(api, PROMPTS[i % len(PROMPTS)], 20 + i) for i in range(requests))
        )
    assert all(usage.completion_tokens == 20 + i for i, (_, usage) in enumerate(answers))
    return (
        sum(usage.prompt_tokens for _, usage in answers),
        sum(usage.completion_tokens for _, usage in answers),
    )


def pids(replicas):
    return {replica["replica_pid"] for replica in replicas}


def tokens(replicas):
    return (
        sum(replica.get("prompt_tokens", 0) for replica in replicas),
        sum(replica.get("generation_tokens", 0) for replica in replicas),
    )
