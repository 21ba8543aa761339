"""Traces, where the setting `tracing` asks for them: what settles and publishes is made as its traced kind then, and as
itself otherwise. OpenTelemetry is imported only when they are on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ledger_sync.publisher import Publisher

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger


class Untraced:
    """Everything as it is."""

    def ledger(self, ledger: Ledger) -> Ledger:
        return ledger

    def publisher(self, publisher: Publisher) -> Publisher:
        return publisher

    async def stop(self) -> None:
        """Sends what has not been sent, within bounds. May be called twice."""


def opened(*, on: bool) -> Untraced:
    """Raises InvalidArgument when OpenTelemetry's own variables ask for what is not there."""
    if not on:
        return Untraced()
    from ledger_sync.tracing.provider import provider
    from ledger_sync.tracing.traced import Traced

    return Traced(provider("entitlement-ledger-sync"))
