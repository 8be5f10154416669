"""A deployment of your own that hosts vLLM, with a tuner and without `ray.serve.llm`.

python examples/tiny_model.py /tmp/tiny-model
python examples/vllm_deployment.py /tmp/tiny-model

As it stands it runs on a CPU, with a simulated GPU that the engine neither loads nor waits for. On
a real GPU give the deployment `num_gpus: 1` and `attach_tuner` the GPU `NvmlGpuConfig()`, and leave
out CPU_ENVIRONMENT and CPU_ENGINE.
"""

import argparse
import json
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import Request

from agft_ray import SimulatedGpuConfig, attach_tuner, claim_simulated_gpu
from agft_ray.serve import VllmStats

MODEL_ID = "tiny"
CPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
CPU_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 1024,
}


@serve.deployment(
    user_config={"mode": "control", "policy": {"name": "fixed", "sm_clock_mhz": 1230}},
    ray_actor_options={"runtime_env": {"env_vars": CPU_ENVIRONMENT}},
)
class MyVllm:
    async def __init__(self, model: str) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        gpu = claim_simulated_gpu(SimulatedGpuConfig(), application="mine", model="llama-3.1-8b")
        stats = VllmStats()
        # The tuner comes first, so that the engine loads at default clocks.
        self.tuner = attach_tuner(stats.sample, gpu=gpu, engine_model=MODEL_ID)
        await self.tuner.probed()
        await self.tuner.cleared()
        arguments = AsyncEngineArgs(
            model=model, enable_logging_iteration_details=True, **CPU_ENGINE
        )
        with stats.registered():
            self.engine = AsyncLLM.from_engine_args(arguments)
        stats.watch(self.engine, self.tuner.switch)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.tuner.reconfigure(user_config)

    async def check_health(self) -> None:
        await self.engine.check_health()
        self.tuner.check_health()  # fails only when the GPU itself is lost

    async def __del__(self) -> None:
        await self.tuner.close()
        self.engine.shutdown()

    async def __call__(self, request: Request) -> dict[str, Any]:
        from vllm import SamplingParams

        asked = await request.json()
        sampling = SamplingParams(max_tokens=asked["max_tokens"], ignore_eos=True)
        async for output in self.engine.generate(asked["prompt"], sampling, uuid.uuid4().hex):
            answer = output.outputs[0]
        return {"text": answer.text, "tokens": len(answer.token_ids)}


def ask(prompt: str, max_tokens: int) -> dict[str, Any]:
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode()
    with urllib.request.urlopen("http://127.0.0.1:8000/", data=body, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def main() -> None:
    import ray

    from agft_ray.actors.experience_aggregator import get_aggregator

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a model, as tiny_model.py makes one")
    model = str(parser.parse_args().model.resolve())
    serve.run(MyVllm.bind(model), name="mine")
    tokens = sum(ask("What is the clock of an idle GPU?", 400)["tokens"] for _ in range(4))
    print(f"asked_for: {tokens}")
    for _ in range(20):  # the tuner reports every second
        (status,) = ray.get(get_aggregator().statuses.remote("mine#MyVllm"))
        if status["generation_tokens"] >= tokens:
            break
        time.sleep(0.5)
    for name in ("role", "mode", "state", "windows", "locked_sm_clock_mhz", "generation_tokens"):
        print(f"{name}: {status[name]}")
    serve.shutdown()


if __name__ == "__main__":
    main()
