"""Spans of the hot store's round trips. Where no call is traced there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, get_current_span

from entitlement.decision import Charge, Consume, Decision, Outcome, Verdict
from entitlement.errors import EntitlementError
from gateway.store.connection import Argument, Reply
from gateway.store.protocol import Sight
from gateway.tracing import Store

_SYSTEM: Final = {"db.system.name": "redis"}


class TracedStore:
    """A store that is asked as before."""

    def __init__(self, store: Store, tracer: Tracer) -> None:
        self._store = store
        self._tracer = tracer

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        with self._trip("consume"):
            return await self._store.consume(request, charge)

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome | EntitlementError]:
        with self._trip("consume") as span:
            outcomes = await self._store.consume_many(calls)
            if span:
                span.set_attribute("db.operation.batch.size", len(calls))
                span.set_attribute("entitlement.denied", sum(_denied(outcome) for outcome in outcomes))
            return outcomes

    async def evaluate(
        self,
        name: str,
        names: Sequence[Argument],
        arguments: Sequence[Argument],
        draft: bytes = b"",
        *,
        replicated: bool = False,
    ) -> Reply:
        with self._trip(name):
            return await self._store.evaluate(name, names, arguments, draft, replicated=replicated)

    async def read(self, tenant: str, customer: str) -> Sight:
        with self._trip("read"):
            return await self._store.read(tenant, customer)

    async def ask_install(self, tenant: str, customer: str) -> None:
        await self._store.ask_install(tenant, customer)

    @contextmanager
    def _trip(self, name: str) -> Iterator[Span | None]:
        if not get_current_span().get_span_context().trace_flags.sampled:
            yield None
            return
        span = self._tracer.start_span(f"redis {name}", kind=SpanKind.CLIENT, attributes=_SYSTEM)
        span.set_attribute("db.operation.name", name)
        try:
            yield span
        except EntitlementError as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            span.end()


def _denied(outcome: object) -> bool:
    return isinstance(outcome, Decision) and outcome.verdict is Verdict.DENY
