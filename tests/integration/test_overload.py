"""More calls in flight than the limit: the excess is refused at once, the others are decided."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import redis

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.gateway_process import CREDIT, GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL, SERVICE
from tests.hot_stores import CUSTOMER
from tests.servers import DEADLINE_S, ValkeyProcess

LIMIT, EXCESS = 50, 30
HELD_MS = 60_000  # at most; a test lets go much earlier


@pytest.fixture(scope="module")
def store() -> Iterator[ValkeyProcess]:
    """A hot store of its own: it is held."""
    with ValkeyProcess() as process:
        prepare(process.url)
        yield process


@pytest.fixture(scope="module")
def gateway(transport: str, store: ValkeyProcess) -> Iterator[GatewayProcess]:
    """On one address: each listener has its own limit."""
    installed(transport)
    with GatewayProcess(transport, store.url, listen="127.0.0.1:0", max_in_flight=LIMIT, drain_ms=10_000) as process:
        yield process


@pytest.fixture
async def stub(gateway: GatewayProcess) -> AsyncIterator[EntitlementGatewayStub]:
    async with grpc.aio.insecure_channel(gateway.address, options=CHANNEL) as channel:
        made = EntitlementGatewayStub(channel)
        await made.CheckAndConsume(asked(), timeout=DEADLINE_S)  # The catalogue and the plan are known.
        yield made


@pytest.fixture
def held(store: ValkeyProcess) -> Iterator[redis.Redis]:
    """The store decides nothing until `client_unpause`, or the end of the test."""
    with redis.Redis.from_url(store.url, socket_timeout=DEADLINE_S) as client:
        client.execute_command("CLIENT", "PAUSE", HELD_MS, "WRITE")
        yield client
        client.client_unpause()


async def in_flight(calls: list[asyncio.Task[pb.CheckAndConsumeResponse]], refused: int) -> None:
    """Returns when so many calls have ended, and lets nobody else end."""
    async with asyncio.timeout(DEADLINE_S):
        while sum(call.done() for call in calls) < refused:
            await asyncio.wait([call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED)


async def test_the_excess_is_refused_and_the_others_are_decided(
    stub: EntitlementGatewayStub, held: redis.Redis, gateway: GatewayProcess, transport: str
) -> None:
    requests = [asked() for _ in range(LIMIT + EXCESS)]
    calls = [asyncio.ensure_future(stub.CheckAndConsume(request, timeout=DEADLINE_S)) for request in requests]
    await in_flight(calls, EXCESS)
    for call in [call for call in calls if call.done()]:
        error = call.exception()
        assert isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == (f"{LIMIT} calls are in flight, the limit is {LIMIT}; retry with the same key")
    batch = pb.CheckAndConsumeBatchRequest(requests=[asked() for _ in range(2)])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.CheckAndConsumeBatch(batch, timeout=DEADLINE_S)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    if transport == "envoy":
        assert await asyncio.to_thread(posted, gateway) == (429, "resource_exhausted")

    held.client_unpause()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    decided = [answer for answer in ended if isinstance(answer, pb.CheckAndConsumeResponse)]
    assert len(decided) == LIMIT
    assert all(answer.verdict == pb.VERDICT_ALLOW and not answer.replayed for answer in decided)

    refused = [request for request, answer in zip(requests, ended, strict=True) if answer not in decided]
    for request in refused:  # Nothing was tried: the same key is new.
        answer = await stub.CheckAndConsume(request, timeout=DEADLINE_S)
        assert answer.verdict == pb.VERDICT_ALLOW and not answer.replayed


def posted(gateway: GatewayProcess) -> tuple[int, str]:
    body = json.dumps({"idempotencyKey": "over", "customer": CUSTOMER, "usage": [{"feature": "tokens", "quantity": 1}]})
    url = f"http://{gateway.address}{SERVICE}CheckAndConsume"
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=DEADLINE_S)
    return error.value.code, json.loads(error.value.read())["code"]


async def test_calls_that_were_cancelled_make_room(
    stub: EntitlementGatewayStub, held: redis.Redis, transport: str
) -> None:
    first = [asyncio.ensure_future(stub.CheckAndConsume(asked(), timeout=DEADLINE_S)) for _ in range(LIMIT + 1)]
    await in_flight(first, 1)
    for call in first:
        call.cancel()
    await asyncio.gather(*first, return_exceptions=True)
    async with asyncio.timeout(DEADLINE_S):
        while True:  # Until the server has seen it.
            second = [asyncio.ensure_future(stub.CheckAndConsume(asked(), timeout=DEADLINE_S)) for _ in range(LIMIT)]
            await asyncio.wait(second, timeout=0.3, return_when=asyncio.FIRST_COMPLETED)
            if not any(call.done() for call in second):
                break
            for call in second:
                call.cancel()
            await asyncio.gather(*second, return_exceptions=True)
    held.client_unpause()
    assert {answer.verdict for answer in await asyncio.gather(*second)} == {pb.VERDICT_ALLOW}


async def test_what_is_in_flight_when_the_gateway_is_told_to_stop_is_decided(
    transport: str, store: ValkeyProcess
) -> None:
    with GatewayProcess(transport, store.url, listen="127.0.0.1:0", max_in_flight=200, drain_ms=15_000) as process:
        async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as channel:
            stub = EntitlementGatewayStub(channel)
            await stub.CheckAndConsume(asked(), timeout=DEADLINE_S)
            with redis.Redis.from_url(store.url, socket_timeout=DEADLINE_S) as client:
                client.execute_command("CLIENT", "PAUSE", HELD_MS, "WRITE")
                calls = [asyncio.ensure_future(stub.CheckAndConsume(asked(), timeout=DEADLINE_S)) for _ in range(201)]
                await in_flight(calls, 1)
                process.terminate()
                await draining(process, stub)
                client.client_unpause()
            ended = await asyncio.gather(*calls, return_exceptions=True)
            answers = [answer for answer in ended if isinstance(answer, pb.CheckAndConsumeResponse)]
            assert len(answers) == 200
            assert {answer.verdict for answer in answers} == {pb.VERDICT_ALLOW}
        assert await asyncio.to_thread(process.exit_code) == 0
    assert all(0 < answer.balance.available_nanos < CREDIT for answer in answers)


async def draining(process: GatewayProcess, stub: EntitlementGatewayStub) -> None:
    """Returns when SIGTERM was heard: new calls are refused otherwise than for their number."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as channel:
                health = channel.unary_unary("/grpc.health.v1.Health/Check")
                try:
                    if await health(b"", timeout=1) == b"\x08\x02":  # NOT_SERVING
                        return
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        return
