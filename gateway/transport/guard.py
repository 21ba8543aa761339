"""Stands between grpcio and the servicers.

grpcio would tell callers an exception's class and text, and inflate a compressed message to whatever size.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import structlog

from entitlement.access import Credentials
from gateway.transport.asgi_stream import NOT_IMPLEMENTED, Handler, decoded
from gateway.transport.frames import BadFrame, unpack
from gateway.transport.inflight import InFlight

MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {  # by request and response streaming
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_Context = grpc.aio.ServicerContext[Any, Any]
_Result = TypeVar("_Result")
_END = object()
_GZIP = b"\x1f\x8b\x08"  # how gzip begins and no protobuf message can: its wire type is none
_log = structlog.get_logger(__name__)


class GuardedServer:
    """Registers servicers with a grpc.aio server. What fails unforeseen is UNKNOWN, and counted and logged here."""

    def __init__(self, server: grpc.aio.Server, max_message_bytes: int) -> None:
        self.failures = 0
        self.in_flight = InFlight()
        self._server = server
        self._limit = max_message_bytes

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        guarded = {name: self.guard(handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, guarded)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_Generic(self, handler) for handler in handlers])

    @staticmethod
    def credentials(context: _Context) -> Credentials:
        """What came with a call."""
        sent = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        shown = (context.auth_context() or {}).get("peer_uri", ())
        return Credentials([f"{value!s}" for value in sent], [uri.decode("latin-1") for uri in shown])

    def guard(self, handler: Handler) -> Handler:
        """The same method; its requests are decoded where an error can be told as what it is."""
        behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        streaming = handler.request_streaming

        def decode(message: bytes) -> object:
            if message.startswith(_GZIP):
                message = unpack(1, message, self._limit, gzip=True)
            return decoded(handler, message)

        async def begin(request: Any, context: _Context) -> Any:
            return behavior(request if streaming else decode(request), context)

        async def run(request: Any, context: _Context) -> Any:
            return await behavior(request if streaming else decode(request), context)

        async def answer(request: Any, context: _Context) -> Any:
            await self.in_flight.enter(context)
            return await self._guarded(context, run(request, context))

        async def answers(request: Any, context: _Context) -> AsyncIterator[Any]:
            await self.in_flight.enter(context)
            async with aclosing(await self._guarded(context, begin(request, context))) as found:
                while (message := await self._guarded(context, anext(found, _END))) is not _END:
                    yield message

        make = MAKERS[streaming, handler.response_streaming]
        wrapped = answers if inspect.isasyncgenfunction(behavior) else answer
        return make(wrapped, decode if streaming else None, handler.response_serializer)

    async def _guarded(self, context: _Context, work: Awaitable[_Result]) -> _Result:
        try:
            return await self._told(context, work)
        except grpc.aio.InternalError:  # What was to be sent cannot be: the caller has gone, and nobody has failed.
            raise asyncio.CancelledError from None

    async def _told(self, context: _Context, work: Awaitable[_Result]) -> _Result:
        """What `work` returns; its error is told to the caller."""
        try:
            return await work
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise
        except BadFrame as error:
            too_large = grpc.StatusCode.RESOURCE_EXHAUSTED
            await context.abort(too_large if error.oversized else grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except NotImplementedError:  # What generated code raises for a method that a servicer lacks.
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, NOT_IMPLEMENTED)
        except Exception:
            self.failures += 1
            _log.exception("call failed")
            await context.abort(grpc.StatusCode.UNKNOWN, "internal error")
        raise AssertionError("abort returns never")


grpc.aio.Server.register(GuardedServer)


class _Generic(grpc.GenericRpcHandler):
    def __init__(self, server: GuardedServer, handlers: grpc.GenericRpcHandler) -> None:
        self._server = server
        self._handlers = handlers
        self._made: dict[str, Handler] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Handler | None:
        handler = self._made.get(details.method)
        if handler is None and (found := self._handlers.service(details)) is not None:
            handler = self._made[details.method] = self._server.guard(found)
        return handler
