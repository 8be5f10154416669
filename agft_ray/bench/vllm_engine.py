"""The engines that `agft-ray bench vllm` measures, and the load on them."""

# No `from __future__ import annotations` here: Ray Serve looks at the builder's annotations.

import asyncio
import contextlib
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ray import serve
from starlette.requests import Request

from agft_ray.actors.experience_aggregator import get_aggregator
from agft_ray.errors import AgftError
from agft_ray.gpu.config import SimulatedGpuConfig
from agft_ray.gpu.registry import claim_simulated_gpu
from agft_ray.serve.attach import attach_tuner
from agft_ray.serve.link import TunerLink
from agft_ray.serve.vllm.statistics import VllmStats

SIDES = {
    "without": "no tuner, no switch, no plugin",
    "untimed": "tuner and switch, vLLM does not time its steps",
    "with": "tuner and switch, vLLM times its steps",
}
"""Whose blocks alternate; the last is how a tuned engine is run."""
BENCH = "bench-vllm"
GPU_LOAD = "llama-3.1-8b"
"""A model of the GPU's profile, which must name one; nothing loads the GPU."""
POLICY = {"name": "pair", "prefill_sm_clock_mhz": 1500, "decode_sm_clock_mhz": 1200}
"""Each prompt is a change of clock and another back, as under `phases`; what that has to compute
besides, once a window, `agft-ray bench decision` tells."""
CLIENTS = 8
PROMPT_TOKENS, OUTPUT_TOKENS = (32, 128, 512), (16, 32, 64)
TOKEN_IDS = range(256)
"""Of prompts: there is no model that does not have these."""
TUNER_START_TIMEOUT_S = 30.0
POLL_S = 0.2
STATUS_FIELDS = (
    "state",
    "reason",
    "windows",
    "clock_changes",
    "phase_changes_put_off",
    "phase_delays",
)
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 1024,
}
"""As in configs/vllm_cpu.yaml, but for the executor."""

Generate = Callable[[list[int], int, str], AsyncIterator[int]]
"""Given a prompt's token ids, how many tokens to give out and a request id, yields how many tokens
have come, as they come."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all values lies below, by rank."""
    return sorted(values)[int(share * len(values))]


@dataclass(frozen=True, slots=True)
class Block:
    """What was measured of an engine under load."""

    tokens: int
    elapsed_s: float
    ttfts_s: Sequence[float]
    """Of the requests whose first token fell within the block."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the block by its duration."""
        return self.tokens / self.elapsed_s

    def ttft_s(self, share: float) -> float:
        """A percentile; raises `AgftError` if there was no first token."""
        if not self.ttfts_s:
            raise AgftError(
                f"no request got its first token in a block of {self.elapsed_s:.1f} s; "
                "lengthen --block-s"
            )
        return percentile(self.ttfts_s, share)

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_s:7.1f} tokens/s, TTFT p50 {self.ttft_s(0.5) * 1e3:6.1f} ms, "
            f"p99 {self.ttft_s(0.99) * 1e3:6.1f} ms"
        )


@dataclass(slots=True)
class _Load:
    """Closed-loop clients; each sends the same requests whenever the seed is the same."""

    generate: Generate
    seed: int
    is_measured: bool = False
    tokens: int = 0
    ttfts_s: list[float] = field(default_factory=list)

    async def client(self, index: int) -> None:
        rng = random.Random(f"{self.seed}-{index}")
        for turn in itertools.count():
            await self._request(rng, f"{self.seed}-{index}-{turn}")

    async def _request(self, rng: random.Random, request_id: str) -> None:
        prompt = rng.choices(TOKEN_IDS, k=rng.choice(PROMPT_TOKENS))
        start_s, has_begun = time.perf_counter(), False
        async for tokens in self.generate(prompt, rng.choice(OUTPUT_TOKENS), request_id):
            if self.is_measured:
                self.tokens += tokens
                if not has_begun:
                    self.ttfts_s.append(time.perf_counter() - start_s)
            has_begun = True


async def measure(generate: Generate, *, seed: int, warm_up_s: float, block_s: float) -> Block:
    """Load an engine with `CLIENTS` clients for a warm-up and a block; requests still under way at
    the end are given up. Raises what `generate` raises, in an `ExceptionGroup`."""
    load = _Load(generate, seed)
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(load.client(index)) for index in range(CLIENTS)]
        await asyncio.sleep(warm_up_s)
        load.is_measured, start_s = True, time.perf_counter()
        await asyncio.sleep(block_s)
        block = Block(load.tokens, time.perf_counter() - start_s, tuple(load.ttfts_s))
        for client in clients:
            client.cancel()
    return block


class VllmReplica:
    """An `AsyncLLM` with vLLM's default statistics; on tuned sides it reports to tuners, too."""

    async def __init__(  # type: ignore[misc]
        self, model: str, side: str, executor: str, window_s: float
    ) -> None:
        from agft_ray.serve.vllm import plugin as vllm_plugin

        self._window_s = window_s
        self._is_tuned = side != "without"
        self._stats = VllmStats()
        self._tuner: TunerLink | None = None
        self._tuners = 0
        self._gpu = claim_simulated_gpu(SimulatedGpuConfig(), application=BENCH, model=GPU_LOAD)
        with self._stats.registered() if self._is_tuned else contextlib.nullcontext():
            self._engine = vllm_plugin.start_engine(
                model=model,
                distributed_executor_backend=executor,
                enable_logging_iteration_details=side == "with",
                **ENGINE,
            )
        self._generate = functools.partial(vllm_plugin.token_counts, self._engine)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Do what is asked for: 'begin' and 'end' being tuned, 'measure' a block of load between;
        answers with the block and the tuner's status, where there is one."""
        asked = await request.json()
        answer: dict[str, Any] = {}
        match asked.pop("do"):
            case "begin" if self._is_tuned:
                await self._begin()
            case "measure":
                answer["block"] = asdict(await measure(self._generate, **asked))
            case "end":
                await self._end()
        return answer | {"tuner": await self._status()}

    async def __del__(self) -> None:
        await self._end()
        self._engine.shutdown()

    async def _begin(self) -> None:
        """Attach a tuner, and give it time to come to work."""
        self._tuners += 1
        self._tuner = attach_tuner(
            self._stats.sample,
            gpu=self._gpu,
            engine_model=BENCH,
            config={"mode": "control", "policy": POLICY, "window_s": self._window_s},
            figures=lambda: {"number": self._tuners},
        )
        self._stats.watch(self._engine, self._tuner.switch)
        deadline_s = time.monotonic() + TUNER_START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            status = await self._status()
            if status is not None and status["state"] == "tuning":
                return
            await asyncio.sleep(POLL_S)

    async def _end(self) -> None:
        if self._tuner is not None:
            await self._tuner.close()
        self._tuner = None

    async def _status(self) -> dict[str, Any] | None:
        """The last report of this tuner, and not of one before; None without tuner or report."""
        if self._tuner is None:
            return None
        context = serve.get_replica_context()
        deployment = f"{context.app_name}#{context.deployment}"
        for status in await get_aggregator().statuses.remote(deployment):
            if status.get("number") == self._tuners:
                return {name: status.get(name) for name in STATUS_FIELDS}
        return None


def build_replica(args: dict[str, Any]) -> serve.Application:
    """The application of one side; `args` are those of `VllmReplica`."""
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}}
    return serve.deployment(**options)(VllmReplica).bind(**args)
