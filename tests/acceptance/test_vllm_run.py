"""The virtual engine on the RTX PRO 6000's profile against a real run of vLLM 0.19 on that GPU.

300 ShareGPT requests at 10 per second: github.com/casys-kaist/LLMServingSim, commit 5daddb2. The
profile's times are fitted to kernel tables; its host_ms alone was picked (among 0, 1, 2, 3) on this
run, nothing else was tuned to it.
"""

import functools
import json
import statistics

import numpy as np
import pytest

from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine
from agft_ray.simulation.engine_config import EngineConfig
from agft_ray.simulation.physics import prefill_attention_s
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.virtual_engine import VirtualEngine
from agft_ray.workloads.requests import Request

RUN = "calibration/rtxpro6000_llama31_8b_vllm_run/requests.jsonl"


@pytest.fixture(scope="module")
def real(data_file):
    return [json.loads(line) for line in data_file(RUN).read_text().splitlines()]


@pytest.fixture(scope="module")
def simulated(real):
    """Timings by request id."""
    gpu = load_gpu_profile("rtx_pro_6000")
    model = gpu.model_profile("llama-3.1-8b")
    # The run's own settings; 131072 is what max_model_len null means for this model.
    config = EngineConfig(max_num_seqs=128, max_num_batched_tokens=2048, max_model_len=131072)
    core = BatchingEngine(config.for_model(model), functools.partial(prefill_attention_s, model))
    timings = {}
    engine = VirtualEngine(core, Device(gpu, model), lambda t: timings.update({t.request_id: t}))
    start_s = min(row["queued_ts"] for row in real)
    engine.submit(
        Request(
            row["request_id"], row["queued_ts"] - start_s, row["input_toks"], row["output_toks"]
        )
        for row in real
    )
    engine.run_until(1000.0)
    assert engine.drained
    return timings


def real_tpot_s(row):
    return (row["last_token_ts"] - row["first_token_ts"]) / (row["output_toks"] - 1)


def test_tpot_of_each_request(real, simulated, reached):
    errors = [
        abs(simulated[row["request_id"]].tpot_s / real_tpot_s(row) - 1)
        for row in real
        if row["output_toks"] > 1
    ]
    mape = reached("real vLLM run: TPOT per request, MAPE", statistics.mean(errors), 0.05)
    assert mape <= 0.05


@pytest.mark.parametrize("percent", [50, 90])
def test_ttft(real, simulated, reached, percent):
    # `arrival_time` in the file is on another clock than the rest.
    real_s = np.percentile([row["first_token_ts"] - row["queued_ts"] for row in real], percent)
    simulated_s = np.percentile([t.ttft_s for t in simulated.values()], percent)
    what = f"real vLLM run: TTFT p{percent}, {simulated_s:.2f} s against {real_s:.2f} s"
    assert abs(reached(what, simulated_s / real_s - 1, 0.10)) <= 0.10


def test_wall_time(real, simulated, reached):
    real_s = max(r["last_token_ts"] for r in real) - min(r["queued_ts"] for r in real)
    simulated_s = max(t.arrival_s + t.e2e_s for t in simulated.values())
    what = f"real vLLM run: duration, {simulated_s:.1f} s against {real_s:.1f} s"
    assert abs(reached(what, simulated_s / real_s - 1, 0.05)) <= 0.05
