"""The server that bench/http_path.py compares with: FastAPI, sse-starlette and uvicorn.

It parses the same request with pydantic and streams the same chunks, one event for each token. It has no model and
no worker process, so it does less than a complete server.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse

app = FastAPI()


class Message(BaseModel):
    """A chat message."""

    role: str
    content: str


class Request(BaseModel):
    """The fields that the benchmark sends."""

    model: str
    messages: list[Message]
    max_tokens: int = 16
    stream: bool = False
    temperature: float = 1.0


@app.get("/v1/models")
async def models() -> dict[str, object]:
    """Answers once the server is up."""
    return {"object": "list", "data": []}


@app.post("/v1/chat/completions", response_model=None)
async def chat(request: Request) -> EventSourceResponse | dict[str, object]:
    """Returns max_tokens letters, streamed or in one response."""
    created = int(time.time())
    if not request.stream:
        message = {"role": "assistant", "content": "x" * request.max_tokens, "refusal": None}
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": created,
            "model": request.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": request.max_tokens, "total_tokens": 36},
        }

    def chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, str]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        said = {
            "id": "chatcmpl-0",
            "object": "chat.completion.chunk",
            "created": created,
            "model": request.model,
            "system_fingerprint": "fp_0",
            "choices": [choice],
        }
        return {"data": json.dumps(said)}

    async def events() -> AsyncIterator[dict[str, str]]:
        yield chunk({"role": "assistant", "content": ""})
        for _ in range(request.max_tokens):
            await asyncio.sleep(0)  # one turn of the loop, as for a token from another process
            yield chunk({"content": "x"})
        yield chunk({}, "length")
        yield {"data": "[DONE]"}

    return EventSourceResponse(events())
