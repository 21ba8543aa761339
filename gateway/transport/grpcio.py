"""Serves the gateway with grpcio: TCP and Unix sockets, TLS when certificates are given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc

from entitlement.errors import InvalidArgument
from gateway.settings import Settings
from gateway.transport import lines, listening
from gateway.transport.asgi import MAX_CALLS
from gateway.transport.certificates import Certificates
from gateway.transport.guard import GuardedServer

MAX_STREAMS = 2_048
MAX_METADATA_BYTES = 16_384


class GrpcioTransport:
    """A grpc.aio server on every address of the settings. `addresses` are the bound ones after start."""

    def __init__(self, register: Callable[[GuardedServer], object], settings: Settings) -> None:
        self._settings = settings
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=MAX_CALLS,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),  # Else some of what lies between is refused.
                ("grpc.per_message_decompression", 0),  # It inflates whatever comes: GuardedServer does it, bounded.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.max_ping_strikes", 0),  # Beyond some, each is answered with a GOAWAY: 1 GiB for 500,000.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._guarded = GuardedServer(self._server, settings.max_message_bytes)
        register(self._guarded)
        self.addresses: tuple[str, ...] = ()

    @property
    def failures(self) -> int:
        """Calls that ended in an error nobody foresaw."""
        return self._guarded.failures

    async def start(self) -> None:
        """Raises InvalidArgument when an address cannot be bound, or a certificate not be used."""
        listening.prepare(self._settings)
        self.addresses = tuple([self._bind(address) for address in self._settings.addresses])
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """No new calls; those in flight may finish within the grace. May be called twice.

        A new call is UNAVAILABLE: refused, or its connection has ended. grpcio's own stop would send GOAWAY, and cancel
        what arrives before the peer has read it. So each connection is ended as soon as nothing is in flight on it, and
        grpcio is stopped when nobody can be told anything any more.
        """
        self._guarded.in_flight.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._end_idle()
        lines.let_nobody_in(self.addresses)
        lines.end(self.addresses)
        await self._server.stop(None)

    async def _end_idle(self) -> None:
        """Returns when nothing is in flight."""
        while busy := self._guarded.in_flight.peers():
            lines.end(self.addresses, busy)
            await self._guarded.in_flight.left()

    def _bind(self, address: str) -> str:
        if address.startswith("unix:"):
            self._add(address)
            Path(address.removeprefix("unix:")).chmod(listening.SOCKET_MODE)
            return address
        return f"{address.rpartition(':')[0]}:{self._add(address)}"

    def _add(self, address: str) -> int:
        try:
            if self._settings.tls_cert and not address.startswith("unix:"):
                port = self._server.add_secure_port(address, Certificates(self._settings).credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise InvalidArgument("listen", f"{address!r} cannot be bound: in use, or not allowed")
        return port
