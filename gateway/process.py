"""The gateway's parts, wired, started and stopped in order, whatever transport serves them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from entitlement.catalog import Snapshot
from entitlement.decision import Limits
from entitlement.v1 import gateway_pb2, gateway_pb2_grpc
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.service import GatewayService
from gateway.settings import Settings
from gateway.store.connection import Endpoint
from gateway.store.control import Control
from gateway.store.redis_store import RedisStore
from gateway.transport.grpcio import GrpcioTransport

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["EntitlementGateway"].full_name
GC_THRESHOLD = 50_000  # after warm-up: what lives is frozen, young garbage is looked at rarely
HEALTH_EVERY_S = 0.1
_log = structlog.get_logger(__name__)


class Registrar(Protocol):
    """A server that servicers can be added to: grpcio's, or a GrpcApp."""

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None: ...

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None: ...


class Core:
    """What decides, without a transport. `start` returns when calls can be decided; both ends may be called twice."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.store = RedisStore(
            Endpoint.parse(settings.redis_url),
            limits=Limits(remember_ms=settings.remember_ms),
            partitions=settings.partitions,
            timeout_ms=settings.redis_timeout_ms,
        )
        self._catalog = Catalog()
        self._control = Control(
            settings.redis_url,
            self.store,
            tenant=settings.tenant,
            swap=self._swap,
            load_timeout_ms=settings.load_timeout_ms,
        )
        self.admission = Admission(self.store, self._catalog, self._control, settings.max_in_flight)
        self.service = GatewayService(self.admission, self.store, self._control, settings.tenant)
        self.health = health.aio.HealthServicer()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises Unavailable when the hot store cannot be reached."""
        await self.store.start()
        await self._control.start()
        await self._say(serving=True)
        self._watch = asyncio.create_task(self._watch_health())
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    async def drain(self) -> None:
        """Health says NOT_SERVING from now on; calls are still decided."""
        await self.health.enter_graceful_shutdown()

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._control.stop()
        await self.store.stop()

    def register(self, server: Registrar) -> tuple[str, ...]:
        """Adds every servicer to a server of either transport; answers the names of the services."""
        gateway_pb2_grpc.add_EntitlementGatewayServicer_to_server(self.service, server)  # type: ignore[arg-type]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names: tuple[str, ...] = (SERVICE, health.SERVICE_NAME)
        if self._settings.reflection:
            names = (*names, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return names

    def _swap(self, snapshot: Snapshot) -> None:
        self._catalog.swap(snapshot)
        _log.info("catalogue", generation=snapshot.generation, rate_cards=len(snapshot.rate_cards))

    async def _say(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self.health.set(name, status)

    async def _watch_health(self) -> None:
        """SERVING while the hot store is connected."""
        serving = True
        while True:
            if serving != self.store.connected:
                serving = self.store.connected
                await self._say(serving=serving)
                _log.warning("health", serving=serving)
            await asyncio.sleep(HEALTH_EVERY_S)


class Process:
    """A gateway served by grpcio in this process."""

    def __init__(self, settings: Settings) -> None:
        self._drain_s = settings.drain_ms / 1000
        self._core = Core(settings)
        self._transport = GrpcioTransport(self._core.register, settings)

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses

    @property
    def admission(self) -> Admission:
        return self._core.admission

    async def start(self) -> None:
        """Raises Unavailable when the hot store cannot be reached, InvalidArgument when an address cannot be bound."""
        await self._core.start()
        await self._transport.start()

    async def stop(self) -> None:
        await self._core.drain()
        await self._transport.stop(self._drain_s)
        await self._core.stop()
