"""gRPC over ASGI: serves grpcio-style servicers wherever an ASGI server gives HTTP/2 and trailers.

Servicers register as on a grpc.aio server (`add_X_to_server(servicer, app)`). Unary, server, client and bidirectional
streams; deadlines; cancellation when the peer goes away; gzip; limits on a message and on all that is unfinished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from itertools import takewhile
from typing import Any

import grpc
import structlog

from entitlement.access import Credentials
from gateway.transport.asgi_context import CONTENT_TYPE, Aborted, Context, Event, Headers, PeerGone, Receive, Send
from gateway.transport.asgi_stream import (
    LOOK_EVERY_S,
    NOT_IMPLEMENTED,
    Handler,
    Inbox,
    converse,
    decoded,
    encoded,
    look,
)
from gateway.transport.deadlines import Deadlines
from gateway.transport.frames import PREFIX, BadFrame, Frames, Room, frame, only, parse_timeout

MAX_CALLS = 16_384  # at a time, streams too; beyond it RESOURCE_EXHAUSTED
MAX_MESSAGE_BYTES = 4_194_304
MAX_UNFINISHED_BYTES = 67_108_864  # of all requests that have not arrived whole or were not taken by their handlers
_START: Event = {"type": "http.response.start", "status": 200, "headers": [CONTENT_TYPE], "trailers": True}
_OK: Event = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}
_log = structlog.get_logger(__name__)


class GrpcApp:
    """Serves calls whose content type is application/grpc. Registration looks like a grpc server's."""

    def __init__(
        self,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_unfinished_bytes: int = MAX_UNFINISHED_BYTES,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self.in_flight = 0
        self.failures = 0  # calls that ended in an error nobody foresaw
        self.room = Room(max_unfinished_bytes)
        self._methods: dict[str, Handler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._limit = max_message_bytes
        self._max_calls = max_calls
        self._deadlines: Deadlines[Context] | None = None
        self._young: dict[Context, float] = {}  # not looked after yet: when they began, oldest first
        self._watching = False

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        self._methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._generic += handlers

    @property
    def full(self) -> str:
        """Why no call is taken now; empty: it is."""
        return f"{self._max_calls} calls are open, the limit" if self.in_flight >= self._max_calls else ""

    @staticmethod
    def credentials(context: Context) -> Credentials:
        """What came with a call."""
        return context.credentials()

    def find(self, path: str, headers: Headers) -> Handler | None:
        handler = self._methods.get(path)
        if handler is None:
            details = _CallDetails(path, headers)
            found = (generic.service(details) for generic in self._generic)
            handler = next((candidate for candidate in found if candidate is not None), None)
        return handler

    def serve(self, scope: Event, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """One call, from its first byte to its status. Never raises but for cancellation from outside."""
        headers: Headers = scope["headers"]
        path: str = scope["path"]
        timeout = encoding = None
        for name, value in headers:
            if name == b"grpc-timeout":
                timeout = value
            elif name == b"grpc-encoding":
                encoding = value
        context = Context(scope, receive, send)
        handler = self._methods.get(path) or self.find(path, headers)
        if self.in_flight >= self._max_calls:
            context.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, self.full)
        elif handler is None:
            context.fail(grpc.StatusCode.UNIMPLEMENTED, f"method {path[:200]} is not known here")
        elif encoding not in (None, b"identity", b"gzip"):
            context.fail(grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding: expected identity or gzip")
        elif handler.unary_unary is not None:
            return self._unary(handler, context, timeout, gzip=encoding == b"gzip")
        else:
            return self._stream(handler, context, timeout, gzip=encoding == b"gzip")
        return self._refuse(context)

    def unforeseen(self, context: Context) -> None:
        """The last line of defence: counted and logged here, and nothing of it is told to the peer."""
        self.failures += 1
        _log.exception("call failed")
        context.fail(grpc.StatusCode.UNKNOWN, "internal error")

    def _begin(self, context: Context, wanted: bytes | None) -> None:
        """Notes the call, its task and the deadline that it wanted. Raises Aborted for a deadline that is none."""
        self.in_flight += 1
        context.task = asyncio.current_task()
        deadlines = self._deadlines
        if deadlines is None:
            deadlines = self._deadlines = Deadlines(asyncio.get_running_loop(), self._due)
        now = self._young[context] = deadlines.now()
        if not self._watching:
            self._watching = True
            asyncio.get_running_loop().call_at(now + LOOK_EVERY_S, self._look)
        if wanted is not None:
            try:
                context.deadline = now + parse_timeout(wanted)
            except ValueError as error:
                context.fail(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                raise Aborted from None
            if context.deadline < now + LOOK_EVERY_S:
                context.tick = deadlines.at(context.deadline, context)

    def _look(self) -> None:
        """Most calls have ended before they are as old as this: only those that last are looked after one by one."""
        assert self._deadlines is not None
        oldest = self._deadlines.now() - LOOK_EVERY_S
        for context in [context for context, began in takewhile(lambda young: young[1] <= oldest, self._young.items())]:
            del self._young[context]
            self._lasts(context)
        self._watching = bool(self._young)
        if self._watching:
            asyncio.get_running_loop().call_at(next(iter(self._young.values())) + LOOK_EVERY_S, self._look)

    def _end(self, context: Context) -> None:
        context.finished = True
        self._young.pop(context, None)
        if context.tick and self._deadlines is not None:
            self._deadlines.forget(context.tick, context)
        for callback in context.callbacks:
            callback(context)
        self.in_flight -= 1

    async def _refuse(self, context: Context) -> None:
        with suppress(PeerGone):  # Then nobody is left to be told anything.
            await context.finish()

    def _due(self, context: Context) -> None:
        context.tick = 0
        context.expire()

    def _lasts(self, context: Context) -> None:
        """A call takes long: its deadline is remembered, and somebody looks whether its peer is still there."""
        if context.finished:
            return
        if context.deadline is not None and not context.tick:
            assert self._deadlines is not None
            context.tick = self._deadlines.at(context.deadline, context)
        context.slow = True
        if not context.reading:
            context.watcher = asyncio.create_task(look(context))

    async def _unary(self, handler: Handler, context: Context, wanted: bytes | None, *, gzip: bool) -> None:
        """A unary call the short way: nothing is made that a decision does not need, and no coroutine but this."""
        try:
            self._begin(context, wanted)
            event = await context.receive()
            body: bytes = event.get("body", b"")
            if event.get("more_body", False):
                body = await self.rest(body, context.receive)
            elif event["type"] == "http.disconnect":
                return
            context.reading = False
            if context.slow:
                context.watcher = asyncio.create_task(look(context))
            request = decoded(handler, only(body, self._limit, gzip=gzip))
            assert handler.unary_unary is not None
            answer = encoded(handler, await handler.unary_unary(request, context))  # type: ignore[arg-type]
            context.finished = True
            if context.plain:
                await _answer(context.raw_send, answer)
            else:
                if not context.status:
                    await context.write_bytes(answer)
                await context.finish()
        except BaseException as error:
            await self._failed(context, error)
        finally:
            self._end(context)

    async def rest(self, first: bytes, receive: Receive) -> bytes:
        """The body that began with `first`, or as much of it as shows that it is too large.

        Raises BadFrame when too much is unfinished already, PeerGone when the rest will not come.
        """
        body = bytearray(first)
        taken, more = len(first), True
        try:
            self.room.take(taken)
            while more and len(body) <= self._limit + PREFIX:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise PeerGone
                part: bytes = event.get("body", b"")
                body += part
                taken += len(part)
                self.room.take(len(part))
                more = event.get("more_body", False)
        finally:
            self.room.give(taken)
        return bytes(body)

    async def _stream(self, handler: Handler, context: Context, wanted: bytes | None, *, gzip: bool) -> None:
        inbox = Inbox(context, Frames(self._limit, gzip=gzip), self.room)
        try:
            self._begin(context, wanted)
            context.watcher = asyncio.create_task(inbox.fill())
            context.messages = inbox.messages(handler)
            context.serialize = lambda message: encoded(handler, message)
            await converse(handler, context)
            if not context.status:
                await context.start()
            await context.finish()
        except BaseException as error:
            await self._failed(context, error)
        finally:
            self._end(context)
            inbox.close()

    async def _failed(self, context: Context, error: BaseException) -> None:
        """Tells the peer how the call ended, if there is one. Raises what is not the call's own affair."""
        if isinstance(error, PeerGone):
            return
        if isinstance(error, asyncio.CancelledError):
            if context.gone:
                return
            if context.expired:
                context.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")
            elif context.task is not None and context.task.cancelling():
                raise error  # From outside.
            else:
                self.unforeseen(context)
        elif isinstance(error, BadFrame):
            too_large = grpc.StatusCode.RESOURCE_EXHAUSTED
            context.fail(too_large if error.oversized else grpc.StatusCode.INVALID_ARGUMENT, str(error))
        elif isinstance(error, NotImplementedError):  # What generated code raises for a method that a servicer lacks.
            context.fail(grpc.StatusCode.UNIMPLEMENTED, NOT_IMPLEMENTED)
        elif isinstance(error, Exception):
            if not isinstance(error, Aborted):
                self.unforeseen(context)
        else:
            raise error
        await self._refuse(context)


async def _answer(send: Send, message: bytes) -> None:
    """The whole of a plain answer."""
    try:
        await send(_START)
        await send({"type": "http.response.body", "body": frame(message), "more_body": False})
        await send(_OK)
    except OSError:
        pass  # What ASGI servers raise when the peer has gone: nobody is left to be told anything.


grpc.aio.Server.register(GrpcApp)  # Servicers register with either alike, and some ask which kind they have.


class _CallDetails(grpc.HandlerCallDetails):
    def __init__(self, path: str, headers: Headers) -> None:
        self.method = path
        self.invocation_metadata = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in headers)
