"""A server of the OpenAI API without a model, to try the middleware on: it writes words, and each is a token.

The last number in the prompt says how many; without one it writes eight.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from itertools import cycle, islice
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.integrations.asgi import EntitlementMiddleware

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
PACE_S = 0.003  # for a word


class Answer:
    """To one request, in the shape of its kind: of a chat, or of a plain completion."""

    def __init__(self, asked: dict[str, Any], *, chat: bool) -> None:
        prompt = " ".join(str(message["content"]) for message in asked["messages"]) if chat else asked["prompt"]
        wanted = int((re.findall(r"\d+", prompt) or ["8"])[-1])
        self.read = len(prompt.split())
        self.written = min(wanted, asked.get("max_tokens") or wanted)
        self.reason = "stop" if self.written == wanted else "length"
        self.options = asked.get("stream_options") or {}
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": asked["model"]}

    def usage(self, written: int) -> dict[str, int]:
        return {"prompt_tokens": self.read, "completion_tokens": written, "total_tokens": self.read + written}

    def choice(self, text: str, reason: str | None, part: str = "message") -> dict[str, Any]:
        said = {part: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": 0, **said, "finish_reason": reason}

    async def words(self) -> AsyncIterator[str]:
        for word in islice(cycle(WORDS), self.written):
            await asyncio.sleep(PACE_S)
            yield word + " "

    async def events(self) -> AsyncIterator[bytes]:
        head = self.head | ({"object": "chat.completion.chunk"} if self.chat else {})
        done = 0
        try:
            async for word in self.words():
                done += 1
                usage = {"usage": self.usage(done)} if self.options.get("continuous_usage_stats") else {}
                yield event({**head, "choices": [self.choice(word, None, "delta")], **usage})
            yield event({**head, "choices": [self.choice("", self.reason, "delta")]})
            if self.options.get("include_usage"):
                yield event({**head, "choices": [], "usage": self.usage(done)})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:  # A real server stops its engine here.
            print(f"the caller has left; tokens written: {done}", flush=True)
            raise


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "demo", "object": "model", "owned_by": "examples"}]})


async def chat(request: Request) -> Response:
    return await answered(request, chat=True)


async def completion(request: Request) -> Response:
    return await answered(request, chat=False)


async def answered(request: Request, *, chat: bool) -> Response:
    asked = await request.json()
    answer = Answer(asked, chat=chat)
    if asked.get("stream"):
        return StreamingResponse(answer.events(), media_type="text/event-stream")
    text = "".join([word async for word in answer.words()])
    choices, usage = [answer.choice(text, answer.reason)], answer.usage(answer.written)
    return JSONResponse({**answer.head, "choices": choices, "usage": usage})


app = Starlette(
    routes=[
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]
)
app.add_middleware(EntitlementMiddleware)  # As vLLM does with what --middleware names.
