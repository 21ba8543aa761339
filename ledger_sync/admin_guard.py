"""Stands between grpcio and the servicer.

grpcio would tell callers a decoder's exception, and inflate a compressed message to whatever size.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

NO_MESSAGE: Final = "request: does not decode as the method's message"
_GZIP: Final = b"\x1f\x8b\x08"  # how gzip begins and no protobuf message can: its wire type is none
_WINDOW_BITS: Final = 31  # zlib's, for a gzip header and trailer


class GuardedServer:
    """Registers servicers of unary methods with a grpc.aio server that leaves messages as they come."""

    def __init__(self, server: grpc.aio.Server, max_message_bytes: int) -> None:
        self._server = server
        self._limit = max_message_bytes

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """The methods are registered, below: that way they are found first."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        guarded = {name: self._guard(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))
        self._server.add_registered_method_handlers(service, guarded)

    def _guard(self, handler: Handler) -> Handler:
        decode: Callable[[bytes], object] | None = handler.request_deserializer
        behavior: Callable[[object, Context], Awaitable[Any]] | None = handler.unary_unary  # type: ignore[assignment]
        assert decode is not None and behavior is not None

        async def answer(message: bytes, context: Context) -> Any:
            if message.startswith(_GZIP):
                message = await self._inflated(message, context)
            try:
                request = decode(message)
            except (DecodeError, ValueError):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            return await behavior(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, None, handler.response_serializer)

    async def _inflated(self, message: bytes, context: Context) -> bytes:
        """A compressed message, whole, and no larger than one may be."""
        unpacker = zlib.decompressobj(wbits=_WINDOW_BITS)
        try:
            whole = unpacker.decompress(message, self._limit + 1)
        except zlib.error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "gzip message does not inflate")
        if len(whole) > self._limit:
            problem = f"message inflates to more than the limit of {self._limit} bytes"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        if not unpacker.eof or unpacker.unused_data:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "gzip message does not inflate")
        return whole


grpc.aio.Server.register(GuardedServer)
