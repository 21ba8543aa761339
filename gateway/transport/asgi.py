"""gRPC over ASGI: serves grpcio-style servicers wherever an ASGI server gives HTTP/2 and trailers.

Servicers register as on a grpc.aio server (`add_X_to_server(servicer, app)`). Unary, server, client and bidirectional
streams; deadlines; cancellation when the peer goes away; gzip; message limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from gateway.transport.asgi_context import CONTENT_TYPE, Aborted, Context, Event, Headers, Receive, Send
from gateway.transport.deadlines import Deadlines
from gateway.transport.frames import PREFIX, BadFrame, Frames, frame, parse_timeout, unpack

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

LOOK_EVERY_S = 0.05  # how often a call that takes long looks whether its peer is still there
MAX_QUEUED = 16  # requests of a stream that were read and not yet taken: then reading waits
MAX_MESSAGE_BYTES = 4_194_304
_START: Event = {"type": "http.response.start", "status": 200, "headers": [CONTENT_TYPE], "trailers": True}
_OK: Event = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}
_log = structlog.get_logger(__name__)


class GrpcApp:
    """Serves calls whose content type is application/grpc. Registration looks like a grpc server's."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.in_flight = 0
        self.failures = 0  # calls that ended in an error nobody foresaw
        self._methods: dict[str, Handler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._limit = max_message_bytes
        self._deadlines: Deadlines | None = None

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        self._methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._generic += handlers

    def find(self, path: str, headers: Headers) -> Handler | None:
        handler = self._methods.get(path)
        if handler is None:
            details = _CallDetails(path, headers)
            found = (generic.service(details) for generic in self._generic)
            handler = next((candidate for candidate in found if candidate is not None), None)
        return handler

    async def serve(self, scope: Event, receive: Receive, send: Send) -> None:
        """One call, from its first byte to its status. Never raises but for cancellation from outside."""
        headers: Headers = scope["headers"]
        timeout = encoding = None
        for name, value in headers:
            if name == b"grpc-timeout":
                timeout = value
            elif name == b"grpc-encoding":
                encoding = value
        client = scope.get("client")
        context = Context(headers, f"{client[0]}:{client[1]}" if client else "unix:", send)
        handler = self._methods.get(scope["path"]) or self.find(scope["path"], headers)
        problem = self._prepare(context, timeout)
        self.in_flight += 1
        try:
            if handler is None:
                context.fail(grpc.StatusCode.UNIMPLEMENTED, f"method {scope['path'][:200]} is not known here")
                await context.finish()
            elif encoding not in (None, b"identity", b"gzip"):
                context.fail(grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding: expected identity or gzip")
                await context.finish()
            elif problem:
                context.fail(grpc.StatusCode.INVALID_ARGUMENT, problem)
                await context.finish()
            elif handler.unary_unary is not None:
                await self._unary(handler, context, receive, send, gzip=encoding == b"gzip")
            else:
                await self._stream(handler, context, receive, gzip=encoding == b"gzip")
        finally:
            context.finished = True
            if context.watcher is not None:
                context.watcher.cancel()
            self.in_flight -= 1

    def _prepare(self, context: Context, timeout: bytes | None) -> str:
        """Notes the call's task and deadline. Answers what is wrong with the deadline, or nothing."""
        context.task = asyncio.current_task()
        if timeout is None:
            return ""
        try:
            seconds = parse_timeout(timeout.decode("latin-1"))
        except ValueError as error:
            return str(error)
        deadlines = self._clock()
        context.deadline = deadlines.now() + seconds
        deadlines.at(context.deadline, lambda: _expire(context))
        return ""

    def _clock(self) -> Deadlines:
        if self._deadlines is None:
            self._deadlines = Deadlines(asyncio.get_running_loop())
        return self._deadlines

    async def _unary(self, handler: Handler, context: Context, receive: Receive, send: Send, *, gzip: bool) -> None:
        """A unary call the short way: nothing is made that a decision does not need."""
        event = await receive()
        data: bytes = event.get("body", b"")
        while event.get("more_body", False) and len(data) <= self._limit + PREFIX:
            event = await receive()
            data += event.get("body", b"")
        if event["type"] == "http.disconnect":
            return
        look = self._clock()
        look.at(look.now() + LOOK_EVERY_S, lambda: _watch(context, receive))
        payload = await self._outcome(context, self._answer(handler, context, data, gzip=gzip))
        if payload is None:
            return
        context.finished = True
        if context.plain:
            await send(_START)
            await send({"type": "http.response.body", "body": frame(payload), "more_body": False})
            await send(_OK)
            return
        if not context.status:
            await context.write_bytes(payload)
        await context.finish()

    async def _answer(self, handler: Handler, context: Context, data: bytes, *, gzip: bool) -> bytes:
        assert handler.unary_unary is not None
        response = await handler.unary_unary(_decoded(handler, self._only(data, gzip=gzip)), context)  # type: ignore[arg-type]
        return _encoded(handler, response)

    def _only(self, data: bytes, *, gzip: bool) -> bytes:
        """The single message of a unary request's body."""
        if len(data) < PREFIX:
            raise BadFrame("the body ended in the middle of a message" if data else "the body holds no message")
        size = int.from_bytes(data[1:PREFIX], "big")
        if size > self._limit:
            raise BadFrame(f"message has {size} bytes; the limit is {self._limit}", oversized=True)
        if len(data) != PREFIX + size:
            raise BadFrame(f"the message's prefix says {size} bytes; the body has {len(data) - PREFIX}")
        return unpack(data[0], data[PREFIX:], self._limit, gzip=gzip)

    async def _stream(self, handler: Handler, context: Context, receive: Receive, *, gzip: bool) -> None:
        requests: asyncio.Queue[object] = asyncio.Queue(MAX_QUEUED)
        frames = Frames(self._limit, gzip=gzip)
        pump = asyncio.create_task(_pump(handler, context, receive, frames, requests))
        context.messages = _taken(requests)
        context.serialize = lambda message: _encoded(handler, message)
        try:
            done = await self._outcome(context, _converse(handler, context))
            if done is not None:
                if not context.status:
                    await context.start()
                await context.finish()
        finally:
            pump.cancel()

    async def _outcome(self, context: Context, work: Coroutine[Any, Any, bytes]) -> bytes | None:
        """What the work answers, or None when the call has ended otherwise: its status is sent, or its peer is gone."""
        try:
            return await work
        except Aborted:
            pass
        except BadFrame as error:
            too_large = grpc.StatusCode.RESOURCE_EXHAUSTED
            context.fail(too_large if error.oversized else grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if not context.expired and not context.gone:
                raise
            if context.gone:
                context.finished = True
                return None
            context.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")
        except Exception:
            # The last line of defence: counted and logged here, and nothing of it is told to the peer.
            self.failures += 1
            _log.exception("call failed")
            context.fail(grpc.StatusCode.UNKNOWN, "internal error")
        await context.finish()
        return None


class _CallDetails(grpc.HandlerCallDetails):
    def __init__(self, path: str, headers: Headers) -> None:
        self.method = path
        self.invocation_metadata = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in headers)


async def _converse(handler: Handler, context: Context) -> bytes:
    """Runs a handler with a stream on either side."""
    assert context.messages is not None
    if handler.request_streaming:
        request: Any = context.messages
    else:
        request = await anext(context.messages, None)
        if request is None:
            raise BadFrame("the body holds no message")
    if not handler.response_streaming:
        assert handler.stream_unary is not None
        await context.write(await handler.stream_unary(request, context))  # type: ignore[arg-type]
        return b""
    behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
    assert behavior is not None
    answers: Any = behavior(request, context)  # type: ignore[arg-type]
    if isinstance(answers, AsyncIterator):
        async for answer in answers:
            await context.write(answer)
    else:
        await answers  # Writes by itself, with context.write.
    return b""


async def _pump(
    handler: Handler, context: Context, receive: Receive, frames: Frames, requests: asyncio.Queue[object]
) -> None:
    """Reads the body into the queue until it ends, then looks whether the peer is still there."""
    try:
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                _leave(context)
                return
            for message in frames.feed(event.get("body", b"")):
                await requests.put(_decoded(handler, message))
            more = event.get("more_body", False)
        frames.end()
        await requests.put(None)
        await _look(context, receive)
    except BadFrame as error:
        await requests.put(error)


async def _taken(requests: asyncio.Queue[object]) -> AsyncIterator[object]:
    while (request := await requests.get()) is not None:
        if isinstance(request, BadFrame):
            raise request
        yield request


def _watch(context: Context, receive: Receive) -> None:
    """A unary call takes long: from now on somebody looks whether its peer is still there."""
    if not context.finished:
        watcher = asyncio.create_task(_look(context, receive))
        context.watcher = watcher


async def _look(context: Context, receive: Receive) -> None:
    """ASGI servers differ: some answer an ended body with a wait for the disconnect, some at once with nothing."""
    while not context.finished:
        event = await receive()
        if event["type"] == "http.disconnect":
            _leave(context)
            return
        await asyncio.sleep(LOOK_EVERY_S)


def _leave(context: Context) -> None:
    if not context.finished:
        context.gone = True
        context.end_task()


def _expire(context: Context) -> None:
    if not context.finished:
        context.expired = True
        context.end_task()


def _decoded(handler: Handler, message: bytes) -> object:
    if handler.request_deserializer is None:
        return message
    try:
        return handler.request_deserializer(message)
    except (DecodeError, ValueError):
        raise BadFrame("request: does not decode as the method's message") from None


def _encoded(handler: Handler, response: object) -> bytes:
    return response if handler.response_serializer is None else handler.response_serializer(response)  # type: ignore[return-value]
