"""Durability receipt+replica: what is answered is on the gateway's disk and in a replica's memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import redis

from entitlement import keys
from entitlement.account import HotGrant
from entitlement.v1 import gateway_pb2 as pb
from tests.conftest import start_or_skip
from tests.gateway_rig import Rig, rig
from tests.hot_stores import CUSTOMER, TENANT, TOKENS, account
from tests.openings import vouched
from tests.servers import ValkeyProcess, free_port


@pytest.fixture
def primary() -> Iterator[ValkeyProcess]:
    with start_or_skip(lambda: ValkeyProcess(port=free_port(), repl_diskless_sync_delay="0")) as server:
        yield server


@pytest.fixture
def replica(primary: ValkeyProcess) -> Iterator[ValkeyProcess]:
    with ValkeyProcess(replicaof=f"127.0.0.1 {primary.port}") as server:
        yield server


@pytest.fixture
async def gateway(primary: ValkeyProcess, replica: ValkeyProcess) -> AsyncIterator[Rig]:
    async with vouched(primary.url), rig(primary.url, redis_timeout_ms=500, durability="receipt+replica") as made:
        made.bench.put(account(HotGrant(1, 10**6)))
        assert made.client.wait(1, 20_000)
        yield made


def journaled(server: ValkeyProcess) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.xlen(keys.journal(keys.partition_of(TENANT, CUSTOMER))))


async def test_an_answer_is_on_the_replica(gateway: Rig, replica: ValkeyProcess) -> None:
    for number in range(1, 20):
        assert (await gateway.consume(f"k{number}", (TOKENS, 1))).sequence == number
        assert journaled(replica) == number


async def test_neighbours_wait_together_and_batches_too(gateway: Rig, replica: ValkeyProcess) -> None:
    answers = await asyncio.gather(*[gateway.consume(f"k{number}", (TOKENS, 1)) for number in range(200)])
    assert sorted(answer.sequence for answer in answers) == list(range(1, 201))
    waits = gateway.client.info("commandstats")["cmdstat_wait"]["calls"]
    assert waits < 200
    batch = pb.CheckAndConsumeBatchRequest()
    for number in range(50):
        call = batch.requests.add(idempotency_key=f"b{number}", customer=CUSTOMER)
        call.usage.add(feature=TOKENS, quantity=1)
    found = (await gateway.stub.CheckAndConsumeBatch(batch, timeout=10)).responses
    assert [response.sequence for response in found] == list(range(201, 251))
    assert journaled(replica) == 250


async def test_without_a_replica_nothing_is_acknowledged_and_a_retry_converges(
    gateway: Rig, replica: ValkeyProcess
) -> None:
    replica.pause()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await gateway.consume("k1", (TOKENS, 5))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "no replica has it yet" in str(error.value.details())
    finally:
        replica.resume()
    async with asyncio.timeout(20):
        while True:
            try:
                answer = await gateway.consume("k1", (TOKENS, 5))
                break
            except grpc.aio.AioRpcError as again:
                assert again.code() is grpc.StatusCode.UNAVAILABLE
    assert (answer.replayed, answer.sequence) == (True, 1)
    assert (await gateway.balance()).available_nanos == 10**6 - 5


async def test_a_denial_waits_for_nobody(gateway: Rig, replica: ValkeyProcess) -> None:
    replica.pause()
    try:
        assert (await gateway.consume("k1", (TOKENS, 10**7))).verdict == pb.VERDICT_DENY
    finally:
        replica.resume()
