"""The probe as the ASGI application that Envoy hosts."""

from __future__ import annotations

from gateway import telemetry
from gateway.transport.asgi import GrpcApp
from gateway.transport.asgi_context import Event, Receive, Send
from tests.integration.interop.service import Probe


async def app(scope: Event, receive: Receive, send: Send) -> None:
    if scope["type"] != "lifespan":
        await scope["state"]["probe"].serve(scope, receive, send)
        return
    await receive()
    telemetry.configure("error")
    grpc_app = GrpcApp()
    grpc_app.add_generic_rpc_handlers([Probe().handler()])
    scope["state"]["probe"] = grpc_app
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
