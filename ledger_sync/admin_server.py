"""Serves LedgerAdmin with grpcio: TCP, with TLS or without, and Unix sockets; health; reflection when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from entitlement.errors import InvalidArgument
from entitlement.v1 import ledger_pb2
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer, add_LedgerAdminServicer_to_server
from ledger_sync.admin_guard import GuardedServer
from ledger_sync.certificates import Certificates
from ledger_sync.health import Health
from ledger_sync.identity import Guard

SERVICE: Final = ledger_pb2.DESCRIPTOR.services_by_name["LedgerAdmin"].full_name
LOOP: Final = "loop/"
COMPONENT: Final = "component/"
MAX_MESSAGE_BYTES: Final = 4_194_304
MAX_METADATA_BYTES: Final = 16_384
SOCKET_MODE: Final = 0o660
MAX_CALLS: Final = 256  # at once; more are refused with RESOURCE_EXHAUSTED


class AdminServer:
    """A grpc.aio server on every address. `addresses` are the bound ones after start. `guard` sees every call first;
    with `certificates`, TCP addresses serve TLS.
    """

    def __init__(
        self,
        servicer: LedgerAdminServicer,
        listen: tuple[str, ...],
        *,
        guard: Guard,
        reflected: bool,
        certificates: Certificates | None = None,
    ) -> None:
        self._listen = listen
        self._certificates = certificates
        self._told: dict[str, bool] = {}
        self._health = Health()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),  # Else some of what lies between is refused.
                ("grpc.per_message_decompression", 0),  # It inflates whatever comes: GuardedServer does it, bounded.
                ("grpc.so_reuseport", 0),
            ],
            interceptors=[guard],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        guarded = GuardedServer(self._server, MAX_MESSAGE_BYTES)
        add_LedgerAdminServicer_to_server(servicer, guard.before(guarded))  # type: ignore[arg-type]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflected:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.addresses: tuple[str, ...] = ()

    async def start(self) -> None:
        """Health is NOT_SERVING until it is told. InvalidArgument: an address cannot be bound."""
        self.addresses = tuple([self._bind(address) for address in self._listen])
        await self.serving(False)  # Until its loops run.
        await self._server.start()

    async def serving(self, yes: bool) -> None:
        """Tells health watchers whether the ledger is kept up to date."""
        for name in ("", SERVICE):
            self._health.tell(name, serving=yes)

    async def tell(self, loops: Mapping[str, bool]) -> None:
        """As `serving`, while all of these run; and of each alone, as the service 'loop/<name>'."""
        for name, well in loops.items():
            self._health.tell(f"{LOOP}{name}", serving=well)
        await self.serving(all(loops.values()))

    async def tell_of(self, components: Mapping[str, bool]) -> None:
        """Of each store alone, as the service 'component/<name>'."""
        for name, well in components.items():
            if self._told.get(name) is not well:
                self._told[name] = well
                self._health.tell(f"{COMPONENT}{name}", serving=well)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls, those in flight may finish within the grace. May be called twice."""
        self._health.stop()
        await self._server.stop(grace_s)

    def _bind(self, address: str) -> str:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            if path.is_socket():
                path.unlink()  # Left behind by a process that was killed.
            self._add(address)
            path.chmod(SOCKET_MODE)
            return address
        return f"{address.rpartition(':')[0]}:{self._add(address)}"

    def _add(self, address: str) -> int:
        try:
            if self._certificates and not address.startswith("unix:"):
                port = self._server.add_secure_port(address, self._certificates.credentials())
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise InvalidArgument("listen", f"{address!r} cannot be bound: in use, or not allowed")
        return port
