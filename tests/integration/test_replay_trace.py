"""Five simulated minutes of the Azure 2023 conversation trace through real Ray Serve."""

import asyncio
import csv
import json
import math

import pytest
from serve_app import gpu_states, running_app, simulated_config

from agft_ray.replay.client import replay
from agft_ray.replay.summary import summarise
from agft_ray.workloads import generators as workloads
from agft_ray.workloads.traces import open_trace

pytestmark = pytest.mark.ray
DURATION_S = 300.0
SPEED = 8


def power_w(sm_clock_mhz, prefill_tokens, decode_sequences, *, busy):
    """The RTX A6000's power by the published fit, written out once more as a check on the code."""
    v = 1 + 0.335 * max(0.0, (sm_clock_mhz - 1303) / (1800 - 1303))
    f = sm_clock_mhz / 1800
    activity = 1.0 if prefill_tokens else 0.70 + 0.30 * (1 - math.exp(-decode_sequences / 80))
    return 45 + 26 * v * v * f + busy * activity * (36.7 + 143.7 * v * v * f)


def integral_j(history_path, until_s):
    with history_path.open(newline="") as file:
        total_j = 0.0
        for row in csv.DictReader(file):
            start_s, end_s = float(row["t0_s"]), min(float(row["t1_s"]), until_s)
            prefill, decode = int(row["prefill_tokens"]), int(row["decode_sequences"])
            watts = power_w(int(row["sm_clock_mhz"]), prefill, decode, busy=bool(prefill or decode))
            total_j += watts * max(0.0, end_s - start_s)
    return total_j


def test_no_request_is_lost_and_all_accounts_agree(directory, conversation_trace):
    requests = list(
        workloads.until(workloads.thin(open_trace(conversation_trace), 0.1, 0), DURATION_S)
    )
    content = simulated_config(directory, args={"speed": SPEED})
    with running_app(directory, content) as app:
        result = asyncio.run(replay(requests, url=app.url, duration_s=DURATION_S))
        result.write(directory / "out", summary=summarise(result).to_json())
        final = {replica.replica: replica for replica in result.timeline[-1].replicas}

    assert len(requests) > 100
    assert [row.status for row in result.rows] == ["ok"] * len(requests)
    asked = {request.request_id: request.output_tokens for request in requests}
    assert {row.request_id: row.output_tokens for row in result.rows} == asked
    engines = sum(replica.generation_tokens for replica in final.values())
    assert engines == sum(asked.values())
    assert sum(replica.requests for replica in final.values()) == len(requests)

    for state in gpu_states(directory):
        path = directory / "gpus" / f"gpu-{state['uuid'].rpartition('-')[2]}.history.csv"
        expected_j = integral_j(path, state["counter_t_s"])
        assert state["counter_energy_j"] == pytest.approx(expected_j, rel=0.005)

    (tuned, holdout) = summarise(result).groups
    assert (tuned.role, holdout.role) == ("tuned", "holdout")
    assert tuned.requests + holdout.requests == len(requests)
    # Per replica, since at this light load energy per token hangs on how requests were routed.
    assert tuned.mean_power_w < 0.9 * holdout.mean_power_w
    summary = json.loads((directory / "out" / "summary.json").read_text())
    assert summary["requests"] == len(requests)
