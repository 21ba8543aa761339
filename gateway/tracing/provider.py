"""OpenTelemetry's SDK, configured by its own variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_BSP_…).

The same file in both processes: what they share is pure, and this is not. A test keeps them the same.

Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from threading import Thread
from typing import Final

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from entitlement.errors import InvalidArgument

STOP_S: Final = 2.0  # for what has not been sent when the process stops
_GROUP: Final = "opentelemetry_traces_exporter"


def provider(service: str) -> TracerProvider:
    """`service`: what it is called when OTEL_SERVICE_NAME does not say. Spans leave in a thread of their own, in
    batches; what a collector does not take is dropped. Raises InvalidArgument.
    """
    try:
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        made = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter in exporters(os.environ):
            made.add_span_processor(BatchSpanProcessor(exporter))
    except ValueError:  # Its text may hold the value.
        raise InvalidArgument("tracing", "a variable OTEL_… has a value that OpenTelemetry cannot take") from None
    return made


def exporters(environment: Mapping[str, str]) -> list[SpanExporter]:
    """Those that OTEL_TRACES_EXPORTER names: otlp unless it says otherwise, by HTTP unless the protocol is grpc."""
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    names = [name.strip() for name in (environment.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    return [_exporter(otlp if name == "otlp" else name)() for name in names if name != "none"]


def _exporter(name: str) -> Callable[[], SpanExporter]:
    for found in entry_points(group=_GROUP, name=name):
        made: Callable[[], SpanExporter] = found.load()
        return made
    known = ", ".join(sorted({found.name for found in entry_points(group=_GROUP)} | {"none"}))
    raise InvalidArgument("tracing", f"OTEL_TRACES_EXPORTER: {name[:40]!r} is not installed; known are {known}")


async def ended(provider: TracerProvider) -> None:
    """Returns when what was left has been sent, or STOP_S have passed: a collector may be away."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        provider.shutdown()
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(over.set)

    Thread(target=end, name="traces-end", daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(STOP_S):
            await over.wait()
