"""ledger_sync's figures and probes over HTTP, in a thread of their own: they answer from the start to the end of the
process, whatever the database does.
"""

from __future__ import annotations

from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, make_wsgi_app, start_http_server

from entitlement.errors import InvalidArgument
from entitlement.probes import Components, Probes
from ledger_sync.settings import Settings, split_address


class Exposition:
    """Nothing is opened when no address is set. `stop` may be called twice, and before a start."""

    def __init__(self, settings: Settings, live: Callable[[], Components], ready: Callable[[], Components]) -> None:
        self._address = settings.metrics
        self._probes = Probes(live, ready, make_wsgi_app(REGISTRY), settings.redactor.text)
        self._server: WSGIServer | None = None

    def start(self) -> None:
        """InvalidArgument: the address cannot be bound."""
        if not self._address:
            return
        host, port = split_address("metrics", self._address)
        try:
            self._server, _ = start_http_server(port, host.strip("[]"))
        except OSError as error:
            raise InvalidArgument("metrics", f"{self._address!r} cannot be bound: {error.strerror}") from None
        self._server.set_app(self._probes)

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
