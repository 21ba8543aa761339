"""The gateway's parts, wired, started and stopped in order, whatever transport serves them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping
from time import monotonic

import structlog

from entitlement import logs
from entitlement.catalog import Durability, Snapshot
from entitlement.decision import Limits
from entitlement.probes import Component, Pulse
from gateway import access_files, exposition
from gateway.admission import Admission
from gateway.catalog import Catalog
from gateway.degraded import Degraded
from gateway.denials import Denials
from gateway.fence import Fence
from gateway.figures import Parts
from gateway.receipts import Receipts, tend
from gateway.reloading import Reloader
from gateway.settings import Settings
from gateway.store.control import Control
from gateway.store.examine import self_check
from gateway.store.hold_store import HoldStore
from gateway.store.redis_store import RedisStore
from gateway.tracing import opened
from gateway.transport.gatekeeper import Gatekeeper
from gateway.transport.grpcio import GrpcioTransport
from gateway.transport.servicers import Servicers

GC_THRESHOLD = 50_000  # after warm-up: what lives is frozen, young garbage is looked at rarely
PULSE_S = 0.25
_log = structlog.get_logger(__name__)


class Core:
    """What decides, and its servicers. `start` returns when calls can be decided; `stop` may be called twice."""

    def __init__(self, settings: Settings, failures: Callable[[], int] = lambda: 0) -> None:
        """`failures`: calls that ended in an error nobody foresaw, as the transport counts them."""
        self._settings = settings
        self.traces = traces = opened(on=settings.tracing)
        self.reloader = Reloader(settings, self._apply)
        limits = Limits(remember_ms=settings.remember_ms)
        self._catalog = Catalog(durability=settings.unless_said)
        self.receipts = Receipts(settings.receipts_base, max_bytes=settings.receipts_max_mib << 20)
        self._store = RedisStore(
            settings.redis,
            limits=limits,
            partitions=settings.partitions,
            timeout_ms=settings.redis_timeout_ms,
            receipts=self.receipts,
            fence=Fence(self.receipts, self._catalog, settings.tenant, limits, settings.partitions),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        denials = Denials()
        self._control = Control(
            settings.redis,
            self._store,
            tenant=settings.tenant,
            swap=self._swap,
            denials=denials,
            load_timeout_ms=settings.load_timeout_ms,
        )
        self._degraded = Degraded(self._catalog, self.receipts, lambda: self._store.comings, settings.tenant)
        store = traces.store(self._store)
        self.admission = traces.admission(store, self._catalog, self._control, self._degraded, settings.max_in_flight)
        holds = traces.holds(
            HoldStore(store, self.receipts, limits, settings.partitions),
            *(self._catalog, self._control, self.admission),
        )
        self._gate = _gate(settings)
        self.servicers = Servicers(
            *(self.admission, holds, store, self._control, denials, settings, self._gate), trace=traces.handlers
        )
        self._pulse = Pulse(monotonic)
        self._parts = Parts(
            *(self.admission, holds, self._store, self.receipts, self._degraded, self._catalog, self._pulse),
            *(lambda: self.servicers.streams, failures, self.components, self._refused, self._stale),
            lambda: self.reloader.failed,
        )

    async def start(self) -> None:
        """Raises Unavailable when the hot store cannot be reached, InvalidArgument when receipts have no place."""
        self.receipts.check()
        exposition.add(self._settings, self._parts)
        self._tasks.append(asyncio.create_task(self._beat()))
        await self._store.start()
        settings = self._settings
        replica = settings.unless_said is Durability.RECEIPT_REPLICA
        await self_check(settings.redis, settings.redis_checks, replica=replica)
        self._tasks.append(asyncio.create_task(self.reloader.run()))
        self._tasks.append(asyncio.create_task(tend(self.receipts, self._store)))
        await self._control.start()
        if self._gate is not None:
            self._tasks.append(asyncio.create_task(access_files.watch(self._gate.doorkeeper)))
        await self.servicers.start(self.components)
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    def components(self) -> dict[str, Component]:
        """What has to be well for calls to be decided, and why it is not."""
        reached, why = self._store.reached, self._store.why
        return {
            "redis": Component(reached, "" if reached else why),
            "fence": Component(self._store.connected, why),
            "receipts": Component(not self.receipts.problem, self.receipts.problem),
            "serving": Component(not self._draining, "it is being stopped" if self._draining else ""),
        }

    def _refused(self) -> Mapping[str, int]:
        return self._gate.doorkeeper.refused if self._gate else {}

    def _stale(self) -> bool:
        return bool(self._gate and self._gate.doorkeeper.problem)

    def _apply(self, settings: Settings) -> None:
        if self.servicers.front is not None:
            self.servicers.front.reload()
        logs.set_level(settings.log_level)
        self.admission.max_in_flight = settings.max_in_flight
        self._control.load_timeout_ms = settings.load_timeout_ms
        self.receipts.max_bytes = settings.receipts_max_mib << 20

    async def _beat(self) -> None:
        while True:
            self._pulse.beat()
            await asyncio.sleep(PULSE_S)

    async def drain(self) -> None:
        """Health says NOT_SERVING from now on, and calls are still decided. Once whoever asks for health has had time
        to see it, streams and watchers are ended.
        """
        self._draining = True
        await self.servicers.stop()
        await asyncio.sleep(self.reloader.settings.announce_ms / 1000)
        self.servicers.end_lasting()

    async def stop(self) -> None:
        await self.servicers.stop()
        await self.servicers.finish()
        await self._control.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.stop()
        await self.receipts.stop()
        exposition.remove(self._parts)
        await self.traces.stop()

    def _swap(self, snapshot: Snapshot) -> None:
        self._catalog.swap(snapshot)
        self._degraded.swap(snapshot.policies)
        _log.info("catalogue", generation=snapshot.generation, rate_cards=len(snapshot.rate_cards))


def _gate(settings: Settings) -> Gatekeeper | None:
    """None where it was said that everybody may call: then no call is looked at."""
    if settings.anonymous == "all":
        return None
    keeper = access_files.doorkeeper(settings.identities)
    return Gatekeeper(keeper, settings.tenant, local=settings.anonymous == "unix")


class Process:
    """A gateway served by grpcio in this process."""

    def __init__(self, settings: Settings) -> None:
        self._core = Core(settings, lambda: self._transport.failures)
        self._transport = GrpcioTransport(self._core.servicers.register, settings)
        front = self._core.servicers.front
        if front is not None and front.forward is not None:
            _log.warning("frontdoor", forward="not served: grpcio serves gRPC alone")

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

    def reload(self) -> None:
        """Reads the settings again, soon."""
        self._core.reloader.wake()

    async def stop(self) -> None:
        await self._core.drain()
        await self._transport.stop(self._core.reloader.settings.drain_ms / 1000)
        await self._core.stop()
