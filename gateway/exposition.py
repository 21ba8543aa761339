"""The gateway's figures and probes over HTTP, on a port of their own, in a thread of their own: one for a process, for
all of its event loops. Envoy runs one loop for each listener in this process.
"""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, make_wsgi_app, start_http_server

from entitlement.errors import InvalidArgument
from entitlement.probes import Component, Components, Probes
from gateway.figures import Figures, Parts
from gateway.settings import Settings

_lock = threading.Lock()  # Envoy's loops start in threads of their own
_figures: Figures | None = None
_server: WSGIServer | None = None


def add(settings: Settings, parts: Parts) -> None:
    """Shows these parts too; whoever is first opens the port. Nothing happens when none is set. InvalidArgument: it
    cannot be bound.
    """
    global _figures, _server
    if not settings.metrics:
        return
    with _lock:
        if _figures is None:
            _figures = Figures()
            REGISTRY.register(_figures)
        _figures.parts = (*_figures.parts, parts)
        if _server is None:
            _server = _serve(settings, _figures)


def remove(parts: Parts) -> None:
    """They are gone; with the last of them the port is closed. May be called twice."""
    global _server
    with _lock:
        if _figures is None:
            return
        _figures.parts = tuple([part for part in _figures.parts if part is not parts])
        if _figures.parts or _server is None:
            return
        server, _server = _server, None
    server.shutdown()
    server.server_close()


def _serve(settings: Settings, figures: Figures) -> WSGIServer:
    host, _, port = settings.metrics.rpartition(":")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"))
    except OSError as error:
        raise InvalidArgument("metrics", f"{settings.metrics!r} cannot be bound: {error.strerror}") from None
    probes = Probes(lambda: _live(figures), lambda: _ready(figures), make_wsgi_app(REGISTRY), settings.redactor.text)
    server.set_app(probes)
    return server


def _live(figures: Figures) -> Components:
    return _each([{"loop": part.pulse.component} for part in figures.parts])


def _ready(figures: Figures) -> Components:
    return _each([{"loop": part.pulse.component, **part.components()} for part in figures.parts])


def _each(found: list[dict[str, Component]]) -> Components:
    """Of several event loops: that part of one of them which is not well, if there is one."""
    told: dict[str, Component] = {}
    for components in found:
        for name, component in components.items():
            if told.setdefault(name, component).ok:
                told[name] = component
    return told
