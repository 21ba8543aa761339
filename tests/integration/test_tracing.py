"""Traces from a caller through the gateway, the hot store and the ledger to the published event."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import pytest
import pytest_asyncio
import redis
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from entitlement.span_contexts import text_of
from entitlement.v1 import gateway_pb2 as pb
from gateway.client import Client, SyncClient
from tests.control_rig import eventually
from tests.servers import PostgresProcess, ValkeyProcess
from tests.traced_rig import CUSTOMER, TracedRig, names_of, request, trace_of, traced_rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALL: Final = "entitlement.v1.EntitlementGateway/"
ONE: Final = f"{CALL}CheckAndConsume"
PUBLISH: Final = "publish entitlement.rated.v1"
ALLOWED: Final = {"entitlement.verdict": "ALLOW", "entitlement.reason": "NONE"}
SECRETS: Final = {
    name: f"planted-{name}-0123456789abcdef"
    for name in (
        *("redis", "database", "collector", "bearer", "basic", "api-key", "cookie"),
        *("tracestate", "baggage", "key", "subject", "dimension"),
    )
}
METADATA: Final = (
    ("authorization", f"Bearer {SECRETS['bearer']}"),
    ("proxy-authorization", f"Basic {SECRETS['basic']}"),
    ("x-api-key", SECRETS["api-key"]),
    ("cookie", f"session={SECRETS['cookie']}"),
    ("tracestate", f"vendor={SECRETS['tracestate']}"),
    ("baggage", f"user={SECRETS['baggage']}"),
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rig(valkey_server: ValkeyProcess, postgres_server: PostgresProcess) -> AsyncIterator[TracedRig]:
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
    async with traced_rig(valkey_server.url, postgres_server.create_database(), SECRETS) as made:
        yield made


async def by_client(rig: TracedRig, key: str, _: str) -> None:
    async with Client(rig.address, timeout_ms=10_000) as client:
        assert (await client.check_and_consume(CUSTOMER, "input.tokens", 10, key=key)).allowed


async def by_thread(rig: TracedRig, key: str, _: str) -> None:
    def call() -> bool:
        with SyncClient(rig.address, timeout_ms=10_000) as client:
            return client.check_and_consume(CUSTOMER, "input.tokens", 10, key=key).allowed

    assert await asyncio.to_thread(call)  # Which takes the context along.


async def by_grpcio(rig: TracedRig, key: str, traceparent: str) -> None:
    answer = await rig.stub.CheckAndConsume(request(key), metadata=(("traceparent", traceparent),), timeout=10)
    assert answer.verdict == pb.VERDICT_ALLOW


async def by_asgi(rig: TracedRig, key: str, traceparent: str) -> None:
    answer = await rig.over_asgi(request(key), (b"traceparent", traceparent.encode()))
    assert answer.verdict == pb.VERDICT_ALLOW


async def by_json(rig: TracedRig, key: str, traceparent: str) -> None:
    usage = [{"feature": "input.tokens", "quantity": 10}]
    body: dict[str, object] = {"idempotencyKey": key, "customer": CUSTOMER, "usage": usage}
    answer = await rig.over_json(body, (b"traceparent", traceparent.encode()))
    assert answer["verdict"] == "VERDICT_ALLOW"


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("way", [by_client, by_thread, by_grpcio, by_asgi, by_json])
async def test_one_trace_leads_from_the_caller_to_the_event(
    rig: TracedRig, way: Callable[[TracedRig, str, str], Awaitable[None]]
) -> None:
    key = way.__name__
    with rig.caller.start_as_current_span("caller") as caller:
        await way(rig, key, text_of(caller.get_span_context()))
    spans = await rig.whole(caller.get_span_context().trace_id)
    assert spans.keys() == {"caller", ONE, "redis consume", "ledger settle", PUBLISH}
    served = spans[ONE]
    assert is_child(served, spans["caller"]) and served.kind is SpanKind.SERVER
    assert is_child(spans["redis consume"], served) and spans["redis consume"].kind is SpanKind.CLIENT
    assert is_child(spans["ledger settle"], served) and is_child(spans[PUBLISH], served)
    assert rig.events()[key]["traceparent"] == text_of(served.context)
    assert attributes(served) == ALLOWED | {
        **{"rpc.system": "grpc", "rpc.service": CALL[:-1], "rpc.method": "CheckAndConsume"},
        **{"rpc.grpc.status_code": 0, "entitlement.replayed": False},
    }
    assert attributes(spans["ledger settle"])["entitlement.booked"] == 1
    assert served.resource.attributes["service.name"] == "entitlement-gateway"
    assert spans[PUBLISH].resource.attributes["service.name"] == "entitlement-ledger-sync"


async def test_callers_whose_requests_travel_together_keep_their_traces(rig: TracedRig) -> None:
    async with Client(rig.address, timeout_ms=10_000) as client:

        async def call(number: int) -> tuple[str, int]:
            with rig.caller.start_as_current_span("caller") as span:
                key = f"together-{number}"
                assert (await client.check_and_consume(CUSTOMER, "input.tokens", 10, key=key)).allowed
                return key, span.get_span_context().trace_id

        calls = await asyncio.gather(*[call(number) for number in range(20)])
    shared = 0
    for key, trace in calls:
        spans = await rig.whole(trace)
        if (decided := spans.get("entitlement.decide")) is None:  # Its trace is the one that the batch is told under.
            shared += 1
            decided = spans[f"{CALL}CheckAndConsumeBatch"]
        else:
            assert attributes(decided).items() >= ALLOWED.items()
            (link,) = decided.links
            assert link.context.trace_id in {other for _, other in calls} - {trace}
        assert is_child(decided, spans["caller"])
        assert rig.events()[key]["traceparent"] == text_of(decided.context)
    assert 1 <= shared <= 2  # Twenty travel in a batch, or in one and the one that left before it.
    settled = [span for span in rig.spans() if span.name == "ledger settle"]
    told = {span.context.trace_id for span in settled} | {link.context.trace_id for s in settled for link in s.links}
    assert {trace for _, trace in calls} <= told


async def test_a_stream_is_one_span_and_its_requests_are_in_its_trace_or_their_own(rig: TracedRig) -> None:
    with rig.caller.start_as_current_span("caller") as caller, rig.caller.start_as_current_span("other") as other:
        here, theirs = text_of(caller.get_span_context()), text_of(other.get_span_context())
    theirs = theirs.replace(trace_of(other), "5" * 32)  # type: ignore[arg-type]
    stream = rig.stub.CheckAndConsumeStream(metadata=(("traceparent", here),), timeout=10)
    await stream.write(request("stream-1"))
    await stream.write(request("stream-2", traceparent=theirs))
    assert {(await stream.read()).verdict for _ in range(2)} == {pb.VERDICT_ALLOW}
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    await rig.whole(int("5" * 32, 16))
    spans = await rig.whole(caller.get_span_context().trace_id)
    assert rig.events()["stream-1"]["traceparent"] == text_of(spans[f"{CALL}CheckAndConsumeStream"].context)
    assert rig.events()["stream-2"]["traceparent"].startswith(f"00-{'5' * 32}-")


async def test_a_retry_under_another_trace_is_the_same_request_and_booked_once(rig: TracedRig) -> None:
    async def ask(key: str) -> Any:
        with rig.caller.start_as_current_span("caller") as span:
            metadata = (("traceparent", text_of(span.get_span_context())),)
            return await rig.stub.CheckAndConsume(request(key), metadata=metadata, timeout=10)

    async def hold(key: str) -> tuple[Any, Any]:
        with rig.caller.start_as_current_span("caller") as span:
            metadata = (("traceparent", text_of(span.get_span_context())),)
            usage = [pb.Usage(feature="input.tokens", quantity=7)]
            more: dict[str, Any] = {"hold_id": "hold-1", "customer": CUSTOMER, "usage": usage}
            made = await rig.stub.Reserve(pb.ReserveRequest(**more), metadata=metadata, timeout=10)
            report = pb.SettleRequest(**more, idempotency_key=key, final=True)
            return made, await rig.stub.Settle(report, metadata=metadata, timeout=10)

    assert [(await ask("again")).replayed for _ in range(2)] == [False, True]
    assert [(one.replayed, two.replayed) for one, two in [await hold("report"), await hold("report")]] == [
        (False, False),
        (True, True),
    ]
    booked = await settled(rig, "again", "report")
    rig.forget_keys()
    assert not (await ask("again")).replayed  # Decided anew; the ledger, which never forgets, gives it back.
    with rig.caller.start_as_current_span("caller") as span:
        metadata = (("traceparent", text_of(span.get_span_context())),)
        await rig.stub.CheckAndConsume(request("after"), metadata=metadata, timeout=10)
    assert await settled(rig, "again", "report", "after") == [*booked, ("after", 30_000)]
    assert await rig.rows("SELECT reason FROM quarantine") == []
    assert {"traceparent"} <= rig.events()["report"].keys()


async def settled(rig: TracedRig, *keys: str) -> list[tuple[str, int]]:
    """What the ledger has booked for these keys, once it has all of them, and each is published."""

    async def published() -> bool:
        return rig.events().keys() >= set(keys)

    await eventually(published)
    query = "SELECT idempotency_key, amount FROM usage_events WHERE idempotency_key = ANY($1) ORDER BY event_time"
    return [tuple(row) for row in await rig.rows(query, list(keys))]


async def test_what_a_caller_does_not_sample_is_neither_told_nor_journaled(rig: TracedRig) -> None:
    before, trace = len(rig.spans()), "7" * 32
    metadata = (("traceparent", f"00-{trace}-{'7' * 16}-00"),)
    await rig.stub.CheckAndConsume(request("unsampled"), metadata=metadata, timeout=10)
    await settled(rig, "unsampled")
    assert "traceparent" not in rig.events()["unsampled"]
    for bad in (f"00-{trace}-{'7' * 16}", f"00-{'0' * 32}-{'7' * 16}-01", "7" * 9_000):  # A trace of its own begins.
        await rig.stub.CheckAndConsume(request(f"bad-{len(bad)}"), metadata=(("traceparent", bad),), timeout=10)
    await settled(rig, "bad-9000", "bad-52", "bad-55")
    for key in ("bad-9000", "bad-52", "bad-55"):
        assert trace not in rig.events()[key]["traceparent"]
    assert rig.spans(int(trace, 16)) == []
    served = [span for span in rig.spans()[before:] if span.name == ONE]
    assert len(served) == 3 and all(span.parent is None for span in served)


async def test_no_secret_is_in_any_span_and_a_refused_call_tells_its_status(rig: TracedRig) -> None:
    with rig.caller.start_as_current_span("caller") as caller:
        metadata = (*METADATA, ("traceparent", text_of(caller.get_span_context())))
        planted = request(SECRETS["key"], subject=SECRETS["subject"])
        planted.usage[0].dimensions["model"] = SECRETS["dimension"]
        await rig.stub.CheckAndConsume(planted, metadata=metadata, timeout=10)
        planted.usage[0].quantity = 11
        with pytest.raises(grpc.aio.AioRpcError) as mismatch:
            await rig.stub.CheckAndConsume(planted, metadata=metadata, timeout=10)
        for bad in (request(f"\n{SECRETS['key']}"), request("k", customer=f" {SECRETS['key']}")):
            with pytest.raises(grpc.aio.AioRpcError):
                await rig.stub.CheckAndConsume(bad, metadata=metadata, timeout=10)
        unknown = pb.GetBalanceRequest(customer=SECRETS["subject"])
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.stub.GetBalance(unknown, metadata=metadata, timeout=10)
        headers = [(name.encode(), value.encode()) for name, value in metadata]
        await rig.over_asgi(request("asgi-secret"), *headers)
    assert mismatch.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await settled(rig, SECRETS["key"], "asgi-secret")
    await rig.whole(caller.get_span_context().trace_id)
    spans = rig.spans()
    text = json.dumps([json.loads(span.to_json()) for span in spans])
    assert [name for name, value in SECRETS.items() if value in text] == []
    assert CUSTOMER not in text and len(SECRETS) == 12
    statuses = [attributes(span)["rpc.grpc.status_code"] for span in spans if span.name == ONE and span.parent]
    assert {0, grpc.StatusCode.ALREADY_EXISTS.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]} <= set(statuses)
    assert "redis read" in names_of(spans)


OFF: Final = """
import sys, asyncio
sys.modules["opentelemetry"] = None  # An import of it fails. redis-py tries one by itself, and does without.
from gateway.process import Process
from gateway.settings import Settings
import gateway.transport.hosted
from ledger_sync.process import Process as Sync
from ledger_sync.settings import Settings as SyncSettings
async def main():
    made = Process(Settings(anonymous="all"))
    Sync(SyncSettings(publisher="none:"))
    assert not [name for name in sys.modules if name.startswith("opentelemetry.")]
    service = made._core.servicers._service
    assert service.handlers()["CheckAndConsume"].unary_unary == service.check_and_consume
    print(type(made.admission).__name__, service._store is made._core._store)
asyncio.run(main())
"""


async def test_off_means_that_opentelemetry_is_not_imported_and_nothing_is_wrapped() -> None:
    command = [sys.executable, "-c", OFF]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("Admission True\n", 0), done.stderr
