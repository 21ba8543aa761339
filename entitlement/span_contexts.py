"""Traceparents as OpenTelemetry has them. Imported only where traces are on. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from entitlement.traceparent import is_traceparent


def context_of(traceparent: str) -> SpanContext | None:
    """None: it is none."""
    if not is_traceparent(traceparent):
        return None
    _, trace, span, flags = traceparent.split("-")
    return SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def inside(context: SpanContext | None) -> Context:
    """Where a span's children begin; with None, where a trace does."""
    return Context() if context is None else set_span_in_context(NonRecordingSpan(context), Context())


def text_of(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def of_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> SpanContext | None:
    """The one traceparent of a call's metadata. `tracestate` is passed over: it may hold anything."""
    found = [value for name, value in metadata if name == "traceparent"]
    return context_of(found[0]) if len(found) == 1 and isinstance(found[0], str) else None
