"""The load test on a FAKE NVML, against a server that only sleeps."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import web

from agft_ray.calibration.load_table import read_load_table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "fake_nvml"))
from fake_nvml import FakeNvml, build, power_w  # noqa: E402

EXAMPLE = ROOT / "examples" / "load_test.py"


async def answer(http):
    body = await http.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    for _ in range(3):
        await asyncio.sleep(0.02)
        text = {"choices": [{"index": 0, "text": "tok"}]}
        await response.write(f"data: {json.dumps(text)}\n\n".encode())
    usage = {"prompt_tokens": 12, "completion_tokens": body["max_tokens"]}
    await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(http):
    return web.json_response({"data": [{"id": "mine"}]})


@pytest.fixture
def url():
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []

    async def serve():
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def run():
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def run(tmp_path, url):
    fake = FakeNvml(tmp_path / "node.nvml", gpus=2)
    library = build(tmp_path)

    def run(*options):
        log = f"sh -c 'echo {{clock}} >> {tmp_path}/locks'"
        command = [sys.executable, str(EXAMPLE), "--url", url, "--lock", log, "--seconds", "3"]
        command += ["--reset", f"touch {tmp_path}/reset", "--idle", "0.5", "--settle", "0.1"]
        command += ["--gpus", "0,1", "--prompt-tokens", "10", "--output-tokens", "3"]
        return subprocess.run(
            [*command, *options, "--out", str(tmp_path / "loads.csv")],
            env={**os.environ, **fake.env(library)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_a_table_that_calibrate_reads(run, tmp_path):
    done = run("--clocks", "1500,1200", "--rates", "8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "locks").read_text().split() == ["1500", "1200"]
    assert (tmp_path / "reset").exists()
    table = read_load_table(tmp_path / "loads.csv")
    assert table.unused_columns == ()
    loads = [(row.load.sm_clock_mhz, row.load.rate_per_s) for row in table.rows]
    assert loads == [(1500, 0.0), (1500, 8.0), (1200, 0.0), (1200, 8.0)]
    for row in table.rows:
        assert row.measured["power_w"] == pytest.approx(2 * power_w(1980), rel=0.2)
        if row.load.rate_per_s:
            # As the server has counted them.
            assert (row.load.prompt_tokens, row.load.output_tokens) == (12, 3)
            assert 0.02 <= row.measured["ttft_p50_s"] < 0.2
            assert 0.015 <= row.measured["tpot_mean_s"] < 0.1


def test_clocks_are_reset_where_it_fails(run, tmp_path):
    done = run("--clocks", "1500", "--rates", "8", "--url", "http://127.0.0.1:9")
    assert done.returncode != 0
    assert (tmp_path / "reset").exists()
