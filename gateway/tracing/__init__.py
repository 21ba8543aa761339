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
    """Traces, where the setting `tracing` asks for them: the parts that see calls are made as their traced kind then, and
    as themselves otherwise, so that traces which are off cost nothing. OpenTelemetry is imported only when they are on.
    """


class Untraced:
    """Traces, where the setting `tracing` asks for them: the parts that see calls are made as their traced kind then, and
    as themselves otherwise, so that traces which are off cost nothing. OpenTelemetry is imported only when they are on.
    """

    def __init__(self) -> None:
        self.admission: Callable[..., Admission] = Admission
        self.holds: Callable[..., Holds] = Holds

    def store(self, store: Store) -> Store:
        return store

    def handlers(self, service: str, handlers: Handlers) -> Handlers:
        return handlers

    async def stop(self) -> None:
        """Traces, where the setting `tracing` asks for them: the parts that see calls are made as their traced kind then, and
        as themselves otherwise, so that traces which are off cost nothing. OpenTelemetry is imported only when they are on.
        """


def opened(*, on: bool) -> Untraced:
    """Traces, where the setting `tracing` asks for them: the parts that see calls are made as their traced kind then, and
    as themselves otherwise, so that traces which are off cost nothing. OpenTelemetry is imported only when they are on.
    """
    if not on:
        return Untraced()
    from gateway.tracing.provider import provider
    from gateway.tracing.traced import Traced

    return Traced(provider("entitlement-gateway"))
