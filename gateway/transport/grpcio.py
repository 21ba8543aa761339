"""Serves the gateway with grpcio: TCP and Unix sockets, health, reflection when asked for."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from entitlement.errors import InvalidArgument
from entitlement.v1 import gateway_pb2, gateway_pb2_grpc
from gateway.settings import Settings

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["EntitlementGateway"].full_name
MAX_STREAMS = 2_048
MAX_METADATA_BYTES = 16_384


class GrpcioTransport:
    """A grpc.aio server on every address of the settings. `addresses` are the bound ones after start."""

    def __init__(self, service: gateway_pb2_grpc.EntitlementGatewayServicer, settings: Settings) -> None:
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.so_reuseport", 0),
            ]
        )
        gateway_pb2_grpc.add_EntitlementGatewayServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.addresses: tuple[str, ...] = ()

    async def start(self) -> None:
        self.addresses = tuple([self._bind(address) for address in self._settings.addresses])
        await self._server.start()
        await self.serving(True)

    async def serving(self, yes: bool) -> None:
        """Tells health watchers whether calls would be decided now."""
        status = health_pb2.HealthCheckResponse.SERVING if yes else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls, those in flight may finish within the grace. May be called twice."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    def _bind(self, address: str) -> str:
        if address.startswith("unix:"):
            _remove_stale(Path(address.removeprefix("unix:")))
            self._add(address)
            return address
        return f"{address.rpartition(':')[0]}:{self._add(address)}"

    def _add(self, address: str) -> int:
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise InvalidArgument("listen", f"{address!r} cannot be bound: in use, or not allowed")
        return port


def _remove_stale(path: Path) -> None:
    """A socket that a killed process left behind would refuse the next one."""
    if path.is_socket():
        path.unlink()
