"""The Python client against the gateway's own process on a real Valkey: what is answered is what is debited, once."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from entitlement.account import HotGrant
from entitlement.journal import Consumed
from entitlement.v1 import gateway_pb2 as pb
from gateway.client import (
    Backoff,
    Client,
    CustomerNotFound,
    Decision,
    IdempotencyMismatch,
    InvalidArgument,
    Reason,
    Request,
    SyncClient,
    Usage,
    Verdict,
)
from tests.gateway_rig import Rig, rig
from tests.hot_stores import CUSTOMER, IMAGES, TOKENS, account
from tests.servers import ValkeyProcess

Result = TypeVar("Result")


@pytest.fixture
def socket() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="client-") as folder:
        yield f"unix:{Path(folder) / 'gateway.sock'}"


@pytest.fixture
async def gateway(valkey_url: str, socket: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, listen=socket) as made:
        yield made


@pytest.fixture
async def client(gateway: Rig, socket: str) -> AsyncIterator[Client]:
    async with Client(socket, timeout_ms=20_000) as started:
        yield started


def journaled(gateway: Rig) -> list[str]:
    """The keys that were charged, in order."""
    records = [record for record in gateway.journal() if isinstance(record, Consumed)]
    return [pb.CheckAndConsumeRequest.FromString(record.request).idempotency_key for record in records]


async def thread(call: Callable[[], Result]) -> Result:
    async with asyncio.timeout(60):
        return await asyncio.to_thread(call)


async def test_a_hundred_tasks_that_ask_one_after_the_other_travel_together_and_are_each_charged_once(
    gateway: Rig, client: Client
) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000_000)))

    async def work(task: int) -> list[Decision]:
        keys = [f"t{task}-{n}" for n in range(20)]
        return [await client.check_and_consume(CUSTOMER, TOKENS, 3, key=key) for key in keys]

    decided = [decision for done in await asyncio.gather(*map(work, range(100))) for decision in done]
    assert all(decision.allowed and decision.consumed[0].amount_nanos == 3 for decision in decided)
    assert sorted(decision.sequence for decision in decided) == list(range(1, 2_001))
    assert {decision.key for decision in decided} == {f"t{task}-{n}" for task in range(100) for n in range(20)}
    balance = await client.balance(CUSTOMER, at_least_sequence=2_000)
    assert (balance.available_nanos, balance.settled_nanos, balance.sequence) == (994_000, 6_000, 2_000)
    assert balance.as_of is not None
    assert len(journaled(gateway)) == 2_000
    assert client._running is not None and client._running.decisions.lane._departed < 200


async def test_a_thousand_calls_against_a_balance_for_four_hundred(gateway: Rig, client: Client) -> None:
    gateway.bench.put(account(HotGrant(1, 400)))
    requests = [Request(CUSTOMER, [Usage(TOKENS, 1)]) for _ in range(1_000)]
    decided = [decision for decision in await client.check_and_consume_many(requests) if isinstance(decision, Decision)]
    assert Counter((decision.verdict, decision.reason) for decision in decided) == {
        (Verdict.ALLOW, Reason.NONE): 400,
        (Verdict.DENY, Reason.INSUFFICIENT_CREDITS): 600,
    }
    assert {decision.failed_feature for decision in decided if not decision.allowed} == {TOKENS}


async def test_many_callers_with_one_key_are_one_charge(gateway: Rig, client: Client) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))
    decided = await asyncio.gather(*[client.check_and_consume(CUSTOMER, TOKENS, 7, key="one") for _ in range(64)])
    assert Counter(decision.replayed for decision in decided) == {False: 1, True: 63}
    assert {(decision.sequence, decision.balance.available_nanos) for decision in decided} == {(1, 993)}
    assert len(journaled(gateway)) == 1


async def test_each_of_a_batch_has_its_own_fate(gateway: Rig, client: Client) -> None:
    gateway.bench.put(account(HotGrant(1, 10_000)))
    gateway.bench.put_missing("nobody")
    await client.check_and_consume(CUSTOMER, TOKENS, 1, key="used")
    two_lines = [Usage(TOKENS, 5, {"model": "m3"}), Usage(IMAGES, 1)]
    allowed, mismatch, zero, unknown_feature, unknown_customer, capped = await client.check_and_consume_many(
        [
            Request(CUSTOMER, two_lines, key="two"),
            Request(CUSTOMER, [Usage(TOKENS, 2)], key="used"),
            Request(CUSTOMER, [Usage(TOKENS, 0)], key="zero"),
            Request(CUSTOMER, [Usage("videos", 1)], key="videos"),
            Request("nobody", [Usage(TOKENS, 1)], key="nobody"),
            Request(CUSTOMER, [Usage(IMAGES, 100)], key="capped", mode="best_effort"),
        ]
    )
    assert isinstance(allowed, Decision) and [line.amount_nanos for line in allowed.consumed] == [15, 1_000]
    assert isinstance(mismatch, IdempotencyMismatch) and mismatch.key == "used"
    assert isinstance(zero, InvalidArgument) and zero.message.startswith("usage[0].quantity: 0 ")
    assert isinstance(unknown_feature, Decision) and unknown_feature.reason is Reason.FEATURE_NOT_FOUND
    assert isinstance(unknown_customer, Decision) and unknown_customer.reason is Reason.CUSTOMER_NOT_FOUND
    assert isinstance(capped, Decision) and capped.verdict is Verdict.ALLOW_WITH_CAPS
    assert (capped.allowed, capped.consumed[0].quantity) == (True, 8)
    with pytest.raises(CustomerNotFound):
        await client.balance("nobody")


async def test_an_account_that_has_to_be_loaded_first_is(gateway: Rig, client: Client) -> None:
    gateway.bench.put(account(HotGrant(1, 100)))
    ledger = asyncio.create_task(gateway.plays_ledger({"cold": account(HotGrant(1, 50))}, 1))
    warm, cold = await asyncio.gather(
        client.check_and_consume(CUSTOMER, TOKENS, 1), client.check_and_consume("cold", TOKENS, 1)
    )
    assert (warm.balance.available_nanos, cold.balance.available_nanos) == (99, 49)
    assert await ledger == ["cold"]


async def test_a_watcher_sees_what_is_consumed(gateway: Rig, client: Client) -> None:
    gateway.bench.put(account(HotGrant(1, 100)))
    async with asyncio.timeout(20):
        watch = client.watch_balance(CUSTOMER)
        assert (await anext(watch)).available_nanos == 100
        await client.check_and_consume(CUSTOMER, TOKENS, 30)
        assert (await anext(watch)).available_nanos == 70
        await watch.aclose()


async def test_a_call_whose_answer_was_lost_is_charged_once(socket: str) -> None:
    """The store stops in the middle; the gateway gives up; the same key is asked again until the store is back."""
    failed, loop = asyncio.Event(), asyncio.get_running_loop()

    def jitter() -> float:
        loop.call_soon(failed.set)
        return 1.0

    with ValkeyProcess() as valkey:
        async with rig(valkey.url, listen=socket, redis_timeout_ms=100) as gateway:
            gateway.bench.put(account(HotGrant(1, 100)))
            async with Client(socket, timeout_ms=30_000, backoff=Backoff(jitter=jitter)) as client:
                await client.check_and_consume(CUSTOMER, TOKENS, 1, key="warm")
                valkey.pause()
                calls = [
                    asyncio.create_task(client.check_and_consume(CUSTOMER, TOKENS, 10, key=f"k{n}")) for n in range(3)
                ]
                async with asyncio.timeout(20):
                    await failed.wait()
                    valkey.resume()
                    decided = await asyncio.gather(*calls)
                assert all(decision.allowed for decision in decided)
                assert (await client.balance(CUSTOMER)).available_nanos == 69
            assert sorted(journaled(gateway)) == ["k0", "k1", "k2", "warm"]


async def test_traffic_goes_on_over_a_gateway_that_is_replaced(valkey_url: str, socket: str) -> None:
    half = asyncio.Event()
    decided: list[Decision] = []

    async def work(client: Client, task: int) -> None:
        while len(decided) < 2_000:
            key = f"t{task}-{len(decided)}"
            decided.append(await client.check_and_consume(CUSTOMER, TOKENS, 1, key=key))
            if len(decided) >= 500:
                half.set()

    async with Client(socket, timeout_ms=30_000) as client, asyncio.timeout(60):
        async with rig(valkey_url, listen=socket) as first:
            first.bench.put(account(HotGrant(1, 1_000_000)))
            tasks = [asyncio.create_task(work(client, task)) for task in range(20)]
            await half.wait()
        async with rig(valkey_url, listen=socket) as second:
            await asyncio.gather(*tasks)
            assert all(decision.allowed for decision in decided)
            keys = journaled(second)
    assert sorted(keys) == sorted(decision.key for decision in decided)
    assert sorted(decision.sequence for decision in decided) == list(range(1, len(decided) + 1))


async def test_threads_are_served_alike(gateway: Rig, socket: str) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))

    def work() -> list[Decision]:
        with SyncClient(socket, timeout_ms=20_000) as client, ThreadPoolExecutor(16) as threads:
            decided = list(
                threads.map(lambda n: client.check_and_consume(CUSTOMER, TOKENS, 1, key=f"k{n}"), range(320))
            )
            again = client.check_and_consume_many(
                [Request(CUSTOMER, [Usage(TOKENS, 1)], key=f"k{n}") for n in range(9)]
            )
            assert all(isinstance(decision, Decision) and decision.replayed for decision in again)
            assert client.balance(CUSTOMER, at_least_sequence=320).available_nanos == 680
            watch = client.watch_balance(CUSTOMER)
            assert next(watch).available_nanos == 680
            client.check_and_consume(CUSTOMER, TOKENS, 80)
            assert next(watch).available_nanos == 600
            watch.close()
            return decided

    decided = await thread(work)
    assert all(decision.allowed for decision in decided)
    assert sorted(decision.sequence for decision in decided) == list(range(1, 321))
    assert len(journaled(gateway)) == 321
