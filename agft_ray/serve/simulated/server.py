"""The simulated deployment: an OpenAI-compatible server on a simulated engine and GPU."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from starlette.exceptions import HTTPException

from agft_ray.actors.experience_aggregator import get_aggregator
from agft_ray.clock import WallClock
from agft_ray.gpu.config import NvmlGpuConfig, SimulatedGpuConfig
from agft_ray.gpu.registry import GpuSpec, claim_simulated_gpu
from agft_ray.serve.attach import attach_tuner
from agft_ray.serve.simulated.config import AppConfig
from agft_ray.serve.simulated.openai_api import (
    SSE_DONE,
    Answer,
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    sse,
    usage,
    word,
)
from agft_ray.simulation.device import Device
from agft_ray.simulation.engine import BatchingEngine, StepDevice, TokenEvent
from agft_ray.simulation.physics import prefill_attention_s
from agft_ray.simulation.profiles import load_gpu_profile
from agft_ray.simulation.shared_device import SharedDevice
from agft_ray.simulation.wall_engine import WallEngine
from agft_ray.workloads.requests import Request as EngineRequest
from agft_ray.workloads.requests import RequestTimings

MEDIAN_OUTPUT_TOKENS, MEAN_OUTPUT_TOKENS = 129, 211
"""Of answers whose length the request leaves open: those of the Azure 2023 conversation trace."""
STATUS_TIMEOUT_S = 5.0

api = FastAPI(title="agft_ray: simulated LLM", docs_url=None, redoc_url=None)


@api.exception_handler(ApiError)
async def _refuse(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status)


@api.exception_handler(RequestValidationError)
async def _refuse_invalid(_: Request, error: RequestValidationError) -> Response:
    """All problems of a body in one 400, as OpenAI has it (not FastAPI's 422)."""
    problems = [
        f"{'.'.join(str(part) for part in item['loc'][1:]) or 'body'}: {item['msg']}"
        for item in error.errors()
    ]
    first = error.errors()[0]["loc"]
    param = first[1] if len(first) > 1 and isinstance(first[1], str) else None
    refusal = ApiError(400, "; ".join(problems), param=param, code="invalid_value")
    return JSONResponse(refusal.body(), status_code=400)


@api.exception_handler(HTTPException)
async def _refuse_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), status_code=error.status_code)


# Serve copies the routes when the class is decorated, with the globals that exist by then: what
# they use must stand above.
async def _collect(events: AsyncGenerator[list[TokenEvent]]) -> RequestTimings:
    timings: RequestTimings | None = None
    async for batch in events:
        timings = batch[-1].timings
    if timings is None:
        raise RuntimeError("the engine ended before the answer was complete")
    return timings


