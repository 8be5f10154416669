"""Real vLLM with direct streaming: its own server answers, and nothing of Ray's LLM server."""

import asyncio

import pytest
import yaml
from serve_app import wait_until
from vllm_app import TUNER, Statuses, load, shipped, tokens, until_rays_metrics

from agft_ray.serve.run import serve_run

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

GPUS = 2
PAIR = {
    "name": "pair",
    "prefill_sm_clock_mhz": 1500,
    "decode_sm_clock_mhz": 1200,
    "idle_sm_clock_mhz": 900,
}


def test_direct_streaming_is_tuned_as_well(directory, tiny_model, fake):
    """A CPU replica owns no GPU here, so the settings name the one to control. Its clocks follow
    what vLLM does."""
    uuid = fake.gpu(1).uuid
    energy = {"gpu": {"kind": "nvml", "uuids": [uuid]}, "tuner": TUNER | {"policy": PAIR}}
    content = shipped(tiny_model, replicas=1, energy=energy)
    del content["applications"][0]["args"]["ingress_deployment_config"]
    path = directory / "direct.yaml"
    path.write_text(yaml.safe_dump(content))
    direct = {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
    with serve_run(path, None, directory / "direct.log", environment=direct) as app:
        statuses = Statuses(app)
        try:
            prompt, generated = asyncio.run(load(app, requests=12))
            (replica,) = statuses.until(
                lambda found: tokens(found) == (prompt, generated), 60, "every token"
            )
            assert replica["gpu_uuid"] == uuid
            wait_until(lambda: fake.gpu(1).locked_mhz == (900, 900), 20, "the idle clock")
            before = replica["phase_changes"]
            asyncio.run(load(app, requests=3))
            (replica,) = statuses.until(
                lambda found: found and found[0]["phase_changes"] >= before + 3, 20, "switching"
            )
            assert replica["plan"] == [1500, 1200, 900]
            wait_until(lambda: fake.gpu(1).locked_mhz == (900, 900), 20, "the idle clock again")
            assert fake.gpu(0).locked_mhz is None
            until_rays_metrics(app, statuses, replicas=1)
        finally:
            statuses.close()
    wait_until(lambda: fake.gpu(1).locked_mhz is None, 10, "the reset at the end")
