"""The gateway as one long-lived part: wired, started and stopped in order."""

from __future__ import annotations

import asyncio
import gc

import structlog

from entitlement.catalog import Snapshot
from entitlement.decision import Limits
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.service import GatewayService
from gateway.settings import Settings
from gateway.store.connection import Endpoint
from gateway.store.control import Control
from gateway.store.redis_store import RedisStore
from gateway.transport.grpcio import GrpcioTransport

GC_THRESHOLD = 50_000  # after warm-up: what lives is frozen, young garbage is looked at rarely
HEALTH_EVERY_S = 0.1
_log = structlog.get_logger(__name__)


class Process:
    """Everything that one gateway process owns. `start` returns when calls are decided; `stop` drains."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        limits = Limits(remember_ms=settings.remember_ms)
        self._store = RedisStore(
            Endpoint.parse(settings.redis_url),
            limits=limits,
            partitions=settings.partitions,
            timeout_ms=settings.redis_timeout_ms,
        )
        self._catalog = Catalog()
        self._control = Control(
            settings.redis_url,
            self._store,
            tenant=settings.tenant,
            swap=self._swap,
            load_timeout_ms=settings.load_timeout_ms,
        )
        self.admission = Admission(self._store, self._catalog, self._control, settings.max_in_flight)
        service = GatewayService(self.admission, self._store, self._control, settings.tenant)
        self._transport = GrpcioTransport(service, settings)
        self._health: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses

    async def start(self) -> None:
        """Raises Unavailable when the hot store cannot be reached, InvalidArgument when an address cannot be bound."""
        await self._store.start()
        await self._control.start()
        await self._transport.start()
        self._health = asyncio.create_task(self._watch_health())
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    async def stop(self) -> None:
        if self._health is not None:
            self._health.cancel()
            await asyncio.gather(self._health, return_exceptions=True)
        await self._transport.stop(self._settings.drain_ms / 1000)
        await self._control.stop()
        await self._store.stop()

    def _swap(self, snapshot: Snapshot) -> None:
        self._catalog.swap(snapshot)
        _log.info("catalogue", generation=snapshot.generation, rate_cards=len(snapshot.rate_cards))

    async def _watch_health(self) -> None:
        """SERVING while the hot store is connected."""
        serving = True
        while True:
            if serving != self._store.connected:
                serving = self._store.connected
                await self._transport.serving(serving)
                _log.warning("health", serving=serving)
            await asyncio.sleep(HEALTH_EVERY_S)
