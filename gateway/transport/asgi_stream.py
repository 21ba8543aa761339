"""A call with a stream on either side: its requests are read ahead, within bounds, while its handler works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from gateway.transport.asgi_context import Context
from gateway.transport.frames import BadFrame, Frames, Room

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

NOT_IMPLEMENTED = "the method is not implemented"
LOOK_EVERY_S = 0.05  # how often a call that takes long looks whether its peer is still there
READ_AHEAD_BYTES = 65_536  # that were read and not yet taken by the handler: then reading waits


class Inbox:
    """Requests between the reader of the body and the handler."""

    def __init__(self, context: Context, frames: Frames, room: Room) -> None:
        self._context = context
        self._frames = frames
        self._room = room
        self._taken = 0  # of the room, by this call
        self._messages: list[bytes] = []
        self._end: Exception | None = None
        self._news = asyncio.Event()
        self._emptied = asyncio.Event()

    async def fill(self) -> None:
        """Reads the body until it ends, then looks whether the peer is still there, until the call has ended."""
        context = self._context
        more = True
        try:
            while more and not context.finished:
                event = await context.receive()
                if event["type"] == "http.disconnect":
                    context.leave()
                    return
                self._add(event.get("body", b""))
                more = event.get("more_body", False)
                while self._taken > READ_AHEAD_BYTES and self._messages and not context.finished:
                    self._emptied.clear()
                    await self._emptied.wait()
            self._frames.end()
        except BadFrame as error:
            self._end = error
        else:
            self._end = StopAsyncIteration()
        self._news.set()
        await look(context)

    def _add(self, data: bytes) -> None:
        if data and not self._context.finished:
            self._taken += len(data)
            self._room.take(len(data))
            self._messages += self._frames.feed(data)
            self._news.set()

    async def messages(self, handler: Handler) -> AsyncIterator[object]:
        """The requests, decoded. Raises BadFrame where the peer broke off or broke the framing."""
        while True:
            await self._news.wait()
            self._news.clear()
            messages, self._messages = self._messages, []
            self._give(self._taken - self._frames.held)
            for message in messages:
                yield decoded(handler, message)
            if self._end is not None and not self._messages:
                if isinstance(self._end, BadFrame):
                    raise self._end
                return

    def close(self) -> None:
        """The call has ended: nobody takes anything any more."""
        self._messages.clear()
        self._give(self._taken)

    def _give(self, count: int) -> None:
        self._taken -= count
        self._room.give(count)
        self._emptied.set()


async def converse(handler: Handler, context: Context) -> bytes:
    """Runs a handler with a stream on either side; the answer is what nobody waits for."""
    assert context.messages is not None
    if handler.request_streaming:
        request: Any = context.messages
    else:
        request = await anext(context.messages, None)
        if request is None:
            raise BadFrame("the body holds no message")
        if await anext(context.messages, None) is not None:
            raise BadFrame("the body holds more than one message")
    if not handler.response_streaming:
        assert handler.stream_unary is not None
        await context.write(await handler.stream_unary(request, context))  # type: ignore[arg-type]
        return b""
    behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
    assert behavior is not None
    answers: Any = behavior(request, context)  # type: ignore[arg-type]
    if isinstance(answers, AsyncGenerator):
        async with aclosing(answers):  # What it holds is let go now, not when the collector finds it.
            await _write(answers, context)
    elif isinstance(answers, AsyncIterator):
        await _write(answers, context)
    else:
        await answers  # Writes by itself, with context.write.
    return b""


async def _write(answers: AsyncIterator[object], context: Context) -> None:
    async for answer in answers:
        await context.write(answer)


async def look(context: Context) -> None:
    """ASGI servers differ: some answer an ended body with a wait for the disconnect, some at once with nothing.

    Ends by itself soon after the call: a server may not like that somebody stops waiting for it.
    """
    while not context.finished:
        event = await context.receive()
        if event["type"] == "http.disconnect":
            context.leave()
            return
        await asyncio.sleep(LOOK_EVERY_S)


def decoded(handler: Handler, message: bytes) -> object:
    if handler.request_deserializer is None:
        return message
    try:
        return handler.request_deserializer(message)
    except (DecodeError, ValueError):
        raise BadFrame("request: does not decode as the method's message") from None


def encoded(handler: Handler, response: object) -> bytes:
    return response if handler.response_serializer is None else handler.response_serializer(response)  # type: ignore[return-value]
