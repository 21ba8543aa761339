"""Every servicer of the gateway, made once and added to a server of either transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from entitlement.probes import Components
from entitlement.v1 import gateway_pb2
from gateway.admission import Admission, Loader
from gateway.denials import Denials
from gateway.frontdoor.doors import FrontDoors
from gateway.hold_service import HoldService
from gateway.holds import Holds
from gateway.lasting import Lasting
from gateway.service import GatewayService
from gateway.settings import Settings
from gateway.store.protocol import HotStore
from gateway.tracing import Handlers
from gateway.transport.gatekeeper import Gatekeeper
from gateway.transport.health import Health

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["EntitlementGateway"].full_name
COMPONENT = "component/"
LOOK_EVERY_S = 0.1
_log = structlog.get_logger(__name__)


class Registrar(Protocol):
    """A server that servicers can be added to: grpcio's, or a GrpcApp."""

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None: ...

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None: ...


class Servicers:
    """The gateway's service, health, and front doors and reflection when the settings ask for them.

    `front`: the front doors; of them a transport that serves HTTP serves `forward`.
    """

    def __init__(
        self,
        admission: Admission,
        holds: Holds,
        store: HotStore,
        loader: Loader,
        denials: Denials,
        settings: Settings,
        gate: Gatekeeper | None = None,
        *,
        trace: Callable[[str, Handlers], Handlers],
    ) -> None:
        """`gate`: lets in who may call; without one everybody may."""
        self._gate = gate
        self._lasting = Lasting()
        self._service = GatewayService(admission, store, loader, denials, settings.tenant, self._lasting)
        self._holds = HoldService(holds, denials, admission, settings.tenant, self._lasting)
        file = settings.frontdoor
        self.front = FrontDoors(file, admission, store, denials, settings.tenant, gate) if file else None
        self._trace = trace
        self._health = Health(self._lasting)
        self._reflection = settings.reflection
        self._watch: asyncio.Task[None] | None = None

    def register(self, transport: Registrar) -> None:
        server: Registrar = transport if self._gate is None else self._gate.before(transport)
        services = {SERVICE: self._service.handlers() | self._holds.handlers()} | (
            self.front.services if self.front else {}
        )
        for service, handlers in [(name, self._trace(name, methods)) for name, methods in services.items()]:
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
            server.add_registered_method_handlers(service, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._reflection:
            names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)

    @property
    def streams(self) -> int:
        """Meter streams that are open."""
        return self._holds.streams

    async def start(self, components: Callable[[], Components]) -> None:
        """Health is SERVING while every component is well; of each alone it tells as 'component/<name>'."""
        self._say(_well(components()))
        self._watch = asyncio.create_task(self._follow(components))

    async def stop(self) -> None:
        """NOT_SERVING for good. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        self._health.stop()

    def end_lasting(self) -> None:
        """Streams and watchers end, in order, and go on elsewhere. May be called twice."""
        self._lasting.end()

    async def finish(self) -> None:
        """Once no call comes any more: streams that broke off are settled when this returns, or could not be."""
        await self._holds.stop()

    def _say(self, well: Mapping[str, bool]) -> None:
        serving = all(well.values())
        self._health.tell({"": serving, SERVICE: serving, **{COMPONENT + name: well[name] for name in well}})

    async def _follow(self, components: Callable[[], Components]) -> None:
        told: dict[str, bool] = {}
        while True:
            now = components()
            if (well := _well(now)) != told:
                self._say(well)
                if told:
                    down = {name: part.detail for name, part in now.items() if not part.ok}
                    _log.warning("health", serving=not down, down=down)
                told = well
            await asyncio.sleep(LOOK_EVERY_S)


def _well(components: Components) -> dict[str, bool]:
    return {name: component.ok for name, component in components.items()}
