"""An empty handler in the project's own gRPC codec, for Envoy to host: bytes in, nothing out."""

from __future__ import annotations

import gc

import grpc

from gateway.transport.asgi import GrpcApp
from gateway.transport.asgi_context import Event, Receive, Send

SERVICE, METHOD = "entitlement.v1.EntitlementGateway", "CheckAndConsume"
_doors = GrpcApp()


async def answer(request: bytes, context: object) -> bytes:
    return b""


_doors.add_registered_method_handlers(SERVICE, {METHOD: grpc.unary_unary_rpc_method_handler(answer)})


async def app(scope: Event, receive: Receive, send: Send) -> None:
    if scope["type"] != "lifespan":
        await _doors.serve(scope, receive, send)
        return
    await receive()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
