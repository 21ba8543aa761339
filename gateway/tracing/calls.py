"""A server span for each call, whichever transport it came over: child of the span that its caller names."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Final, TypeAlias

import grpc
from opentelemetry.context import attach, detach
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from entitlement.span_contexts import inside, of_metadata
from gateway.tracing import Handlers

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_MAKERS: Final[dict[tuple[bool, bool], Callable[..., _Handler]]] = {  # by request and response streaming
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
# Statuses that are the server's own fault: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
_FAULTS: Final = frozenset(
    getattr(grpc.StatusCode, name).value[0]
    for name in ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)


class TracedHandlers:
    """Wraps the methods of one service."""

    def __init__(self, service: str, tracer: Tracer) -> None:
        self._service = service
        self._tracer = tracer

    def wrapped(self, handlers: Handlers) -> Handlers:
        return {name: self._wrap(name, handler) for name, handler in handlers.items()}

    def _wrap(self, name: str, handler: _Handler) -> _Handler:
        behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def answer(request: Any, context: Any) -> Any:
            with self._serving(name, context) as span:
                token = attach(set_span_in_context(span))
                try:
                    return await behavior(request, context)
                finally:
                    detach(token)

        async def answers(request: Any, context: Any) -> AsyncIterator[Any]:
            """It looks again and again: what it asks the hot store for is not told of."""
            with self._serving(name, context):
                async with aclosing(behavior(request, context)) as found:
                    async for message in found:
                        yield message

        make = _MAKERS[bool(handler.request_streaming), bool(handler.response_streaming)]
        made = answers if inspect.isasyncgenfunction(behavior) else answer
        return make(made, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _serving(self, name: str, context: Any) -> Iterator[Span]:
        parent = inside(of_metadata(context.invocation_metadata() or ()))
        span = self._tracer.start_span(f"{self._service}/{name}", parent, SpanKind.SERVER)
        span.set_attributes({"rpc.system": "grpc", "rpc.service": self._service, "rpc.method": name})
        status = 0
        try:
            yield span
            status = _status(context)
        except (asyncio.CancelledError, GeneratorExit):  # Its caller has gone, or its deadline has passed.
            status = grpc.StatusCode.CANCELLED.value[0]
            raise
        except BaseException:  # An abort, which has said which status it is; or nobody foresaw it, which is UNKNOWN.
            status = _status(context) or grpc.StatusCode.UNKNOWN.value[0]
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", status)
            if status in _FAULTS:
                span.set_status(Status(StatusCode.ERROR))
            span.end()


def _status(context: Any) -> int:
    code = context.code()
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)
