"""The replay client against a small server in the same process."""

import asyncio
import csv
import itertools
import json
import os
import signal
import socket
import struct
import sys

import pytest
from aiohttp import web

from agft_ray.errors import AgftError, ConfigError
from agft_ray.replay.client import replay
from agft_ray.replay.endpoint import Exchange
from agft_ray.replay.result import (
    ReplayResult,
    RequestRow,
    ServerStatus,
    bottlenecks,
    is_valid,
)
from agft_ray.replay.summary import summarise
from agft_ray.workloads.requests import Request

DELAY_S = 0.05


def requests(*arrivals_s, prompt_tokens=5, output_tokens=4):
    return [
        Request(f"r{i}", arrival_s, prompt_tokens, output_tokens)
        for i, arrival_s in enumerate(arrivals_s)
    ]


def chunk(text):
    return {"choices": [{"index": 0, "text": text}]}


def usage(prompt_tokens, completion_tokens):
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}


def closing(body, **agft):
    counts = usage(len(body["prompt"].split()), body["max_tokens"])
    extra = {"agft": agft} if agft else {}
    return {"choices": [], "usage": counts, **extra}


async def stream(http, events, *, delay_s=0.0, done=True):
    """Answer with server-sent events, `delay_s` before each."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    for event in events:
        await asyncio.sleep(delay_s)
        data = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {data}\n\n".encode())
    if done:
        await response.write(b"data: [DONE]\n\n")
    return response


async def answer(http):
    return await stream(http, [chunk("tok tok"), closing(await http.json())])


def replica(**changes):
    counters = {"prompt_tokens": 0, "generation_tokens": 0, "requests": 0, "windows": 0}
    times = {"t_s": 0.0, "energy_j": 0.0, "energy_t_s": 0.0, "sm_clock_mhz": 1410}
    gauges = {"replica": "a", "role": "tuned", "running": 0, "waiting": 0}
    return {**counters, **times, **gauges, "locked_sm_clock_mhz": None, **changes}


def status_body(now_s=0.0, speed=1.0, **changes):
    return {"speed": speed, "now_s": now_s, "replicas": [replica(**changes)], "more": "fields"}


def played(workload, completions=answer, *, status=None, models=None, **settings):
    """The result of a replay against a server with these handlers."""

    async def go():
        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        if status:
            app.router.add_get("/agft/status", status)
        if models:
            app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            return await replay(workload, url=url, **settings)
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# -- measuring -------------------------------------------------------------------------------------


def test_what_is_sent():
    bodies = []

    async def completions(http):
        bodies.append(await http.json())
        return await answer(http)

    played(requests(0, prompt_tokens=3, output_tokens=7), completions, model="m")
    assert bodies == [
        {
            "model": "m",
            "prompt": "tok tok tok",
            "max_tokens": 7,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_latencies_and_tokens_without_extras_of_ours():
    async def completions(http):
        events = [chunk(""), chunk("a"), chunk("b c"), closing(await http.json())]
        return await stream(http, events, delay_s=DELAY_S)

    result = played(requests(0, output_tokens=3), completions, model="m")
    (row,) = result.rows
    assert (row.status, row.prompt_tokens, row.output_tokens, row.retries) == ("ok", 5, 3, 0)
    # the first chunk has no text; text after 2 and 3 delays, the end after 4
    assert 2 * DELAY_S <= row.ttft_s < row.e2e_s
    assert row.e2e_s >= 4 * DELAY_S
    assert 0 < row.tpot_s < (row.e2e_s - row.ttft_s) / 2
    assert 0 <= row.dispatch_lateness_wall_s <= result.wall_s - row.e2e_s
    assert (row.replica, row.role, row.engine_ttft_s, row.engine_e2e_s) == (None,) * 4
    assert result.timeline == ()
    assert (result.speed, result.started_s, result.interrupted) == (1.0, 0.0, False)
    assert result.ended_s == result.wall_s >= 4 * DELAY_S


def test_engine_side_values_are_taken_as_stated():
    stated = {"replica": "x", "role": "holdout", "ttft_s": 0.25, "tpot_s": None, "e2e_s": 1.5}

    async def completions(http):
        return await stream(http, [chunk("a"), closing(await http.json(), **stated)])

    (row,) = played(requests(0), completions, model="m").rows
    assert (row.replica, row.role) == ("x", "holdout")
    assert (row.engine_ttft_s, row.engine_tpot_s, row.engine_e2e_s) == (0.25, None, 1.5)


def test_wall_to_simulated_time_is_exact():
    exchange = Exchange(Request("r", 8.0, 1, 5), speed=4.0, due_wall_s=2.0, sent_wall_s=2.5)
    lines = (
        (b"data: " + json.dumps(chunk("a")).encode(), 3.0),
        (b": a comment\n", 3.1),
        (b"\n", 3.2),
        (b"data:" + json.dumps(chunk("b c d")).encode() + b"\r\n", 5.0),
        (b"data: " + json.dumps({"choices": [], "usage": usage(1, 5)}).encode(), 5.25),
        (b"data: [DONE]\n", 5.5),
    )
    for line, wall_s in lines:
        exchange.feed(line, wall_s)
    row = exchange.row()
    assert row == RequestRow("r", 8.0, 0.5, "ok", 0, 1, 5, ttft_s=2.0, tpot_s=2.0, e2e_s=12.0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tpot_without_a_second_token(tokens):
    exchange = Exchange(Request("r", 0.0, 1, 1), speed=1.0, due_wall_s=0.0, sent_wall_s=0.0)
    exchange.feed(b"data: " + json.dumps(chunk("a") | {"usage": usage(1, tokens)}).encode(), 1.0)
    assert exchange.row().tpot_s is None


def test_speed_of_the_server_sets_the_pace():
    async def status(http):
        return web.json_response(status_body(now_s=100.0, speed=200.0))

    async def completions(http):
        return await stream(http, [chunk("a"), closing(await http.json())], delay_s=DELAY_S)

    result = played(requests(0, 20.0), completions, status=status, model="m", poll_s=0.02)
    assert result.speed == 200.0
    assert result.started_s == 100.0
    assert result.ended_s == 100.0 + 200.0 * result.wall_s
    assert 0.1 + 2 * DELAY_S <= result.wall_s < 20.0, "the second is due after 20 s / 200"
    assert all(row.e2e_s >= 200.0 * 2 * DELAY_S for row in result.rows)


def test_a_given_speed_and_model_win():
    async def status(http):
        return web.json_response(status_body(speed=20.0))

    result = played(requests(0), status=status, speed=3.0, model="m", poll_s=0.02)
    assert result.speed == 3.0


def test_the_model_is_asked_for():
    seen = []

    async def models(http):
        return web.json_response({"object": "list", "data": [{"id": "llama"}, {"id": "other"}]})

    async def completions(http):
        seen.append((await http.json())["model"])
        return await answer(http)

    played(requests(0), completions, models=models)
    assert seen == ["llama"]


# -- open loop -------------------------------------------------------------------------------------


def test_hundreds_at_once_and_none_waits_for_another():
    count = 150  # above aiohttp's default limit of connections
    arrived = 0
    everybody = asyncio.Event()

    async def completions(http):
        nonlocal arrived
        arrived += 1
        if arrived == count:
            everybody.set()
        await everybody.wait()
        return await answer(http)

    result = played(requests(*[0.0] * count), completions, model="m", timeout_s=60.0)
    assert [row.status for row in result.rows] == ["ok"] * count


def test_sent_when_due_though_the_first_is_slow():
    fast_is_answered = asyncio.Event()

    async def completions(http):
        if (await http.json())["max_tokens"] == 2:
            await fast_is_answered.wait()
            return await answer(http)
        response = await answer(http)
        fast_is_answered.set()
        return response

    slow, fast = Request("slow", 0.0, 1, 2), Request("fast", 0.1, 1, 1)
    result = played([slow, fast], completions, model="m", timeout_s=20.0)
    rows = {row.request_id: row for row in result.rows}
    assert [row.status for row in result.rows] == ["ok", "ok"]
    assert rows["slow"].e2e_s >= 0.1 - rows["slow"].dispatch_lateness_wall_s, "fast before its due"
    assert rows["fast"].dispatch_lateness_wall_s >= 0


def test_an_endless_workload_is_read_lazily_and_ends_with_the_duration():
    pulled = []

    def endless():
        for index in itertools.count():
            pulled.append(index)
            yield Request(f"r{index}", 0.02 * index, 1, 1)

    result = played(endless(), model="m", duration_s=0.05)
    assert [row.request_id for row in result.rows] == ["r0", "r1", "r2"]
    assert len(pulled) == 4


def test_rows_are_in_order_of_arrival():
    async def completions(http):
        if (await http.json())["max_tokens"] == 2:
            await asyncio.sleep(0.1)
        return await answer(http)

    workload = [Request("slow", 0.0, 1, 2), Request("fast", 0.01, 1, 1)]
    result = played(workload, completions, model="m")
    assert [row.request_id for row in result.rows] == ["slow", "fast"]


# -- failures --------------------------------------------------------------------------------------


def failing(http_answer, timeout_s=20.0):
    """The only row of a replay whose server answers so."""
    (row,) = played(requests(0), http_answer, model="m", timeout_s=timeout_s).rows
    assert row.is_failed
    return row


@pytest.mark.parametrize(
    ("code", "body", "status"),
    [
        (500, "Internal\n error", "HTTP 500: Internal error"),
        (404, json.dumps({"error": {"message": "no such model", "code": 1}}), "no such model"),
        (422, json.dumps({"detail": "bad"}), "HTTP 422: bad"),
        (400, json.dumps(["odd"]), "HTTP 400: ['odd']"),
        (503, "x" * 1000, "HTTP 503: " + "x" * 200),
    ],
)
def test_http_errors(code, body, status):
    async def completions(http):
        return web.Response(status=code, text=body)

    row = failing(completions)
    assert row.status == (status if status.startswith("HTTP") else f"HTTP {code}: {status}")
    assert (row.ttft_s, row.e2e_s, row.output_tokens) == (None, None, None)


@pytest.mark.parametrize(
    ("event", "named"),
    [
        ("{garbage", "'{garbage'"),
        ("5", "'5'"),
        ({"error": {"message": "out of memory"}}, "out of memory"),
    ],
)
def test_bad_events(event, named):
    async def completions(http):
        return await stream(http, [chunk("a"), event])

    row = failing(completions)
    assert row.status.endswith(f": {named}")
    assert row.ttft_s is not None
    assert row.e2e_s is None


def test_a_stream_without_its_end():
    async def completions(http):
        return await stream(http, [chunk("a")], done=False)

    row = failing(completions)
    assert "[DONE]" in row.status
    assert row.e2e_s is None


def test_timeout():
    async def completions(http):
        await asyncio.sleep(30)

    assert failing(completions, timeout_s=0.2).status == "timeout after 0.2 s"


def test_a_dead_server_is_a_row_each_if_nothing_had_to_be_asked():
    url = f"http://127.0.0.1:{free_port()}"
    result = asyncio.run(replay(requests(0, 0.01), url=url, model="m", speed=1.0))
    assert [row.status.split(":")[0] for row in result.rows] == ["ClientConnectorError"] * 2
    assert [row.retries for row in result.rows] == [0, 0]
    with pytest.raises(AgftError, match=f"{url} "):
        asyncio.run(replay(requests(0), url=url, model="m"))


@pytest.mark.parametrize(("failures", "status", "retries"), [(1, "ok", 1), (2, "Server", 1)])
def test_a_connection_reset_before_the_answer_is_retried_once(failures, status, retries):
    attempts = 0

    async def completions(http):
        nonlocal attempts
        attempts += 1
        if attempts <= failures:
            http.transport.close()
            await asyncio.sleep(0.05)
        return await answer(http)

    (row,) = played(requests(0), completions, model="m").rows
    assert row.status.startswith(status)
    assert (row.retries, attempts) == (retries, 2)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_lost_within_the_answer_is_not_retried(reset):
    attempts = 0

    async def completions(http):
        nonlocal attempts
        attempts += 1
        response = web.StreamResponse()
        await response.prepare(http)
        await response.write(b"data: " + json.dumps(chunk("a")).encode() + b"\n\n")
        await asyncio.sleep(0.05)
        if reset:  # an immediate RST in place of an orderly end
            linger = struct.pack("ii", 1, 0)
            link = http.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        http.transport.abort()
        return response

    row = failing(completions)
    assert (row.retries, attempts) == (0, 1)
    assert row.status.startswith("Client")


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"speed": 0.0}, "speed"), ({"timeout_s": float("nan")}, "timeout_s"), ({"poll_s": -1}, "po")],
)
def test_invalid_parameters(settings, name):
    with pytest.raises(ConfigError, match=f"{name}.* 0"):
        asyncio.run(replay([], url="http://127.0.0.1:1", **settings))


def test_no_aiohttp(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(AgftError, match=r"pip install 'agft-ray\[serve\]'"):
        asyncio.run(replay([], url="http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"speed": 0, "now_s": 0, "replicas": []}, 200, r"/agft/status: speed: .*\b0\b"),
        ({"speed": 1, "now_s": 0}, 200, "/agft/status: replicas: "),
        ({"error": {"message": "not yet"}}, 503, "/agft/status: HTTP 503: not yet"),
    ],
)
def test_a_status_that_cannot_be_used_is_said_before_anything_is_sent(body, code, message):
    async def status(http):
        return web.json_response(body, status=code)

    with pytest.raises(AgftError, match=message):
        played(requests(0), status=status, model="m")


def test_no_model_to_be_found():
    with pytest.raises(AgftError, match="pass its name"):
        played(requests(0))


# -- the time line ---------------------------------------------------------------------------------


class Draining:
    """A server whose requests end at once, and which is at rest only after so many polls more.

    The poll under way when the replay begins to settle is lost, so polls count from the answer on.
    """

    def __init__(self, polls_to_rest, failing_poll=None):
        self.polls_to_rest, self.failing_poll = polls_to_rest, failing_poll
        self.is_answered, self.polls = False, 0

    async def completions(self, http):
        response = await answer(http)
        self.is_answered = True
        return response

    async def status(self, http):
        self.polls += self.is_answered
        tokens = min(self.polls, self.polls_to_rest + 2)
        running = int(self.polls < self.polls_to_rest)
        body = status_body(generation_tokens=tokens, running=running, t_s=float(self.polls))
        failed = self.is_answered and self.polls == self.failing_poll
        return web.json_response(body, status=500 if failed else 200)

    def played(self):
        return played(
            requests(0), self.completions, status=self.status, model="m", poll_s=0.01, timeout_s=20
        )


def test_polls_until_the_server_is_at_rest():
    result = Draining(polls_to_rest=10).played()
    assert result.settled
    assert result.missed_polls == 0
    times_s = [s.replicas[0].t_s for s in result.timeline]
    assert times_s[-9:] == [float(n) for n in range(5, 14)], "at rest at 10, two agree at 13"
    assert result.timeline[-1].generation_tokens == {"a": 12}


def test_failed_polls_are_counted_and_the_replay_goes_on():
    result = Draining(polls_to_rest=10, failing_poll=8).played()
    assert result.missed_polls == 1
    assert 8.0 not in [s.replicas[0].t_s for s in result.timeline]
    assert result.rows[0].status == "ok"
    assert result.settled


def test_replicas_that_have_not_reported_are_left_out():
    silent = {"replica": "b", "role": "tuned", "t_s": 0.0, "energy_j": 0.0}
    body = status_body()
    body["replicas"].append(silent)
    status = ServerStatus.model_validate(body)
    assert [r.replica for r in status.replicas] == ["a"]


def test_progress():
    seen = []

    async def completions(http):
        while not (seen and seen[-1].sent):
            await asyncio.sleep(0.01)
        return await answer(http)

    played(requests(0), completions, model="m", poll_s=0.02, on_progress=seen.append)
    assert (1, 0) in [(p.sent, p.done) for p in seen]
    assert (seen[-1].sent, seen[-1].done, seen[-1].failed, seen[-1].status) == (1, 1, 0, None)
    assert [p.elapsed_s for p in seen] == sorted(p.elapsed_s for p in seen)


def test_ctrl_c_returns_what_there_is():
    seen = []

    async def completions(http):
        if (await http.json())["max_tokens"] > 1:
            while not (seen and seen[-1].done):
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        return await answer(http)

    workload = [Request("a", 0.0, 1, 1), Request("b", 0.1, 1, 2), Request("c", 99.0, 1, 1)]
    result = played(workload, completions, model="m", poll_s=0.01, on_progress=seen.append)
    assert result.interrupted
    assert [(row.request_id, row.status) for row in result.rows] == [
        ("a", "ok"),
        ("b", "interrupted"),
    ]
    assert not result.rows[1].is_failed
    assert result.wall_s < 30


def test_a_workload_that_breaks_off_raises_its_own_error():
    def broken():
        yield Request("a", 0.0, 1, 1)
        raise AgftError("line 2: not a number")

    with pytest.raises(AgftError, match="line 2"):
        played(broken(), model="m")


# -- files and bottlenecks -------------------------------------------------------------------------


def result_of(rows=(), timeline=(), speed=1.0):
    statuses = tuple(ServerStatus.model_validate(status) for status in timeline)
    return ReplayResult(tuple(rows), statuses, 0.0, 10.0, 10.0 / speed, speed)


def row(i=0, *, lateness_s=0.0, **values):
    return RequestRow(f"r{i}", float(i), lateness_s, "ok", 0, **values)


def test_files(tmp_path):
    rows = [row(0, ttft_s=0.5, output_tokens=3), row(1, replica="a,b")]
    timeline = [status_body(now_s=1.0), status_body(now_s=2.0, energy_j=5.0, energy_t_s=1.0)]
    result = result_of(rows, timeline)
    for _ in range(2):  # the second time they are replaced
        result.write(tmp_path / "deep" / "run", summary=summarise(result).to_json())
    folder = tmp_path / "deep" / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "requests.csv",
        "summary.json",
        "timeline.csv",
    ]
    with (folder / "requests.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [r["request_id"] for r in read] == ["r0", "r1"]
    assert (read[0]["ttft_s"], read[0]["e2e_s"], read[1]["replica"]) == ("0.5", "", "a,b")
    with (folder / "timeline.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [(r["now_s"], r["replica"], r["energy_j"]) for r in read] == [
        ("1.0", "a", "0.0"),
        ("2.0", "a", "5.0"),
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["format"] == 2
    assert summary["groups"][0]["energy_j"] == 5.0


def test_a_file_that_cannot_be_completed_leaves_the_old_one(tmp_path):
    result = result_of([row(0)])
    result.write(tmp_path, summary=summarise(result).to_json())
    before = (tmp_path / "summary.json").read_bytes()
    broken = ReplayResult((row(0, ttft_s=float("nan")),), (), 0.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.write(tmp_path, summary=summarise(broken).to_json())
    assert (tmp_path / "summary.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_no_bottleneck_in_a_healthy_run():
    rows = [row(i, ttft_s=0.25, engine_ttft_s=0.2, lateness_s=0.002) for i in range(100)]
    timeline = [status_body(), status_body(steps=100, late_steps=5)]
    assert bottlenecks(result_of(rows, timeline)) == []
    assert bottlenecks(result_of()) == []


def test_a_slow_path_is_named_with_its_numbers():
    rows = [row(i, ttft_s=1.2, engine_ttft_s=0.2) for i in range(5)] + [row(9)]
    (sentence,) = bottlenecks(result_of(rows, speed=20.0))
    assert "1000 ms (simulated; 50 ms wall)" in sentence
    assert "TTFT of 200 ms" in sentence
    (sentence,) = bottlenecks(result_of([row(0, ttft_s=1.15, engine_ttft_s=1.0)]))
    assert "150 ms (simulated; 150 ms wall)" in sentence


def test_late_dispatch_is_named():
    rows = [row(i, lateness_s=0.03 if i > 97 else 0.0) for i in range(100)]
    (sentence,) = bottlenecks(result_of(rows, speed=10.0))
    assert "p99 30 ms wall (300 ms simulated)" in sentence
    assert bottlenecks(result_of(rows[:98])) == []


def test_late_steps_count_from_the_start_of_the_run():
    first = status_body(steps=1000, late_steps=900)
    last = status_body(steps=1100, late_steps=910, max_lateness_s=0.5)
    (sentence,) = bottlenecks(result_of((), [first, last], speed=4.0))
    assert all(number in sentence for number in ("10.0%", "10 of 100", "500 ms"))


@pytest.mark.parametrize(("late", "valid"), [(10, True), (11, False)])
def test_a_run_of_late_steps_is_not_valid(late, valid):
    first, last = (
        status_body(steps=100, late_steps=50),
        status_body(steps=200, late_steps=50 + late),
    )
    assert is_valid(result_of((), [first, last])) is valid
    assert is_valid(result_of())
