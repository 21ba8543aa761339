"""ledger_sync's traced parts: a span for each batch that has a traced record in it, one for each traced event that is
published. What was not traced by a gateway is not traced here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import time_ns
from typing import Final

import orjson
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, Tracer

from entitlement.span_contexts import context_of, inside
from ledger_sync.ledger import Ledger, LedgerError
from ledger_sync.posting import Posted
from ledger_sync.publisher import Outgoing, Publisher
from ledger_sync.settlement import Outcome
from ledger_sync.tracing import Untraced
from ledger_sync.tracing.provider import ended

MAX_LINKS: Final = 128  # of a batch's span


class Traced(Untraced):
    """Makes parts whose work is seen by `provider`."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("entitlement.ledger_sync")

    def ledger(self, ledger: Ledger) -> Ledger:
        return TracedLedger(ledger, self._tracer)

    def publisher(self, publisher: Publisher) -> Publisher:
        return TracedPublisher(publisher, self._tracer)

    async def stop(self) -> None:
        await ended(self.provider)


class TracedLedger(Ledger):
    """Another one's database, seen. Close that one."""

    def __init__(self, ledger: Ledger, tracer: Tracer) -> None:
        super().__init__(ledger._pool, ledger._dsn)
        self._tracer = tracer

    async def post(self, batch: Sequence[Posted], refused: str = "", opening: int | None = None) -> Outcome:
        """The batch's span stands in the first traced record's trace, and is linked to the others'."""
        contexts = distinct(posted.traceparent for posted in batch)
        if not contexts:
            return await super().post(batch, refused, opening)
        first, *others = contexts
        links = [Link(context) for context in others]
        span = self._tracer.start_span("ledger settle", inside(first), SpanKind.CONSUMER, links=links)
        span.set_attributes({"db.system.name": "postgresql", "messaging.batch.message_count": len(batch)})
        try:
            outcome = await super().post(batch, refused, opening)
            found = {"booked": outcome.booked, "repeated": outcome.repeated, "rejected": len(outcome.rejected)}
            span.set_attributes({f"entitlement.{name}": count for name, count in found.items()})
            return outcome
        except LedgerError as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            span.end()


def distinct(traceparents: Iterable[str]) -> list[SpanContext]:
    """Each trace's first span, of at most one trace more than a span may be linked to."""
    found: dict[int, SpanContext] = {}
    for text in traceparents:
        if text and len(found) <= MAX_LINKS and (context := context_of(text)):
            found.setdefault(context.trace_id, context)
    return list(found.values())


class TracedPublisher:
    """A publisher that is asked as before. Only what was accepted has a span: a target that is away would make many."""

    def __init__(self, publisher: Publisher, tracer: Tracer) -> None:
        self._publisher = publisher
        self._tracer = tracer

    async def start(self) -> None:
        await self._publisher.start()

    async def publish(self, events: Sequence[Outgoing]) -> None:
        began = time_ns()
        await self._publisher.publish(events)
        for event in events:
            if context := context_of(traceparent_of(event.body)):
                name = f"publish {event.type}"
                self._tracer.start_span(name, inside(context), SpanKind.PRODUCER, start_time=began).end()

    async def stop(self) -> None:
        await self._publisher.stop()


def traceparent_of(body: bytes) -> str:
    """Of an event's envelope; empty where it has none."""
    return str(orjson.loads(body).get("traceparent", "")) if b'"traceparent":"' in body else ""
