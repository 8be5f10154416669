"""The OpenAI API's shapes, as far as a simulated engine can honour them, and its errors."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TOKENS_PER_MESSAGE = 4
"""What a chat template adds to each message."""
WORDS = (
    *("the", "clock", "of", "a", "decoding", "device", "may", "rest", "while", "memory", "brings"),
    *(
        "what",
        "the",
        "next",
        "token",
        "needs",
        "and",
        "energy",
        "saved",
        "need",
        "not",
        "be",
        "made",
    ),
)


class ApiError(Exception):
    """A refusal in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body: message, type, param, code."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class _Request(BaseModel):
    # Parameters that do not change what a simulated engine does are accepted, as vLLM does.
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    """One choice a request."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    ignore_eos: bool = False
    """vLLM's extension: generate exactly `max_tokens`."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(BaseModel):
    """What a streamed answer is to hold besides text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class CompletionRequest(_Request):
    """`POST /v1/completions`; the prompt is text or a list of token ids."""

    prompt: str | list[int]
    max_tokens: int | None = Field(default=16, ge=1)

    def prompt_tokens(self) -> int:
        """Token ids given, else one token a word."""
        return count_tokens(self.prompt) if isinstance(self.prompt, str) else len(self.prompt)

    def token_limit(self) -> int | None:
        """The most tokens asked for, None if it does not say."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def tokens(self) -> int:
        """About how many tokens its text has."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else " ".join(p.text for p in parts)
        return TOKENS_PER_MESSAGE + count_tokens(text)


class ChatCompletionRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def prompt_tokens(self) -> int:
        """About how many tokens its messages have."""
        return sum(message.tokens() for message in self.messages)

    def token_limit(self) -> int | None:
        """The most tokens asked for, None if it does not say."""
        return self.max_completion_tokens or self.max_tokens


def count_tokens(text: str) -> int:
    """The simulated tokenizer: one token a whitespace-separated word."""
    return len(text.split())


def word(index: int) -> str:
    """The text of the output token at `index`."""
    return ("" if index == 0 else " ") + WORDS[index % len(WORDS)]


class Answer:
    """Builds the objects of one answer, streamed or whole, chat or plain."""

    def __init__(self, *, request_id: str, model: str, chat: bool) -> None:
        self._chat = chat
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        kind = "chat.completion" if self._chat else "text_completion"
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self._base, "object": kind, "choices": [choice], "usage": usage}

    def chunk(self, text: str, *, first: bool, finish_reason: str | None) -> dict[str, Any]:
        """One chunk of a stream."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": text}
        else:
            choice["text"] = text
        return {**self._base, "object": self._chunk_kind(), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk that closes a stream with `include_usage`."""
        return {**self._base, "object": self._chunk_kind(), "choices": [], "usage": usage}

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The `usage` object of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def sse(payload: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(payload, separators=(',', ':'))}\n\n"


SSE_DONE = "data: [DONE]\n\n"
