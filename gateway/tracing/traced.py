"""The gateway's traced parts: a span for each call, a child for each round trip to the hot store.

A span's attributes are of few values and hold nothing of a caller: no customer, key, token, metadata or message of an
error. Requests carry the span that decided them into the journal, where it is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import msgspec
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, Span, Tracer, get_current_span, set_span_in_context
from opentelemetry.util.types import AttributeValue

from entitlement.decision import Consume, Decision
from entitlement.errors import EntitlementError
from entitlement.holding import Closing, Kept, NoHold, Reserve, Settle, Unordered
from entitlement.span_contexts import context_of, inside, text_of
from entitlement.traceparent import field_of
from entitlement.traceparent import text_of as text_in
from gateway.admission import Admission
from gateway.holds import Holds
from gateway.tracing import Handlers, Store, Untraced
from gateway.tracing.calls import TracedHandlers
from gateway.tracing.provider import ended
from gateway.tracing.round_trips import TracedStore

DECIDE: Final = "entitlement.decide"


class Traced(Untraced):
    """Makes parts whose calls are seen by `provider`."""

    def __init__(self, provider: TracerProvider) -> None:
        super().__init__()
        self.provider = provider
        self._tracer = provider.get_tracer("entitlement.gateway")
        self.admission = partial(TracedAdmission, self._tracer)
        self.holds = TracedHolds

    def store(self, store: Store) -> Store:
        return TracedStore(store, self._tracer)

    def handlers(self, service: str, handlers: Handlers) -> Handlers:
        return TracedHandlers(service, self._tracer).wrapped(handlers)

    async def stop(self) -> None:
        await ended(self.provider)


class TracedAdmission(Admission):
    """A request that brings a trace of its own (many travel in one call) has a span of its own there."""

    def __init__(self, tracer: Tracer, *parts: Any) -> None:
        super().__init__(*parts)
        self._tracer = tracer

    async def admit(self, request: Consume) -> Decision:
        own = self._own(request)
        span = own or get_current_span()
        with _current(own):
            outcome: Decision | EntitlementError | None = None
            try:
                outcome = await super().admit(carrying(request, span))
                return outcome
            except EntitlementError as error:
                outcome = error
                raise
            finally:
                _tell(span, outcome)
                if own:
                    own.end()

    async def admit_many(self, requests: Sequence[Consume]) -> list[Decision | EntitlementError]:
        own = [self._own(request) for request in requests]
        here = get_current_span()
        outcomes: Sequence[Decision | EntitlementError | None] = [None] * len(requests)
        try:
            traced = [carrying(request, span or here) for request, span in zip(requests, own, strict=True)]
            outcomes = found = await super().admit_many(traced)
            return found
        except EntitlementError as error:
            outcomes = [error] * len(requests)
            raise
        finally:
            for span, outcome in zip(own, outcomes, strict=True):
                if span:
                    _tell(span, outcome)
                    span.end()

    def _own(self, request: Consume) -> Span | None:
        context = context_of(text_in(request.trace)) if request.trace else None
        here = get_current_span().get_span_context()
        if context is None or context.trace_id == here.trace_id:
            return None
        links = [Link(here)] if here.is_valid else []
        span = self._tracer.start_span(DECIDE, inside(context), links=links)
        return span if span.is_recording() else None


class TracedHolds(Holds):
    """Calls about holds travel alone: their span is the call's."""

    async def reserve(self, reserve: Reserve) -> Kept | NoHold:
        asked = carrying(reserve.asked, get_current_span())
        return _told(await super().reserve(msgspec.structs.replace(reserve, asked=asked)))

    async def settle(self, settle: Settle) -> Kept | NoHold | Unordered:
        asked = carrying(settle.asked, get_current_span())
        kept = await super().settle(msgspec.structs.replace(settle, asked=asked))
        return kept if isinstance(kept, Unordered) else _told(kept)

    async def close(self, closing: Closing) -> Kept | NoHold:
        return _told(await super().close(closing))


def carrying(request: Consume, span: Span) -> Consume:
    """The request, which takes a sampled span into the journal; another one leaves it as its caller sent it."""
    context = span.get_span_context()
    if not context.trace_flags.sampled:
        return request
    return msgspec.structs.replace(request, trace=field_of(text_of(context)))


@contextmanager
def _current(span: Span | None) -> Iterator[None]:
    if span is None:
        yield
        return
    token = attach(set_span_in_context(span))
    try:
        yield
    finally:
        detach(token)


def _told(kept: Kept | NoHold) -> Kept | NoHold:
    span = get_current_span()
    if isinstance(kept, Kept):
        _tell(span, kept.decision)
    elif span.is_recording():
        span.set_attributes({"entitlement.verdict": "DENY", "entitlement.reason": kept.reason.name})
    return kept


def _tell(span: Span, outcome: Decision | EntitlementError | None) -> None:
    """None: it was cancelled, or failed as nobody foresaw."""
    if not span.is_recording():  # Not sampled; or a stream that has ended, and is being settled.
        return
    if isinstance(outcome, Decision):
        found: dict[str, AttributeValue] = {"entitlement.verdict": outcome.verdict.name}
        found["entitlement.reason"] = outcome.reason.name
        found["entitlement.replayed"] = outcome.replayed
        span.set_attributes(found)
    else:
        span.set_attribute("error.type", type(outcome).__name__ if outcome else "cancelled")
