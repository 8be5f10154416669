"""An OpenAI-compatible server as the replay client sees it: pages, streamed completions, errors."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from agft_ray.errors import AgftError
from agft_ray.replay.result import INTERRUPTED, OK, RequestRow, ServerStatus
from agft_ray.workloads.requests import Request

if TYPE_CHECKING:
    import aiohttp

ASK_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn (vLLM, FastAPI) closes an idle connection: we close first, and
do not send into a connection that is being closed."""
READ_BUFFER_BYTES = 1 << 20
"""aiohttp refuses lines of more than twice this; a chunk of grouped tokens can be long."""


def open_session() -> aiohttp.ClientSession:
    """A session without limits on connections or time."""
    try:
        import aiohttp
    except ImportError:
        raise AgftError(
            "replaying over HTTP needs aiohttp; install it with: pip install 'agft-ray[serve]'"
        ) from None
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        read_bufsize=READ_BUFFER_BYTES,
    )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server at `url`, without the `/v1`."""

    session: aiohttp.ClientSession
    url: str

    async def first_status(self, *, required: bool) -> ServerStatus | None:
        """The status, None if there is no such page, or no answer and none is required."""
        try:
            return await self.status()
        except AgftError:
            if required:
                raise
            return None

    async def status(self) -> ServerStatus | None:
        """`/agft/status`, None if there is no such page; raises `AgftError` if it is malformed."""
        body = await self._get("/agft/status")
        try:
            return None if body is None else ServerStatus.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            raise AgftError(f"{self.url}/agft/status: {name}: {first['msg']}") from None

    async def first_model(self) -> str:
        """The first id of `/v1/models`; raises `AgftError` if there is none."""
        body = await self._get("/v1/models")
        try:
            return str(json.loads(body or b"")["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise AgftError(f"model: {self.url}/v1/models names none; pass its name") from None

    async def complete(self, exchange: Exchange, model: str) -> None:
        """Send the request and feed the answer to `exchange`; raises whatever goes wrong."""
        body = completion_body(exchange.request, model)
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                message = _error_message(await response.text(errors="replace"))
                exchange.status = f"HTTP {response.status}: {message}"
                return
            async for line in response.content:
                exchange.feed(line, time.monotonic())
            if exchange.end_wall_s is None:
                exchange.status = "the stream ended before [DONE]"

    async def _get(self, path: str) -> bytes | None:
        """The page, or None if there is none; raises `AgftError` for any other answer or none."""
        import aiohttp

        limit = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
        try:
            async with self.session.get(self.url + path, timeout=limit) as response:
                if response.status == 404:
                    return None
                if response.status == 200:
                    return await response.read()
                message = _error_message(await response.text(errors="replace"))
                raise AgftError(f"{self.url}{path}: HTTP {response.status}: {message}")
        except (aiohttp.ClientError, OSError) as error:
            raise AgftError(
                f"url: {self.url} does not answer ({described(error)}); start the server or "
                "correct the address"
            ) from None


def completion_body(request: Request, model: str) -> dict[str, Any]:
    """The JSON of a streamed completion; a word of the prompt stands for a token."""
    return {
        "model": model,
        "prompt": " ".join(["tok"] * request.prompt_tokens),
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Choice(_Part):
    text: str | None = None


class _Usage(_Part):
    prompt_tokens: int
    completion_tokens: int


class _Engine(_Part):
    replica: str | None = None
    role: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class _Chunk(_Part):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    agft: _Engine | None = None
    error: Any = None


@dataclass(slots=True)
class Exchange:
    """One request and what has come of it so far: moments in wall seconds on one clock."""

    request: Request
    speed: float
    due_wall_s: float
    sent_wall_s: float
    status: str = INTERRUPTED
    retries: int = 0
    first_text_wall_s: float | None = None
    last_text_wall_s: float | None = None
    end_wall_s: float | None = None
    usage: _Usage | None = None
    engine: _Engine = field(default_factory=_Engine)

    def feed(self, line: bytes, wall_s: float) -> None:
        """Take one line of the event stream, received at `wall_s`.

        Raises `AgftError` if it is an error the server reports, or not a chunk of a completion.
        """
        if not line.startswith(b"data:"):
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.status, self.end_wall_s = OK, wall_s
        else:
            self._take(_parse_chunk(data), wall_s)

    def _take(self, chunk: _Chunk, wall_s: float) -> None:
        self.usage = chunk.usage or self.usage
        self.engine = chunk.agft or self.engine
        if chunk.error is not None:
            raise AgftError(f"error in the stream: {_error_message(json.dumps(chunk.error))}")
        if any(choice.text for choice in chunk.choices):
            self.last_text_wall_s = wall_s
            if self.first_text_wall_s is None:
                self.first_text_wall_s = wall_s

    def row(self) -> RequestRow:
        """As it stands, in simulated seconds."""
        return RequestRow(
            request_id=self.request.request_id,
            arrival_s=self.request.arrival_s,
            dispatch_lateness_wall_s=self.sent_wall_s - self.due_wall_s,
            status=self.status,
            retries=self.retries,
            prompt_tokens=self.usage.prompt_tokens if self.usage else None,
            output_tokens=self.usage.completion_tokens if self.usage else None,
            ttft_s=self._simulated_since_sent(self.first_text_wall_s),
            tpot_s=self._tpot_s(),
            e2e_s=self._simulated_since_sent(self.end_wall_s),
            replica=self.engine.replica,
            role=self.engine.role,
            engine_ttft_s=self.engine.ttft_s,
            engine_tpot_s=self.engine.tpot_s,
            engine_e2e_s=self.engine.e2e_s,
        )

    def _simulated_since_sent(self, wall_s: float | None) -> float | None:
        return None if wall_s is None else (wall_s - self.sent_wall_s) * self.speed

    def _tpot_s(self) -> float | None:
        first, last = self.first_text_wall_s, self.last_text_wall_s
        if first is None or last is None or self.usage is None or self.usage.completion_tokens < 2:
            return None
        return (last - first) * self.speed / (self.usage.completion_tokens - 1)


def _parse_chunk(data: bytes) -> _Chunk:
    try:
        return _Chunk.model_validate_json(data)
    except ValidationError:
        shown = data[:80].decode(errors="replace")
        raise AgftError(f"not a chunk of a completion: {shown!r}") from None


def _error_message(body: str) -> str:
    """The message within an OpenAI-style error, or the text itself; one line, 200 characters."""
    with contextlib.suppress(ValueError):
        value = json.loads(body)
        while isinstance(value, dict):
            keys = [key for key in ("error", "message", "detail") if key in value]
            value = value[keys[0]] if keys else str(value)
        body = str(value)
    return " ".join(body.split())[:200]


def described(error: Exception) -> str:
    """One line for a table: our own errors as they are, others with their type."""
    if isinstance(error, AgftError):
        return str(error)
    return f"{type(error).__name__}: {error}".rstrip(": ")
