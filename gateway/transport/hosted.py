"""The ASGI application that Envoy hosts: `gateway.transport.hosted:app`, configured by ENTITLEMENT_GATEWAY_*.

Envoy runs an event loop for each listener. Each has a core of its own, from its lifespan's startup to its shutdown,
kept in the lifespan's state, which every call of that listener sees.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from entitlement.errors import EntitlementError
from gateway import telemetry
from gateway.frontdoor.forward import Door
from gateway.process import Core
from gateway.settings import Settings, load
from gateway.transport.asgi import GrpcApp
from gateway.transport.asgi_context import Event, Receive, Send
from gateway.transport.asgi_json import JsonApp
from gateway.transport.envoy import DRAIN_FD


class Doors:
    """gRPC and JSON on one port, before one core."""

    def __init__(self, settings: Settings) -> None:
        calls = GrpcApp(settings.max_message_bytes)
        self.core = Core(settings, lambda: calls.failures)
        self.core.servicers.register(calls)
        self.grpc: Door = calls
        self.json: Door = JsonApp(calls, settings.max_message_bytes)
        front = self.core.servicers.front
        if front is not None and front.forward is not None:  # Before both: its callers pass on any content type.
            self.grpc, self.json = front.forward.before(self.grpc), front.forward.before(self.json)


async def app(scope: Event, receive: Receive, send: Send) -> None:
    """Sends each call to its door by its content type."""
    if scope["type"] == "lifespan":
        await _live(scope, receive, send)
        return
    doors: Doors = scope["state"]["doors"]
    for name, value in scope["headers"]:
        if name == b"content-type" and _is_grpc(value):
            await doors.grpc.serve(scope, receive, send)
            return
    await doors.json.serve(scope, receive, send)


def _is_grpc(content_type: bytes) -> bool:
    """With a message format or not; application/grpc-web is another protocol."""
    return content_type == b"application/grpc" or content_type.startswith((b"application/grpc+", b"application/grpc;"))


async def _live(scope: Event, receive: Receive, send: Send) -> None:
    await receive()
    try:
        settings = load()
        telemetry.configure(settings.log_level, settings.redactor)
        asyncio.get_running_loop().set_exception_handler(_unless_pyvoy)
        doors = Doors(settings)
        await doors.core.start()
    except EntitlementError as error:
        sys.stderr.write(f"gateway: {error}\n")
        sys.stderr.flush()
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        return
    scope["state"]["doors"] = doors
    await send({"type": "lifespan.startup.complete"})
    ended = asyncio.ensure_future(receive())
    draining = asyncio.create_task(_told_to_drain())
    await asyncio.wait((ended, draining), return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    await doors.core.drain()
    await ended
    await doors.core.stop()
    await send({"type": "lifespan.shutdown.complete"})


def _unless_pyvoy(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """pyvoy answers a receive that was cancelled because a deadline had passed. Nothing is wrong, and callers, who
    choose deadlines, do not fill the log.
    """
    cancelled = isinstance(context.get("exception"), asyncio.InvalidStateError)
    if not (cancelled and "_pyvoy" in repr(context.get("handle"))):
        loop.default_exception_handler(context)


async def _told_to_drain() -> None:
    """Returns when the process that started Envoy begins to drain it."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    if fd := int(os.environ.get(DRAIN_FD, "0")):
        loop.add_reader(fd, told.set)
    try:
        await told.wait()
    finally:
        loop.remove_reader(fd)
