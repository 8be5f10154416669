"""Give your own Serve deployment a tuner: `python examples/own_deployment.py`.

The engine here is a toy that answers from a loop of sleeps; in its place could be anything that
can count its tokens. The GPU is a simulated one, so this runs anywhere.
"""

import asyncio
import json
import time
import urllib.request
from typing import Any

from ray import serve
from starlette.requests import Request

from agft_ray import EngineStats, SimulatedGpuConfig, attach_tuner, claim_simulated_gpu
from agft_ray.types import EngineSample

TOKEN_S = 0.02


@serve.deployment(
    user_config={"mode": "control", "policy": {"name": "fixed", "sm_clock_mhz": 1230}}
)
class ToyLLM:
    def __init__(self) -> None:
        self.running = 0
        self.stats = EngineStats()
        gpu = claim_simulated_gpu(SimulatedGpuConfig(), application="toy", model="llama-3.1-8b")
        # The three lines that matter: attach here, pass settings on, let go at the end.
        self.tuner = attach_tuner(self.read_stats, gpu=gpu, engine_model="toy")

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.tuner.reconfigure(user_config)

    async def __del__(self) -> None:
        await self.tuner.close()

    def read_stats(self, t_s: float) -> EngineSample:
        return self.stats.sample(t_s=t_s, running=self.running, waiting=0, kv_cache_usage=0.0)

    async def __call__(self, request: Request) -> dict[str, Any]:
        words = (await request.json())["words"]
        started_s = token_s = time.monotonic()
        self.running += 1
        for index in range(words):
            await asyncio.sleep(TOKEN_S)
            now_s = time.monotonic()
            self.stats.on_step(prefill_tokens=0, decode_tokens=1, time_s=now_s - token_s)
            if index == 0:
                self.stats.on_first_token(ttft_s=now_s - started_s)
            else:
                self.stats.on_token(itl_s=now_s - token_s)
            token_s = now_s
        self.stats.on_finish(e2e_s=token_s - started_s)
        self.running -= 1
        return {"words": words, "role": self.tuner.role}


def ask(words: int) -> dict[str, Any]:
    body = json.dumps({"words": words}).encode()
    with urllib.request.urlopen("http://127.0.0.1:8000/", data=body, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def main() -> None:
    import ray

    from agft_ray.actors.experience_aggregator import get_aggregator

    serve.run(ToyLLM.bind(), name="toy")
    print(ask(words=500))
    (status,) = ray.get(get_aggregator().statuses.remote("toy#ToyLLM"))
    for name in ("role", "mode", "state", "windows", "locked_sm_clock_mhz", "energy_j"):
        print(f"{name}: {status[name]}")
    serve.shutdown()


if __name__ == "__main__":
    main()
