"""The failure policy: what is granted while the hot store is away is answered as degraded, and settled later, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from entitlement import keys
from entitlement.account import HotGrant
from entitlement.catalog import Catalogs, Policy, Snapshot
from entitlement.journal import Consumed
from entitlement.v1 import gateway_pb2 as pb
from tests.conftest import start_or_skip
from tests.gateway_rig import FEATURES, Rig, card, rig
from tests.hot_stores import CUSTOMER, IMAGES, PLAN, TENANT, TOKENS, account
from tests.openings import vouched
from tests.servers import ValkeyProcess

ALLOWANCE, CREDIT = 100, 10**6
ALLOW, DENY = pb.VERDICT_ALLOW, pb.VERDICT_DENY


@pytest.fixture
def server() -> Iterator[ValkeyProcess]:
    with start_or_skip(lambda: ValkeyProcess(appendonly="yes", appendfsync="always")) as made:
        yield made


@pytest.fixture
async def gateway(server: ValkeyProcess) -> AsyncIterator[Rig]:
    """bob goes on up to his allowance, ann has no policy."""
    async with vouched(server.url), rig(server.url, redis_timeout_ms=200) as made:
        policies = (Policy(CUSTOMER, PLAN, ALLOWANCE), Policy("eve", PLAN, ALLOWANCE, (IMAGES,)))
        snapshot = Snapshot(TENANT, 99, FEATURES, (card(1),), policies)
        made.client.set(keys.CATALOG, Catalogs(99, (snapshot,)).encode())
        made.client.set(keys.CATALOG_GENERATION, 99)
        for customer in (CUSTOMER, "ann", "eve"):
            made.bench.put(account(HotGrant(1, CREDIT)), customer)
        async with asyncio.timeout(10):
            while made.process._core._catalog.generation != 99:  # noqa: ASYNC110 - the gateway looks by itself
                await asyncio.sleep(0.01)
        await made.consume("warm", (TOKENS, 1))
        yield made


async def away(gateway: Rig, server: ValkeyProcess) -> None:
    server.kill()
    async with asyncio.timeout(10):
        while gateway.process._core._store.connected:  # noqa: ASYNC110 - it is a socket that tells
            await asyncio.sleep(0.01)


async def settled(gateway: Rig, server: ValkeyProcess, *wanted: str) -> list[Consumed]:
    """bob's journal, once it has these keys."""
    async with asyncio.timeout(20):
        while True:
            records = [record for record in gateway.journal() if isinstance(record, Consumed)]
            if set(wanted) <= {key_of(record) for record in records}:
                return records
            await asyncio.sleep(0.02)


def key_of(record: Consumed) -> str:
    return pb.CheckAndConsumeRequest.FromString(record.request).idempotency_key


async def test_it_goes_on_up_to_the_allowance_and_settles_once(gateway: Rig, server: ValkeyProcess) -> None:
    await away(gateway, server)
    first = await gateway.consume("d1", (TOKENS, 60))
    assert (first.verdict, first.degraded, first.consumed[0].amount_nanos) == (ALLOW, True, 60)
    again = await gateway.consume("d1", (TOKENS, 60))
    assert (again.degraded, again.replayed) == (True, True)
    denied = await gateway.consume("d2", (TOKENS, 41))
    assert (denied.verdict, denied.reason, denied.degraded) == (DENY, pb.REASON_DEGRADED_DENY, True)
    assert (await gateway.consume("d3", (TOKENS, 40))).verdict == ALLOW
    with pytest.raises(grpc.aio.AioRpcError) as mismatch:
        await gateway.consume("d1", (TOKENS, 61))
    assert mismatch.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await asyncio.to_thread(server.restart)
    records = await settled(gateway, server, "d1", "d3")
    assert sorted((key_of(record), record.degraded, record.lines[0].amount) for record in records) == [
        ("d1", True, 60),
        ("d3", True, 40),
        ("warm", False, 1),
    ]
    assert (await gateway.balance()).available_nanos == CREDIT - 101
    known = await gateway.consume("d1", (TOKENS, 60))  # Now from the hot store's memory.
    assert (known.replayed, known.degraded, known.consumed[0].amount_nanos) == (True, False, 60)


async def test_without_a_policy_the_hot_store_is_waited_for(gateway: Rig, server: ValkeyProcess) -> None:
    await away(gateway, server)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.consume("a1", (TOKENS, 1), customer="ann")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_the_contract_does_not_entitle_to_is_denied(gateway: Rig, server: ValkeyProcess) -> None:
    await away(gateway, server)
    assert (await gateway.consume("e1", (TOKENS, 1), customer="eve")).reason == pb.REASON_DEGRADED_DENY


async def test_calls_at_the_same_time_share_one_allowance(gateway: Rig, server: ValkeyProcess) -> None:
    await away(gateway, server)
    answers = await asyncio.gather(*[gateway.consume(f"p{number}", (TOKENS, 3)) for number in range(60)])
    granted = [answer.idempotency_key for answer in answers if answer.verdict == ALLOW]
    assert len(granted) == ALLOWANCE // 3
    await asyncio.to_thread(server.restart)
    records = await settled(gateway, server, *granted)
    assert len(records) == 1 + len(granted)
    assert (await gateway.balance()).available_nanos == CREDIT - 1 - 3 * len(granted)


async def test_the_next_absence_has_the_whole_allowance_again(gateway: Rig, server: ValkeyProcess) -> None:
    for number in range(2):
        await away(gateway, server)
        assert (await gateway.consume(f"n{number}", (TOKENS, ALLOWANCE))).verdict == ALLOW
        await asyncio.to_thread(server.restart)
        await settled(gateway, server, f"n{number}")
    assert (await gateway.balance()).available_nanos == CREDIT - 1 - 2 * ALLOWANCE


async def test_what_was_unknown_and_then_granted_without_the_store_is_charged_once(
    gateway: Rig, server: ValkeyProcess
) -> None:
    """The hot store decides, and is too slow to say so."""
    server.pause()
    call = asyncio.create_task(gateway.consume("slow", (TOKENS, 7)))
    try:
        assert (await call).degraded
    finally:
        server.resume()
    await settled(gateway, server, "slow")
    async with asyncio.timeout(20):
        while gateway.process._core.receipts.owes:  # noqa: ASYNC110 - the gateway settles by itself
            await asyncio.sleep(0.02)
    assert [key_of(record) for record in await settled(gateway, server, "slow")] == ["warm", "slow"]
    assert (await gateway.balance()).available_nanos == CREDIT - 8
