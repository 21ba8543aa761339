"""SIGTERM: health says so first, then streams and watchers end in order, whatever their callers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement import keys
from entitlement.journal import FIELD, Settled, decode
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.gateway_process import GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL
from tests.hot_stores import CUSTOMER, TENANT, TOKENS
from tests.servers import DEADLINE_S, ValkeyProcess

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
NEVER_MS = 600_000  # nothing in a test waits so long
UNITS = 7


@pytest.fixture(scope="module")
def url(transport: str, valkey_server: ValkeyProcess) -> str:
    installed(transport)
    prepare(valkey_server.url)
    return valkey_server.url


@pytest.fixture
def ending(transport: str, url: str) -> Iterator[GatewayProcess]:
    """It waits for calls in flight, for ever."""
    with GatewayProcess(transport, url, listen="127.0.0.1:0", drain_ms=NEVER_MS) as process:
        yield process


@pytest.fixture
async def channel(ending: GatewayProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(ending.address, options=CHANNEL) as made:
        yield made


async def watch(channel: grpc.aio.Channel, service: str = "") -> grpc.aio.UnaryStreamCall:
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    assert (await call.read()).status == SERVING
    return call


async def went_elsewhere(call: grpc.aio.Call) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE, error.value
    assert "being stopped" in (error.value.details() or "")


def reported(url: str, hold: str) -> list[int]:
    """What was charged for a hold, report by report, as the journal has it."""
    with redis.Redis.from_url(url) as client:
        entries = client.xrange(keys.journal(keys.partition_of(TENANT, CUSTOMER)))
    records = [decode(fields[FIELD]) for _, fields in entries]
    settled = [record for record in records if isinstance(record, Settled) and record.hold == hold]
    return [sum(line.quantity for line in record.lines) for record in settled]


async def test_streams_and_watchers_are_ended_in_order(
    url: str, transport: str, ending: GatewayProcess, channel: grpc.aio.Channel
) -> None:
    stub = EntitlementGatewayStub(channel)
    first, second = await watch(channel), await watch(channel)
    first.cancel()  # The other one is told all the same.
    balance = stub.WatchBalance(pb.GetBalanceRequest(customer=CUSTOMER), timeout=DEADLINE_S)
    assert await balance.read() is not grpc.aio.EOF
    stream = stub.CheckAndConsumeStream(timeout=DEADLINE_S)
    await stream.write(asked())
    assert (await stream.read()).verdict == pb.VERDICT_ALLOW
    meter = stub.Meter(timeout=DEADLINE_S)
    hold = f"hold-{transport}"
    usage = [pb.Usage(feature=TOKENS, quantity=1_000)]
    await meter.write(pb.MeterRequest(open=pb.ReserveRequest(hold_id=hold, customer=CUSTOMER, usage=usage)))
    assert (await meter.read()).signal == pb.MeterResponse.CONTINUE
    used = [pb.Usage(feature=TOKENS, quantity=UNITS)]
    await meter.write(pb.MeterRequest(report=pb.SettleRequest(idempotency_key=f"{hold}/1", number=1, usage=used)))
    assert (await meter.read()).acknowledged == 1

    ending.terminate()

    assert (await second.read()).status == NOT_SERVING  # First of all.
    for call in (second, balance, stream, meter):
        await went_elsewhere(call)
    assert await asyncio.to_thread(ending.exit_code) == 0
    assert reported(url, hold) == [UNITS]


async def test_calls_are_taken_while_health_announces_the_end(url: str, transport: str) -> None:
    with GatewayProcess(transport, url, listen="127.0.0.1:0", announce_ms=NEVER_MS) as process:
        async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as known:
            seen = await watch(known)
            process.terminate()
            assert (await seen.read()).status == NOT_SERVING
            async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as another:
                for channel in (known, another):
                    answer = await EntitlementGatewayStub(channel).CheckAndConsume(asked(), timeout=DEADLINE_S)
                    assert answer.verdict == pb.VERDICT_ALLOW
            assert process.alive
        process.kill()
