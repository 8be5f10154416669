"""Real vLLM on the CPU behind real Ray Serve LLM, each replica with a tuner.

FAKE here is only the GPUs' driver: every replica has a GPU by Ray's account (which asks the fake
NVML), its engine computes on the CPU all the same.
"""

import asyncio
import json
import operator
import os
import re
import signal
import time
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
    pids,
    shipped,
    stream,
    tokens,
    until_rays_metrics,
)

from agft_ray.serve.run import serve_run

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
    wait_until(lambda: locks(fake) == [None, None], 10, "the resets at the end")


@pytest.fixture(scope="module")
def sent():
    """Prompt and output tokens of each completed request of this module, by the answers' usage."""
    return []


def locks(fake):
    return [fake.gpu(index).locked_mhz for index in range(GPUS)]


def exported(app, name):
    """A metric of Ray's export, by label set; as Prometheus would find and scrape it. Nothing if a
    target does not answer."""
    discovery = Path(app.environment["RAY_TMPDIR"], "ray", DISCOVERY)
    found = {}
    try:
        for target in json.loads(discovery.read_text())[0]["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
                for line in response.read().decode().splitlines():
                    if line.startswith(f"{name}{{"):
                        labels, value = line.rsplit(" ", 1)
                        found[labels] = float(value)
    except OSError:
        return {}
    return found


def vllm_counted(app):
    """Prompt and output tokens by vLLM's own counters, all replicas."""
    kinds = ("prompt", "generation")
    return tuple(sum(exported(app, f"ray_vllm_{kind}_tokens_total").values()) for kind in kinds)


def total(usages):
    return tuple(map(sum, zip(*usages, strict=True)))


def test_each_replica_has_a_gpu_and_a_tuner_of_its_own(serving, fake):
    _, _, statuses = serving
    replicas = statuses.until(
        lambda found: [r["state"] for r in found] == ["tuning"] * 2, 60, "two replicas tuned"
    )
    assert {r["gpu_uuid"] for r in replicas} == {fake.gpu(0).uuid, fake.gpu(1).uuid}
    assert len({r["tuner_pid"] for r in replicas}) == 2
    assert all(r["deployment"] == f"llm#{DEPLOYMENT}" for r in replicas)


def test_answers_like_any_openai_server(serving, sent):
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
    sent += [(each.prompt_tokens, each.completion_tokens) for each in (chat.usage, usage)]


def test_the_tuners_count_every_token_that_vllm_counts(serving, sent):
    _, app, statuses = serving
    sent.append(asyncio.run(load(app, requests=24)))
    expected = total(sent)
    replicas = statuses.until(
        lambda found: tokens(found) == expected, 60, f"{expected} tokens counted"
    )
    wait_until(lambda: vllm_counted(app) == expected, 60, f"vLLM's own counters at {expected}")
    assert all(replica["generation_tokens"] > 0 for replica in replicas), "one had no request"


def test_decisions_are_in_force_and_exported(serving, sent, fake):
    _, app, statuses = serving
    sent.append(asyncio.run(load(app, requests=8)))
    replicas = statuses.until(
        lambda found: len(found) == GPUS and all(r["windows"] > 3 for r in found), 60, "windows"
    )
    wait_until(lambda: locks(fake) == [(1200, 1200)] * 2, 30, "the clocks")
    expected = {
        frozenset(
            (
                'application="llm"',
                f'deployment="{DEPLOYMENT}"',
                f'replica="{r["replica"]}"',
                f'gpu_uuid="{r["gpu_uuid"]}"',
            )
        )
        for r in replicas
    }
    for name, value in [
        ("ray_agft_locked_sm_clock_mhz", 1200),
        ("ray_agft_sm_clock_mhz", 1200),
        ("ray_agft_tuner_tuning", 1),
    ]:
        found = wait_until(
            lambda name=name, value=value: by_replica(exported(app, name), value), 60, name
        )
        assert found == expected
    # Once, or three times if load came first while nothing was known of it.
    statuses.until(
        lambda found: changes(app) == {r["replica"]: r["clock_changes"] for r in found} != {},
        60,
        "the changes of what is locked",
    )


def changes(app):
    """The exported number of changes, by replica."""
    series = exported(app, "ray_agft_clock_changes_total")
    return {re.search(r'replica="([^"]*)"', labels)[1]: count for labels, count in series.items()}


def by_replica(series, value):
    """Our labels of the series that have the value; nothing unless both replicas' have."""
    ours = re.compile(r'((?:application|deployment|replica|gpu_uuid)="[^"]*")')
    found = {frozenset(ours.findall(labels)) for labels, each in series.items() if each == value}
    return found if len(found) == GPUS else None


def test_rays_metrics_of_each_replica_reach_its_tuner(serving, sent):
    _, app, statuses = serving
    until_rays_metrics(app, statuses, replicas=GPUS)
    sent.clear()  # nobody has counted these


def long_windows(replicas):
    """Each replica's last window; nothing unless they are long, and all there."""
    windows = [r.get("last_window") or {"start_s": 0.0, "end_s": 0.0} for r in replicas]
    are_long = all(w["end_s"] - w["start_s"] > 9.0 for w in windows)
    return windows if are_long and len(windows) == GPUS else []


def load_in_a_window(app, statuses):
    """The usage of a load that begins as windows do, and the windows it lies in; none if it does
    not lie within one of each replica."""
    old = long_windows(statuses.until(long_windows, 60, "long windows"))
    newest = max(w["end_s"] for w in old)
    statuses.until(
        lambda found: long_windows(found) and all(w["end_s"] > newest for w in long_windows(found)),
        60,
        "new ones",
    )
    begin_s = time.monotonic()
    usage = asyncio.run(load(app, requests=8))
    end_s = time.monotonic()
    replicas = statuses.until(
        lambda found: long_windows(found) and all(w["end_s"] > end_s for w in long_windows(found)),
        60,
        "their end",
    )
    windows = long_windows(replicas)
    return usage, windows if max(w["start_s"] for w in windows) < begin_s else []


def settled(app, statuses):
    """vLLM's counters once it and the tuners agree, twice: both are late by a second or two."""

    def agreed():
        counted = vllm_counted(app)
        return counted if tokens(statuses.replicas) == counted else None

    while True:
        counted = wait_until(agreed, 60, "agreement")
        time.sleep(3.0)
        if agreed() == counted:
            return counted


def test_a_windows_tokens_are_those_that_vllm_counts_meanwhile(serving):
    """Windows long enough for a load to lie within one of each replica."""
    content, app, statuses = serving
    app.deploy(with_tuner(content, window_s=10.0, idle_windows=1000))
    for _ in range(5):
        before = settled(app, statuses)
        usage, windows = load_in_a_window(app, statuses)
        after = settled(app, statuses)
        if windows:
            break
    assert windows, "no load has ever lain within a window"
    counted = total([(w["prompt_tokens"], w["generation_tokens"]) for w in windows])
    assert counted == usage
    assert counted == tuple(map(operator.sub, after, before))
    assert sum(w["first_tokens"] for w in windows) == 8
    assert all(w["energy_j"] > 0 for w in windows)


def test_a_cancelled_request_does_not_leave_the_engine_busy(serving):
    _, app, statuses = serving

    async def give_up_once_it_is_seen():
        async with client(app) as api:
            chunks = await api.completions.create(
                model=MODEL,
                prompt="Hello",
                max_tokens=900,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in chunks:
                if sum(r["running"] for r in statuses.replicas) == 1:
                    await chunks.close()
                    return True
        return False

    statuses.until(lambda found: all(r["running"] == 0 for r in found), 60, "idle engines before")
    # Reports come every second, so that a quick engine may be done before it is seen to run.
    assert any(asyncio.run(give_up_once_it_is_seen()) for _ in range(5)), "never seen to run"
    statuses.until(lambda found: all(r["running"] == 0 for r in found), 20, "idle engines")


def test_settings_reach_live_replicas(serving, fake):
    content, app, statuses = serving
    before = pids(statuses.until(lambda found: len(found) == GPUS, 60, "both replicas"))
    app.deploy(with_tuner(content, policy={"name": "fixed", "sm_clock_mhz": 900}))
    wait_until(lambda: locks(fake) == [(900, 900)] * 2, 60, "the new clock")
    statuses.until(lambda found: pids(found) == before, 60, "the same replicas")


def test_a_mistake_in_live_settings_costs_no_replica(serving, fake):
    content, app, statuses = serving
    app.deploy(with_tuner(content, policy={"name": "fixed", "sm_clock_mhz": 900}))
    wait_until(lambda: locks(fake) == [(900, 900)] * 2, 60, "settings that are right")
    before = pids(statuses.until(lambda found: len(found) == GPUS, 60, "both replicas"))
    app.deploy(with_tuner(content, window_s=-1.0))
    replicas = statuses.until(
        lambda found: len(found) == GPUS and all("window_s" in r["config_error"] for r in found),
        60,
        "the mistake named",
    )
    assert pids(replicas) == before
    assert locks(fake) == [(900, 900)] * 2


def test_a_killed_replica_is_replaced_with_its_tuner(serving, fake):
    content, app, statuses = serving
    app.deploy(with_tuner(content))
    wait_until(lambda: locks(fake) == [(1200, 1200)] * 2, 60, "settings that are right")
    victim, other = statuses.until(lambda found: len(found) == GPUS, 60, "both replicas")
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
