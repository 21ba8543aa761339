"""Both processes in the test's loop on real servers, traced, with all their spans in one place."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import grpc
import redis
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer, format_trace_id
from prometheus_client import CollectorRegistry

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1 import ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.process import Process as Gateway
from gateway.settings import Settings
from gateway.tracing.traced import Traced as GatewayTraces
from gateway.transport.asgi import GrpcApp
from gateway.transport.asgi_context import Event
from gateway.transport.asgi_json import JsonApp
from gateway.transport.frames import frame
from ledger_sync.process import Process as Sync
from ledger_sync.settings import Settings as SyncSettings
from ledger_sync.telemetry import Figures
from ledger_sync.tracing.traced import Traced as SyncTraces
from tests.control_rig import TENANT, USD, card
from tests.gateway_rig import CHANNEL, SERVICE

DEADLINE_S = 20.0
CUSTOMER = "cust-traced"


class TracedRig:
    """What a caller, both processes and a consumer of the events see."""

    def __init__(self, gateway: Gateway, sync: Sync, memory: InMemorySpanExporter, events: Path) -> None:
        self.gateway, self.sync = gateway, sync
        self._memory, self._events = memory, events
        caller = TracerProvider()
        caller.add_span_processor(SimpleSpanProcessor(memory))
        self.caller: Tracer = caller.get_tracer("caller")
        self.grpc_app = GrpcApp()
        gateway._core.servicers.register(self.grpc_app)
        self.json_app = JsonApp(self.grpc_app)
        self.stub: Any = None
        self.admin: Any = None

    @property
    def address(self) -> str:
        return self.gateway.addresses[0]

    def spans(self, trace_id: int | None = None) -> list[ReadableSpan]:
        """What has ended, of all or of one trace, in the order of their beginnings."""
        for traces in (self.gateway._core.traces, self.sync.traces):
            assert isinstance(traces, GatewayTraces | SyncTraces)
            traces.provider.force_flush()
        found = [span for span in self._memory.get_finished_spans() if trace_id in (None, span.context.trace_id)]
        return sorted(found, key=lambda span: span.start_time or 0)

    async def whole(self, trace_id: int, last: str = "publish entitlement.rated.v1") -> dict[str, ReadableSpan]:
        """One trace's spans by name, once it has come to its end."""
        deadline = monotonic() + DEADLINE_S
        while last not in names_of(spans := self.spans(trace_id)):
            assert monotonic() < deadline, f"{last} never came after {names_of(spans)}"
            await asyncio.sleep(0.01)
        return {span.name: span for span in spans}

    def events(self) -> dict[str, dict[str, Any]]:
        """What was published, by id; each id once."""
        found = [json.loads(line) for line in self._events.read_text().splitlines()]
        by_id = {event["id"]: event for event in found if event["type"] == "entitlement.rated.v1"}
        assert len(by_id) == sum(event["type"] == "entitlement.rated.v1" for event in found)
        return by_id

    async def rows(self, query: str, *arguments: object) -> list[Any]:
        assert self.sync._ledger is not None
        async with self.sync._ledger.transaction(readonly=True) as connection:
            return list(await connection.fetch(query, *arguments))

    def forget_keys(self) -> None:
        """The hot store's memory of idempotency keys is over; the ledger's is not."""
        with redis.Redis.from_url(self.gateway._core._settings.redis_url) as client:
            names = list(client.scan_iter("i:*"))
            assert names and client.delete(*names) == len(names)

    async def over_asgi(self, request: pb.CheckAndConsumeRequest, *headers: tuple[bytes, bytes]) -> Any:
        """As Envoy hands a call of gRPC to its application."""
        body = frame(request.SerializeToString())
        sent = await _asgi(self.grpc_app, "CheckAndConsume", body, (b"content-type", b"application/grpc"), *headers)
        (answer,) = [event["body"] for event in sent if event.get("body")]
        return pb.CheckAndConsumeResponse.FromString(answer[5:])

    async def over_json(self, body: dict[str, object], *headers: tuple[bytes, bytes]) -> dict[str, Any]:
        content = (b"content-type", b"application/json")
        sent = await _asgi(self.json_app, "CheckAndConsume", json.dumps(body).encode(), content, *headers)
        return dict(json.loads(b"".join(event.get("body", b"") for event in sent)))


