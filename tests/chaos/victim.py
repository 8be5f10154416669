"""A deployment to kill: a real tuner on a (fake) NVIDIA GPU, and no engine behind it.

Its switch tells now of a prompt, now of none, all the time, and under the policy `pair` clocks
follow; the rest of it is as under `fixed`.
"""

import asyncio
import os
import time
from dataclasses import replace

import ray
from ray import serve
from ray.exceptions import RayError

from agft_ray.gpu.config import NvmlGpuConfig
from agft_ray.serve.attach import attach_tuner
from agft_ray.types import EngineSample, StepTotals

CONFIG = {
    "mode": "control",
    "policy": {"name": "fixed", "sm_clock_mhz": 1200},
    "window_s": 0.5,
    "settle_s": 0.1,
}
REQUESTS, TOKENS_PER_S = 4, 200
PHASE_S, FIRST_TOKENS_PER_S = 0.06, 10


def busy_engine(t_s):
    """The statistics of a made-up engine that has always answered four requests at a time."""
    steps = int(TOKENS_PER_S * t_s / REQUESTS)
    tokens = REQUESTS * steps
    return EngineSample(
        t_s=t_s,
        running=REQUESTS,
        kv_cache_usage=0.1,
        prompt_tokens=tokens,
        generation_tokens=tokens,
        iterations=steps,
        iteration_tokens=tokens,
        itl_sum_s=REQUESTS * t_s,
        itl_count=tokens,
        decode_steps=StepTotals(steps, tokens, t_s),
    )


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=100,
    max_constructor_retry_count=1,
    health_check_period_s=1,
    graceful_shutdown_timeout_s=2,
    graceful_shutdown_wait_loop_s=0.1,
    ray_actor_options={"num_cpus": 0, "num_gpus": 1},
)
class Victim:
    """Its constructor takes `slow_s` longer, and if it `fails`, ends with an error, soon after the
    tuner has locked the clocks."""

    async def __init__(self, lease_dir, version, fails, slow_s):
        self._link = attach_tuner(
            self._sample, gpu=NvmlGpuConfig(lease_dir=lease_dir), engine_model="m", config=CONFIG
        )
        self._prompts_come = False
        self._telling = asyncio.create_task(self._tell())
        self._reconfigured_s = 0.0
        self._is_healthy = True
        self._requests_under_way = 0
        await asyncio.sleep(slow_s)
        if fails:
            await self._link.probed()
            while (await self.status())["locked_sm_clock_mhz"] is None:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            raise RuntimeError(f"version {version} fails on purpose")

    def _sample(self, t_s):
        sample, first_tokens = busy_engine(t_s), int(FIRST_TOKENS_PER_S * t_s)
        if not self._prompts_come:
            return sample
        return replace(sample, ttft_count=first_tokens, ttft_sum_s=0.1 * first_tokens)

    async def _tell(self):
        while True:
            self._link.switch.on_step(0)
            await asyncio.sleep(PHASE_S)
            self._link.switch.on_arrival()
            await asyncio.sleep(PHASE_S)

    def fall_silent(self):
        """The switch tells of no prompt any more, whatever comes."""
        self._telling.cancel()
        self._link.switch.on_step(0)

    def have_prompts(self):
        """First tokens come, as the engine's statistics say."""
        self._prompts_come = True

    def reconfigure(self, user_config):
        self._link.reconfigure(user_config)
        self._reconfigured_s = time.monotonic()

    def check_health(self):
        self._link.check_health()
        if not self._is_healthy:
            raise RuntimeError("unhealthy on purpose")

    async def __del__(self):
        if hasattr(self, "_link"):
            await self._link.close()

    def ping(self):
        """The replica's process ID."""
        return os.getpid()

    def reconfigured_s(self):
        """When settings last came, on the machine's monotonic clock."""
        return self._reconfigured_s

    async def status(self):
        status = await self._link._tuner.status.remote()
        return {"locked_sm_clock_mhz": None, **status}

    async def tuner_status(self):
        """As `status`; without a PID while no tuner answers."""
        try:
            return await asyncio.wait_for(self.status(), 1)
        except (RayError, TimeoutError):
            return {"tuner_pid": None, "windows": 0}

    def become_unhealthy(self):
        self._is_healthy = False

    async def answer_slowly(self, duration_s):
        self._requests_under_way += 1
        await asyncio.sleep(duration_s)
        self._requests_under_way -= 1

    def requests_under_way(self):
        return self._requests_under_way

    def kill_tuner(self, no_restart):
        ray.kill(self._link._tuner, no_restart=no_restart)
