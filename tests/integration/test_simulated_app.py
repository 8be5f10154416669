"""`serve run configs/simulated.yaml` as a user has it: 2 tuned replicas, a holdout, real Ray."""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from serve_app import gpu_states, running_app, simulated_config, wait_until

pytestmark = pytest.mark.ray
MODEL = "llama-3.1-8b"


@pytest.fixture(scope="module")
def content(directory):
    return simulated_config(directory)


@pytest.fixture(scope="module")
def app(directory, content):
    with running_app(directory, content) as running:
        yield running
    locked = [state["locked_sm_clock_mhz"] for state in gpu_states(directory)]
    assert locked == [None, None, None], "serve.shutdown left clocks locked"


@pytest.fixture(scope="module")
def client(app):
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)


def post(app, path, body):
    """(status, parsed answer) of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(app.url + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# -- the OpenAI API --------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_whole(client):
    messages = [{"role": "user", "content": "three words here"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices[0].message.content.split()) == 7
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 7, 14)


def test_chat_streamed_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(text.split()) == 40
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 3, "nothing was streamed"


def test_completions_both_ways(client):
    whole = client.completions.create(model=MODEL, prompt="a b c", max_tokens=5)
    assert whole.usage.prompt_tokens == 3
    assert whole.usage.completion_tokens <= 5
    chunks = list(client.completions.create(model=MODEL, prompt=[1, 2], max_tokens=5, stream=True))
    assert len("".join(chunk.choices[0].text for chunk in chunks).split()) <= 5


def test_answers_end_by_themselves_and_repeat_by_seed(client):
    def length(seed):
        answer = client.completions.create(model=MODEL, prompt="a", max_tokens=4000, seed=seed)
        assert answer.choices[0].finish_reason == "stop"
        return answer.usage.completion_tokens

    assert length(7) == length(7)
    assert len({length(seed) for seed in (1, 2, 3)}) > 1


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
PLAIN = {"model": MODEL, "prompt": "x"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        ("/v1/completions", PLAIN | {"max_tokens": -1}, 400, "max_tokens", "greater than"),
        ("/v1/completions", PLAIN | {"max_tokens": "10"}, 400, "max_tokens", "integer"),
        ("/v1/completions", PLAIN | {"prompt": 7}, 400, "prompt", "string"),
        ("/v1/completions", PLAIN | {"prompt": ""}, 400, "prompt", "no token"),
        ("/v1/completions", PLAIN | {"prompt": "x " * 9000}, 400, "prompt", "8192"),
        ("/v1/completions", PLAIN | {"max_tokens": 9000}, 400, "prompt", "8192"),
        ("/v1/completions", PLAIN | {"n": 3}, 400, "n", "1"),
        ("/v1/completions", PLAIN | {"temperature": 9}, 400, "temperature", "less than"),
        ("/v1/completions", PLAIN | {"model": "gpt-9"}, 404, "model", "llama-3.1-8b"),
        ("/v1/chat/completions", CHAT | {"messages": []}, 400, "messages", "at least 1"),
        ("/v1/chat/completions", {"model": MODEL}, 400, "messages", "required"),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "x"}]}, 400, "messages", "role"),
        ("/v1/chat/completions", b"{not json", 400, None, "JSON"),
        ("/v1/nonsense", PLAIN, 404, None, "Not Found"),
    ],
)
def test_refusals_have_openais_form(app, path, body, status, param, words):
    code, answer = post(app, path, body)
    assert code == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
    if param is not None:
        assert answer["error"]["param"] == param


def test_serving_goes_on_after_refusals(client):
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.total_tokens == 2


# -- the fleet -------------------------------------------------------------------------------------


def roles(app):
    return sorted(replica["role"] for replica in app.alive())


def test_every_replica_has_a_gpu_and_a_tuner_and_one_is_held_out(app):
    replicas = app.alive()
    assert roles(app) == ["holdout", "tuned", "tuned"]
    assert min(replicas, key=lambda replica: replica["rank"])["role"] == "holdout"
    assert len({replica["gpu_uuid"] for replica in replicas}) == 3
    assert len({replica["tuner_pid"] for replica in replicas}) == 3


def stream_one(client):
    """Stream an answer to its end; returns the replica that gave it."""
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="x " * 100,
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert len(text.split()) == 100, "an answer was cut short"
    return chunks[-1].agft["replica"]


def load(app, stop, failures, replicas_hit):
    """Streams requests one after the other until told to stop."""
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)
    while not stop.is_set():
        try:
            replicas_hit.append(stream_one(client))
        except Exception as error:
            failures.append((time.monotonic(), repr(error)))
            time.sleep(0.1)


@pytest.fixture
def under_load(app):
    """Twelve closed-loop clients; yields (failures, replicas that answered)."""
    stop, failures, replicas_hit = threading.Event(), [], []
    arguments = (app, stop, failures, replicas_hit)
    threads = [threading.Thread(target=load, args=arguments) for _ in range(12)]
    for thread in threads:
        thread.start()
    yield failures, replicas_hit
    stop.set()
    for thread in threads:
        thread.join()


def redeploy(app, content, **user_config):
    (application,) = content["applications"]
    application["deployments"][0]["user_config"] |= user_config
    app.deploy(content)


def fixed_at(mhz):
    return {"name": "fixed", "sm_clock_mhz": mhz}


def locked_clocks(directory):
    return sorted(state["locked_sm_clock_mhz"] or 0 for state in gpu_states(directory))


def test_settings_change_on_live_replicas(app, content, directory, under_load):
    failures, _ = under_load
    before = {replica["replica_pid"] for replica in app.alive()}
    redeploy(app, content, policy=fixed_at(1230), idle_windows=1000)
    wait_until(lambda: locked_clocks(directory) == [0, 1230, 1230], 30, "locked at 1230 MHz")
    redeploy(app, content, holdout_replicas=2)
    wait_until(lambda: roles(app) == ["holdout", "holdout", "tuned"], 30, "two holdouts")
    wait_until(lambda: locked_clocks(directory) == [0, 0, 1230], 30, "one lock less")
    redeploy(app, content, holdout_replicas=1, mode="observe")
    wait_until(lambda: locked_clocks(directory) == [0, 0, 0], 30, "observe resets")
    redeploy(app, content, mode="control")
    wait_until(lambda: locked_clocks(directory) == [0, 1230, 1230], 30, "control locks again")
    assert {replica["replica_pid"] for replica in app.alive()} == before
    assert failures == []


def test_bad_settings_cost_no_replica(app, content, directory, client):
    before = {replica["replica_pid"] for replica in app.alive()}
    good = json.loads(json.dumps(content))
    redeploy(app, content, mode="contorl", alhpa=1)
    content.update(good)

    def complaints():
        return [r["config_error"] for r in app.alive() if "contorl" in r["config_error"]]

    (complaint, *_) = wait_until(lambda: len(complaints()) == 3 and complaints(), 30, "reported")
    assert "mode:" in complaint
    assert "alhpa: unknown setting" in complaint
    assert {replica["replica_pid"] for replica in app.alive()} == before
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).usage.total_tokens == 2
    redeploy(app, content)
    wait_until(lambda: not any(r["config_error"] for r in app.alive()), 30, "good again")


def test_ray_metrics_reach_the_windows(app, under_load):
    wait_until(lambda: any(r["serve_request_rate_per_s"] for r in app.alive()), 30, "Ray's metrics")


def tuned(app):
    replicas = (r for r in app.alive() if r["role"] == "tuned" and r.get("locked_sm_clock_mhz"))
    return next(replicas, None)


def state_of(directory, replica):
    return next(s for s in gpu_states(directory) if s["uuid"] == replica["gpu_uuid"])


def test_a_killed_tuner_is_restarted_and_serving_never_notices(app, directory, under_load):
    failures, _ = under_load
    victim = wait_until(lambda: tuned(app), 30, "a locked GPU")
    calls = state_of(directory, victim)["clock_calls"]
    os.kill(victim["tuner_pid"], signal.SIGKILL)
    wait_until(lambda: state_of(directory, victim)["clock_calls"] > calls, 1.0, "the guard's reset")

    def restarted():
        now = next((r for r in app.alive() if r["replica"] == victim["replica"]), None)
        has_new_tuner = now is not None and now["tuner_pid"] != victim["tuner_pid"]
        return has_new_tuner and now.get("locked_sm_clock_mhz")  # none while it opens the GPU

    assert wait_until(restarted, 30, "a new tuner with the settings of now") == 1230
    assert failures == []


def test_a_killed_replica_resets_its_gpu_and_is_replaced(app, directory, under_load):
    failures, replicas_hit = under_load
    victim = wait_until(lambda: tuned(app), 30, "a locked GPU")
    wait_until(lambda: victim["replica"] in replicas_hit, 30, "traffic on every replica")
    killed_s = time.monotonic()
    os.kill(victim["replica_pid"], signal.SIGKILL)
    wait_until(lambda: state_of(directory, victim)["locked_sm_clock_mhz"] is None, 1.0, "the reset")

    def replaced():
        replicas = {r["replica"] for r in app.alive()}
        return len(replicas) == 3 and victim["replica"] not in replicas

    wait_until(replaced, 60, "a replacement")
    wait_until(lambda: roles(app) == ["holdout", "tuned", "tuned"], 30, "holdouts chosen again")
    wait_until(lambda: len(set(replicas_hit[-60:]) - {victim["replica"]}) == 3, 60, "traffic on it")
    # Twelve clients share three replicas; only those that the killed one was answering may fail.
    assert len(failures) < 12, f"more than the killed replica's own requests failed: {failures}"
    assert all(failed_s - killed_s < 10 for failed_s, _ in failures), failures
    wait_until(lambda: locked_clocks(directory) == [0, 1230, 1230], 30, "its GPU is tuned again")


def test_a_killed_guard_is_replaced(app, directory, under_load):
    victim = wait_until(lambda: tuned(app), 30, "a locked GPU")
    os.kill(victim["guard_pid"], signal.SIGTERM)

    def replaced():
        now = next((r for r in app.alive() if r["replica"] == victim["replica"]), None)
        return now and now["guard_pid"] != victim["guard_pid"] and now["locked_sm_clock_mhz"]

    assert wait_until(replaced, 30, "a new guard, and the clock set again") == 1230


def test_replay_from_the_command_line(app, tmp_path, capsys):
    from agft_ray.cli.app import main

    arguments = ["--url", app.url, "--rate", "2", "--duration", "20", "--out", str(tmp_path)]
    assert main(["replay", *arguments]) == 0
    assert "energy per output token" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"] == 0
    assert summary["requests"] == len((tmp_path / "requests.csv").read_text().splitlines()) - 1


def test_deleting_the_application_resets_every_clock(app, directory, under_load):
    wait_until(lambda: locked_clocks(directory) == [0, 1230, 1230], 30, "locked")
    app.deploy({"applications": []})
    wait_until(lambda: locked_clocks(directory) == [0, 0, 0], 15, "reset")
