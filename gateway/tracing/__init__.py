"""Traces, where the setting `tracing` asks for them: the parts that see calls are made as their traced kind then, and
as themselves otherwise, so that traces which are off cost nothing. OpenTelemetry is imported only when they are on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import grpc

from gateway.admission import Admission
from gateway.holds import Holds
from gateway.store.hold_store import Scripts
from gateway.store.protocol import HotStore

Handlers: TypeAlias = "dict[str, grpc.RpcMethodHandler[Any, Any]]"


class Store(HotStore, Scripts, Protocol):
    """What decisions are made on."""


class Untraced:
    """Everything as it is."""

    def __init__(self) -> None:
        self.admission: Callable[..., Admission] = Admission
        self.holds: Callable[..., Holds] = Holds

    def store(self, store: Store) -> Store:
        return store

    def handlers(self, service: str, handlers: Handlers) -> Handlers:
        return handlers

    async def stop(self) -> None:
        """Sends what has not been sent, within bounds. May be called twice."""


def opened(*, on: bool) -> Untraced:
    """Raises InvalidArgument when OpenTelemetry's own variables ask for what is not there."""
    if not on:
        return Untraced()
    from gateway.tracing.provider import provider
    from gateway.tracing.traced import Traced

    return Traced(provider("entitlement-gateway"))