@serve.deployment(
    name="SimulatedLLM",
    max_ongoing_requests=4096,
    graceful_shutdown_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=2,
    ray_actor_options={"num_cpus": 0.1},
)
@serve.ingress(api)
class SimulatedLLM:
    """One replica: a batching engine in wall time, its GPU's state file, and its tuner.

    Requests never wait for the tuner: they touch the engine only.
    """

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]
        self._config = config
        context = serve.get_replica_context()
        self._deployment = f"{context.app_name}#{context.deployment}"
        profile = load_gpu_profile(config.profile)
        model = profile.model_profile(config.model)
        engine = BatchingEngine(
            config.engine.for_model(model), functools.partial(prefill_attention_s, model)
        )
        gpu: GpuSpec | NvmlGpuConfig
        if isinstance(config.gpu, SimulatedGpuConfig):
            gpu = claim_simulated_gpu(
                config.gpu,
                application=context.app_name,
                model=config.model,
                speed=config.speed,
                seed=config.seed,
            )
            device: StepDevice = SharedDevice(gpu.devices[0])
            clock = gpu.clock
        else:
            gpu, device = config.gpu, Device(profile, model, seed=config.seed)
            clock = WallClock(origin_s=time.monotonic())
        self._link = attach_tuner(
            lambda t_s: replace(self._engine.sample(), t_s=t_s),
            gpu=gpu,
            engine_model=config.model,
            config=config.tuner,
            figures=lambda: self._engine.lateness(),
        )
        self._clock = clock
        self._engine = WallEngine(
            engine, device, clock, on_wake=self._link.wake, phases=self._link.switch
        )
        self._running = asyncio.get_running_loop().create_task(self._engine.run())
        self._lengths = random.Random(f"{config.seed}:{context.replica_id.unique_id}")
        self._aggregator = get_aggregator()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """New tuner settings, see `TunerLink.reconfigure`."""
        self._link.reconfigure(user_config)

    def check_health(self) -> None:
        """The engine and its GPU are this replica's health; the tuner is not."""
        if self._running.done():
            raise RuntimeError(f"the engine has ended: {self._running}")
        self._link.check_health()

    async def __del__(self) -> None:
        link = getattr(self, "_link", None)
        if link is not None:
            await link.close()

    # -- the OpenAI API ------------------------------------------------------------------------

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        model = {
            "id": self._config.model,
            "object": "model",
            "created": 0,
            "owned_by": "agft_ray",
            "max_model_len": self._config.engine.max_model_len,
        }
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{model_id}")
    async def model(self, model_id: str) -> dict[str, Any]:
        """`GET /v1/models/{model_id}`."""
        self._check_model(model_id)
        return (await self.models())["data"][0]  # type: ignore[no-any-return]

    @api.post("/v1/completions")
    async def completions(self, body: CompletionRequest) -> Response:
        """`POST /v1/completions`."""
        return await self._respond(body, chat=False)

    @api.post("/v1/chat/completions")
    async def chat_completions(self, body: ChatCompletionRequest) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._respond(body, chat=True)

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """`GET /health`."""
        self.check_health()
        return {"status": "ok"}

    @api.get("/agft/status")
    async def status(self) -> Response:
        """What every replica of this deployment last reported: energy, clocks, counters."""
        try:
            statuses = await asyncio.wait_for(
                self._aggregator.statuses.remote(self._deployment), STATUS_TIMEOUT_S
            )
        except (RayError, TimeoutError) as error:
            raise ApiError(503, f"the experience aggregator does not answer: {error}") from None
        clock = self._clock
        return JSONResponse({"speed": clock.speed, "now_s": clock.now_s(), "replicas": statuses})

    # -- answering -----------------------------------------------------------------------------

    def _check_model(self, model: str) -> None:
        if model != self._config.model:
            raise ApiError(
                404,
                f"the model {model!r} does not exist here; served: {self._config.model!r}",
                param="model",
                code="model_not_found",
            )

    async def _respond(
        self, body: CompletionRequest | ChatCompletionRequest, *, chat: bool
    ) -> Response:
        self._check_model(body.model)
        request, finish_reason = self._plan(body, "messages" if chat else "prompt")
        answer = Answer(request_id=request.request_id, model=body.model, chat=chat)
        events = self._engine.submit(request)
        if body.stream:
            stream = self._stream(answer, events, request, finish_reason, body.includes_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        timings = await _collect(events)
        text = "".join(word(index) for index in range(request.output_tokens))
        counts = usage(request.prompt_tokens, request.output_tokens)
        return JSONResponse(answer.whole(text, finish_reason, counts) | self._extra(timings))

    def _plan(
        self, body: CompletionRequest | ChatCompletionRequest, param: str
    ) -> tuple[EngineRequest, str]:
        """The engine's request, and why its answer will end."""
        context = self._config.engine.max_model_len
        prompt_tokens = body.prompt_tokens()
        limit = body.token_limit() or max(1, context - prompt_tokens)
        if prompt_tokens == 0:
            raise ApiError(400, f"{param} holds no token; send at least one word", param=param)
        if prompt_tokens + limit > context:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens and max_tokens is {limit}, together "
                f"{prompt_tokens + limit}; the context length is {context}: shorten one of them",
                param=param,
                code="context_length_exceeded",
            )
        natural = limit if body.ignore_eos else self._natural_length(body.seed)
        output_tokens = min(natural, limit)
        request = EngineRequest(uuid.uuid4().hex, self._clock.now_s(), prompt_tokens, output_tokens)
        return request, "length" if natural >= limit else "stop"

    def _natural_length(self, seed: int | None) -> int:
        """Log-normal, with the median and mean of the conversation trace's outputs."""
        lengths = self._lengths if seed is None else random.Random(seed)
        sigma = math.sqrt(2 * math.log(MEAN_OUTPUT_TOKENS / MEDIAN_OUTPUT_TOKENS))
        return max(1, round(lengths.lognormvariate(math.log(MEDIAN_OUTPUT_TOKENS), sigma)))

    async def _stream(
        self,
        answer: Answer,
        events: AsyncGenerator[list[TokenEvent]],
        request: EngineRequest,
        finish_reason: str,
        include_usage: bool,
    ) -> AsyncIterator[str]:
        """Tokens as they are due; the first at once, later ones grouped to spare the HTTP path."""
        text, sent_s, first = "", -math.inf, True
        extra: dict[str, Any] = {}
        async with aclosing(events):
            async for batch in events:
                text += "".join(word(event.index) for event in batch)
                timings = batch[-1].timings
                if timings is not None:
                    extra = self._extra(timings)
                elif time.monotonic() - sent_s < self._config.stream_group_s:
                    continue
                sent_s = time.monotonic()
                reason = finish_reason if timings is not None else None
                chunk = answer.chunk(text, first=first, finish_reason=reason)
                yield sse(chunk if include_usage else chunk | extra)
                text, first = "", False
        if include_usage:
            counts = usage(request.prompt_tokens, request.output_tokens)
            yield sse(answer.usage_chunk(counts) | extra)
        yield SSE_DONE

    def _extra(self, timings: RequestTimings) -> dict[str, Any]:
        """Beside OpenAI's fields: who answered, and the latencies at the engine."""
        return {
            "agft": {
                "replica": self._link.replica,
                "role": self._link.role,
                "ttft_s": timings.ttft_s,
                "tpot_s": timings.tpot_s,
                "e2e_s": timings.e2e_s,
            }
        }
