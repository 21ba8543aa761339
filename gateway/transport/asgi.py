"""gRPC over ASGI: serves grpcio-style servicers wherever an ASGI server gives HTTP/2 and trailers.

Servicers register as on a grpc.aio server (`add_X_to_server(servicer, app)`). Unary, server, client and bidirectional
streams; deadlines; cancellation when the peer goes away; gzip; limits on a message and on all that is unfinished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

import grpc
import structlog

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
        context = Context(headers, scope.get("client"), receive, send)
        handler = self._methods.get(scope["path"]) or self.find(scope["path"], headers)
        problem = self._begin(context, timeout)
        self.in_flight += 1
        try:
            if self.in_flight > self._max_calls:
                context.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_calls} calls are open, the limit")
                await context.finish()
            elif handler is None:
                context.fail(grpc.StatusCode.UNIMPLEMENTED, f"method {scope['path'][:200]} is not known here")
                await context.finish()
            elif encoding not in (None, b"identity", b"gzip"):
                context.fail(grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding: expected identity or gzip")
                await context.finish()
            elif problem:
                context.fail(grpc.StatusCode.INVALID_ARGUMENT, problem)
                await context.finish()
            elif handler.unary_unary is not None:
                await self._unary(handler, context, send, gzip=encoding == b"gzip")
            else:
                await self._stream(handler, context, gzip=encoding == b"gzip")
        except PeerGone:
            pass  # Nobody is left to be told anything.
        finally:
            context.finished = True
            if context.tick and self._deadlines is not None:
                self._deadlines.forget(context.tick, context)
            for callback in context.callbacks:
                callback(context)
            self.in_flight -= 1

    def unforeseen(self, context: Context) -> None:
        """The last line of defence: counted and logged here, and nothing of it is told to the peer."""
        self.failures += 1
        _log.exception("call failed")
        context.fail(grpc.StatusCode.UNKNOWN, "internal error")

    def _begin(self, context: Context, timeout: bytes | None) -> str:
        """Notes the call's task and deadline. Answers what is wrong with the deadline, or nothing."""
        context.task = asyncio.current_task()
        deadlines = self._deadlines
        if deadlines is None:
            deadlines = self._deadlines = Deadlines(asyncio.get_running_loop(), self._due)
        now = deadlines.now()
        due = now + LOOK_EVERY_S
        if timeout is not None:
            try:
                context.deadline = now + parse_timeout(timeout.decode("latin-1"))
            except ValueError as error:
                return str(error)
            due = min(due, context.deadline)
        deadlines.at(due, context)
        return ""

    def _due(self, context: Context) -> None:
        """A call lasts: its deadline is here, or it is remembered; somebody looks whether its peer is still there."""
        deadlines, deadline = self._deadlines, context.deadline
        if context.finished or deadlines is None:
            return
        if deadline is not None and deadlines.now() >= deadline:
            context.expire()
            return
        if deadline is not None:
            context.tick = deadlines.at(deadline, context)
        context.slow = True
        if not context.reading:
            context.watcher = asyncio.create_task(look(context))

    async def _unary(self, handler: Handler, context: Context, send: Send, *, gzip: bool) -> None:
        """A unary call the short way: nothing is made that a decision does not need."""
        payload = await self._outcome(context, self._answer(handler, context, gzip=gzip))
        if payload is None:
            return
        context.finished = True
        if context.plain:
            try:
                await send(_START)
                await send({"type": "http.response.body", "body": frame(payload), "more_body": False})
                await send(_OK)
            except OSError:
                raise PeerGone from None
            return
        if not context.status:
            await context.write_bytes(payload)
        await context.finish()

    async def _answer(self, handler: Handler, context: Context, *, gzip: bool) -> bytes:
        event = await context.receive()
        body: bytes = event.get("body", b"")
        if event.get("more_body", False):
            body = await self.rest(body, context.receive)
        elif event["type"] == "http.disconnect":
            raise PeerGone
        context.reading = False
        if context.slow:
            context.watcher = asyncio.create_task(look(context))
        request = decoded(handler, only(body, self._limit, gzip=gzip))
        assert handler.unary_unary is not None
        return encoded(handler, await handler.unary_unary(request, context))  # type: ignore[arg-type]

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

    async def _stream(self, handler: Handler, context: Context, *, gzip: bool) -> None:
        inbox = Inbox(context, Frames(self._limit, gzip=gzip), self.room)
        context.watcher = asyncio.create_task(inbox.fill())
        context.messages = inbox.messages(handler)
        context.serialize = lambda message: encoded(handler, message)
        try:
            done = await self._outcome(context, converse(handler, context))
            if done is not None:
                if not context.status:
                    await context.start()
                await context.finish()
        finally:
            context.finished = True
            inbox.close()

    async def _outcome(self, context: Context, work: Coroutine[Any, Any, bytes]) -> bytes | None:
        """What the work answers, or None when the call has ended otherwise: with a status that is sent. Or PeerGone."""
        try:
            return await work
        except Aborted:
            pass
        except PeerGone:
            raise
        except BadFrame as error:
            too_large = grpc.StatusCode.RESOURCE_EXHAUSTED
            context.fail(too_large if error.oversized else grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if context.gone:
                raise PeerGone from None
            if context.expired:
                context.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")
            elif context.task is not None and context.task.cancelling():
                raise  # From outside.
            else:
                self.unforeseen(context)
        except NotImplementedError:  # What generated code raises for a method that a servicer lacks.
            context.fail(grpc.StatusCode.UNIMPLEMENTED, NOT_IMPLEMENTED)
        except Exception:
            self.unforeseen(context)
        await context.finish()
        return None


grpc.aio.Server.register(GrpcApp)  # Servicers register with either alike, and some ask which kind they have.


class _CallDetails(grpc.HandlerCallDetails):
    def __init__(self, path: str, headers: Headers) -> None:
        self.method = path
        self.invocation_metadata = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in headers)
