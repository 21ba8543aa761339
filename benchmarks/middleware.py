"""What EntitlementMiddleware adds to a chunk of a stream: the same answer with it and without, in one process, no I/O.

The meter is one that says yes, so this is the middleware's own work: cutting the stream into events, reading each,
counting it. What it tells its meter goes out in the background (see gateway.client.meter) and is not in the figure.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from statistics import median
from time import perf_counter_ns
from typing import Final, cast

import msgspec
import orjson

from gateway.client import Client, Reason, Signal
from gateway.integrations.asgi import Application, EntitlementMiddleware, Message, Receive, Send
from gateway.integrations.settings import Settings

CHUNKS: Final = 500
_PATH: Final = "/v1/chat/completions"
_BODY: Final = orjson.dumps(
    {
        "model": "gpt-4o",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "How long is a piece of string?"}],
    }
)
PROMPT: Final = 9  # tokens, as the usage says it
_HEADERS: Final = [(b"content-type", b"application/json"), (b"x-customer-id", b"c-0")]


class Found(msgspec.Struct, frozen=True):
    """Nanoseconds of a whole stream, pair by pair."""

    without: tuple[int, ...]
    with_it: tuple[int, ...]
    chunks: int
    told: int  # tokens, by the last stream that was metered

    @property
    def added_us(self) -> float:
        """A chunk, the median of differences between neighbours."""
        return median(more - less for less, more in zip(self.without, self.with_it, strict=True)) / self.chunks / 1e3


class SilentMeter:
    """Grants everything, and counts it."""

    hold = "bench"
    allowed = True
    signal = Signal.CONTINUE
    reason = Reason.NONE
    units_left = 1 << 40
    uncharged = ()

    def __init__(self) -> None:
        self.units = 0

    def use(self, feature: str, quantity: int, dimensions: Mapping[str, str] | None = None) -> None:
        self.units += quantity

    def expect(self, *due: object) -> None: ...

    async def room(self) -> None: ...

    async def end(self) -> None: ...


class SilentClient:
    """Opens such meters."""

    def __init__(self) -> None:
        self.meter = SilentMeter()

    async def start(self) -> None: ...

    async def open_meter(self, customer: str, **asked: object) -> SilentMeter:
        self.meter = SilentMeter()
        return self.meter


class Server:
    """Writes a chunk a token, as one of the OpenAI API does, each in a send of its own."""

    def __init__(self, chunks: int) -> None:
        self._events = [_event({**_HEAD, "choices": [_choice(number)]}) for number in range(chunks)]
        usage = {"prompt_tokens": PROMPT, "completion_tokens": chunks, "total_tokens": PROMPT + chunks}
        self._usage = _event({**_HEAD, "choices": [], "usage": usage})

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": self._usage, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


_HEAD: Final = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}


def _choice(number: int) -> Mapping[str, object]:
    return {"index": 0, "delta": {"content": f" word{number % 10}"}, "finish_reason": None}


def _event(data: Mapping[str, object]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def measure(pairs: int, chunks: int = CHUNKS) -> Found:
    """A B, B A, ... after two pairs that are not counted."""
    server, client = Server(chunks), SilentClient()
    metered = EntitlementMiddleware(server, Settings(), client=cast("Client", client))
    without: list[int] = []
    with_it: list[int] = []
    for number in range(pairs + 2):
        order: list[tuple[Application, list[int]]] = [(server, without), (metered, with_it)]
        for app, times in order if number % 2 == 0 else reversed(order):
            times.append(await _timed(app, chunks))
    return Found(tuple(without[2:]), tuple(with_it[2:]), chunks, client.meter.units)


async def _timed(app: Application, chunks: int) -> int:
    """Nanoseconds of one answer. RuntimeError: not every chunk came."""
    came = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": _BODY, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal came
        came += 1

    gc.collect()
    began = perf_counter_ns()
    await app({"type": "http", "method": "POST", "path": _PATH, "headers": list(_HEADERS)}, receive, send)
    took = perf_counter_ns() - began
    await asyncio.sleep(0)  # What the middleware has left to do for its bill.
    if came != chunks + 3:
        raise RuntimeError(f"of {chunks} chunks with a head, a usage and an end, {came} messages came")
    return took