async def _asgi(app: GrpcApp | JsonApp, method: str, body: bytes, *headers: tuple[bytes, bytes]) -> list[Event]:
    sent: list[Event] = []
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Event:
        if (event := next(given, None)) is None:
            await asyncio.Event().wait()
        assert event is not None
        return event

    async def send(event: Event) -> None:
        sent.append(event)

    scope: Event = {"type": "http", "method": "POST", "path": SERVICE + method, "headers": [*headers]}
    await app.serve(scope, receive, send)
    return sent


def request(key: str, *, customer: str = CUSTOMER, quantity: int = 10, **more: Any) -> pb.CheckAndConsumeRequest:
    usage = [pb.Usage(feature="input.tokens", quantity=quantity)]
    return pb.CheckAndConsumeRequest(idempotency_key=key, customer=customer, usage=usage, **more)


def names_of(spans: Iterable[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def trace_of(span: ReadableSpan) -> str:
    return format_trace_id(span.context.trace_id)


@asynccontextmanager
async def traced_rig(valkey_url: str, dsn: str, secrets: dict[str, str]) -> AsyncIterator[TracedRig]:
    """`secrets`: passwords `redis` and `database`, and a header for the collector, `collector`."""
    memory, thresholds = InMemorySpanExporter(), gc.get_threshold()
    url = valkey_url.replace("://", f"://default:{quote(secrets['redis'], safe='')}@")
    database = dsn.replace("postgres@", f"postgres:{quote(secrets['database'], safe='')}@")
    with (
        tempfile.TemporaryDirectory(prefix="traced-") as folder,
        patch.dict(os.environ, {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization={secrets['collector']}"}),
        patch("gateway.tracing.provider.exporters", lambda _: [memory]),
        patch("ledger_sync.tracing.provider.exporters", lambda _: [memory]),
        patch("ledger_sync.process.Figures", lambda: Figures(CollectorRegistry())),
    ):
        events = Path(folder, "events.jsonl")
        sync = Sync(
            SyncSettings(
                redis_url=url,
                database_url=database,
                database_checks="warn",
                anonymous="all",
                listen="127.0.0.1:0",
                tenant=TENANT,
                publisher=f"file://{events}",
                patrol_s=0,
                linger_ms=1,
                tracing=True,
            )
        )
        gateway = Gateway(
            Settings(
                redis_url=url,
                listen="127.0.0.1:0",
                tenant=TENANT,
                anonymous="all",
                redis_timeout_ms=5_000,
                load_timeout_ms=10_000,
                receipts_dir=folder,
                drain_ms=1_000,
                tracing=True,
            )
        )
        try:
            await sync.start()
            await gateway.start()
            async with (
                grpc.aio.insecure_channel(gateway.addresses[0], options=CHANNEL) as channel,
                grpc.aio.insecure_channel(sync.addresses[0], options=CHANNEL) as control,
            ):
                made = TracedRig(gateway, sync, memory, events)
                made.stub, made.admin = EntitlementGatewayStub(channel), LedgerAdminStub(control)
                await _customer(made.admin)
                await gateway._core._store._up.wait()
                yield made
        finally:
            await gateway.stop()
            await sync.stop()
            gc.set_threshold(*thresholds)
            gc.unfreeze()


async def _customer(admin: Any) -> None:
    await admin.PutFeature(ledger_pb2.Feature(key="input.tokens", kind=ledger_pb2.Feature.METERED, unit="token"))
    await admin.PutRateCard(card("llm", {"input.tokens": 3 * USD}))
    await admin.PutCustomer(ledger_pb2.Customer(id=CUSTOMER, name="Traced"))
    await admin.PutContract(ledger_pb2.Contract(id="contract-1", customer=CUSTOMER, rate_card="llm"))
    await admin.CreateGrant(ledger_pb2.Grant(id="grant-1", customer=CUSTOMER, amount_nanos=10**6 * USD))
