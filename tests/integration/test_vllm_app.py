"""Real vLLM on the CPU behind real Ray Serve LLM, each replica with a tuner.

FAKE here is only the GPUs' driver: every replica has a GPU by Ray's account (which asks the fake
NVML), its engine computes on the CPU all the same.
"""

import asyncio
import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest
import yaml
from serve_app import wait_until
from vllm_app import (
    DEPLOYMENT,
    DISCOVERY,
    MODEL,
    TUNER,
    Statuses,
    client,
    load,
    shipped,
    stream,
    tokens,
)

from agft_ray.serve.local_cluster import serve_run

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

GPUS = 2


def with_tuner(content, **tuner):
    """The config with live settings, which replace nothing but settings."""
    (application,) = content["applications"]
    application["deployments"] = [{"name": DEPLOYMENT, "user_config": TUNER | tuner}]
    return content


@pytest.fixture(scope="module")
def serving(directory, tiny_model, fake):
    """Two replicas behind the ingress: the config, the app, its statuses."""
    content = shipped(tiny_model, replicas=2, energy={"gpu": {"kind": "nvml"}, "tuner": TUNER})
    path = directory / "app.yaml"
    path.write_text(yaml.safe_dump(content))
    with serve_run(path, None, directory / "serve.log") as app:
        statuses = Statuses(app)
        yield content, app, statuses
        statuses.close()
    assert [fake.gpu(index).locked_mhz for index in range(2)] == [None, None]


def exported(app, name):
    """A metric of Ray's export, by label set; as Prometheus would find and scrape it."""
    discovery = Path(app.environment["RAY_TMPDIR"], "ray", DISCOVERY)
    found = {}
    for target in json.loads(discovery.read_text())[0]["targets"]:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"{name}{{"):
                    labels, value = line.rsplit(" ", 1)
                    found[labels] = float(value)
    return found


def test_each_replica_has_a_gpu_and_a_tuner_of_its_own(serving, fake):
    _, _, statuses = serving
    replicas = statuses.until(
        lambda found: [r["state"] for r in found] == ["tuning"] * 2, 60, "two replicas tuned"
    )
    assert {r["gpu_uuid"] for r in replicas} == {fake.gpu(0).uuid, fake.gpu(1).uuid}
    assert len({r["tuner_pid"] for r in replicas}) == 2
    assert all(r["deployment"] == f"llm#{DEPLOYMENT}" for r in replicas)


def test_answers_like_any_openai_server(serving):
    _, app, _ = serving

    async def ask():
        async with client(app) as api:
            chat = await api.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=8
            )
            texts, usage = await stream(api, "Hello", 64)
            return chat, texts, usage

    chat, texts, usage = asyncio.run(ask())
    assert chat.usage.completion_tokens == 8
    assert usage.completion_tokens == 64
    assert len(texts) > 2, "it came in one piece"


def test_the_tuners_count_every_token_that_vllm_counts(serving):
    _, app, statuses = serving

    def vllm_counted():
        kinds = ("prompt", "generation")
        return tuple(sum(exported(app, f"ray_vllm_{kind}_tokens_total").values()) for kind in kinds)

    def agree():
        counted = vllm_counted()
        return counted if tokens(statuses.replicas) == counted else None

    before = wait_until(agree, 20, "agreement on the requests of other tests")
    prompt, generated = asyncio.run(load(app, requests=24))
    after = (before[0] + prompt, before[1] + generated)
    replicas = statuses.until(lambda found: tokens(found) == after, 20, f"{after} tokens counted")
    wait_until(lambda: vllm_counted() == after, 20, f"vLLM's own counters at {after}")
    assert all(replica["generation_tokens"] > 0 for replica in replicas), "one had no request"


def test_decisions_are_in_force_and_exported(serving, fake):
    _, app, statuses = serving
    statuses.until(lambda found: all(r["windows"] > 3 for r in found), 30, "windows")
    assert [fake.gpu(index).locked_mhz for index in range(2)] == [(1200, 1200)] * 2
    clocks = wait_until(lambda: exported(app, "ray_agft_sm_clock_mhz"), 15, "the clocks' metric")
    for index in range(2):
        (labels,) = [labels for labels in clocks if fake.gpu(index).uuid in labels]
        assert f'deployment="{DEPLOYMENT}"' in labels
        assert 'application="llm"' in labels
    statuses.until(
        lambda found: all(r.get("serve_request_rate_per_s") is not None for r in found),
        30,
        "request rates of Ray Serve's metrics",
    )


def test_a_cancelled_request_does_not_leave_the_engine_busy(serving):
    _, app, statuses = serving

    async def give_up():
        async with client(app) as api:
            chunks = await api.completions.create(
                model=MODEL,
                prompt="Hello",
                max_tokens=900,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in chunks:
                break
            await chunks.close()

    asyncio.run(give_up())
    statuses.until(lambda found: all(r["running"] == 0 for r in found), 20, "idle engines")


def test_settings_reach_live_replicas(serving, fake):
    content, app, statuses = serving
    before = {replica["replica_pid"] for replica in statuses.replicas}
    app.deploy(with_tuner(content, policy={"name": "fixed", "sm_clock_mhz": 900}))
    wait_until(
        lambda: [fake.gpu(index).locked_mhz for index in range(2)] == [(900, 900)] * 2,
        30,
        "the new clock",
    )
    assert {replica["replica_pid"] for replica in statuses.replicas} == before


def test_a_mistake_in_live_settings_costs_no_replica(serving, fake):
    content, app, statuses = serving
    before = {replica["replica_pid"] for replica in statuses.replicas}
    app.deploy(with_tuner(content, window_s=-1.0))
    replicas = statuses.until(
        lambda found: len(found) == 2 and all("window_s" in r["config_error"] for r in found),
        30,
        "the mistake named",
    )
    assert {replica["replica_pid"] for replica in replicas} == before
    assert [fake.gpu(index).locked_mhz for index in range(2)] == [(900, 900)] * 2


def test_a_killed_replica_is_replaced_with_its_tuner(serving, fake):
    content, app, statuses = serving
    app.deploy(with_tuner(content))
    wait_until(lambda: fake.gpu(0).locked_mhz == (1200, 1200), 30, "settings that are right")
    victim, other = statuses.replicas
    gpu = next(fake.gpu(i) for i in range(2) if fake.gpu(i).uuid == victim["gpu_uuid"])
    os.kill(victim["replica_pid"], signal.SIGKILL)
    wait_until(lambda: gpu.locked_mhz is None, 10, "the reset of its clock")
    replicas = statuses.until(
        lambda found: (
            [r["state"] for r in found] == ["tuning"] * 2
            and victim["replica"] not in {r["replica"] for r in found}
        ),
        240,
        "its replacement",
    )
    assert other["replica"] in {replica["replica"] for replica in replicas}
    # The tuner is there before its engine has loaded, and decides nothing until then.
    wait_until(lambda: gpu.locked_mhz == (1200, 1200), 240, "its clock")
