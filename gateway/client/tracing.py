"""The trace of whoever calls: sent along where OpenTelemetry is installed and a span is current."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from entitlement.traceparent import in_request

Metadata: TypeAlias = tuple[tuple[str, str], ...] | None


def caller() -> Callable[[], str]:
    """What tells the traceparent of the span that is current when it is called; '' where there is none, always where
    OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.trace import get_current_span
    except ModuleNotFoundError:
        return str

    def traceparent() -> str:
        context = get_current_span().get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    return traceparent


def told(metadata: Callable[[], Metadata], traceparent: Callable[[], str]) -> Callable[[], Metadata]:
    """The metadata of a call that its caller makes alone."""
    if traceparent is str:
        return metadata

    def with_trace() -> Metadata:
        text = traceparent()
        return (*(metadata() or ()), ("traceparent", text)) if text else metadata()

    return with_trace


def told_together(
    metadata: Callable[[], Metadata], traceparent: Callable[[], str]
) -> Callable[[Sequence[bytes]], Metadata]:
    """The metadata of a call that carries many callers' requests: the first sampled one's trace, or else the first's.
    Each request has its own besides.
    """
    if traceparent is str:
        return lambda _: metadata()

    def with_trace(requests: Sequence[bytes]) -> Metadata:
        texts = [text for text in map(in_request, requests) if text]
        if not texts:
            return metadata()
        sampled = (text for text in texts if int(text[-1], 16) & 1)
        return (*(metadata() or ()), ("traceparent", next(sampled, texts[0])))

    return with_trace
