"""The hot store goes away, hangs, fills up and comes back: UNAVAILABLE within the deadline, then as before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement import keys
from entitlement.account import HotGrant
from entitlement.journal import Consumed
from entitlement.v1 import gateway_pb2 as pb
from tests.conftest import start_or_skip
from tests.gateway_rig import Rig, rig
from tests.hot_stores import TOKENS, account
from tests.openings import vouched
from tests.servers import ValkeyProcess

Answer = TypeVar("Answer")

TIMEOUT_MS = 200
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server() -> Iterator[ValkeyProcess]:
    """Its own, because it is killed; what it has answered is on disk."""
    with start_or_skip(lambda: ValkeyProcess(appendonly="yes", appendfsync="always")) as made:
        yield made


@pytest.fixture
async def gateway(server: ValkeyProcess) -> AsyncIterator[Rig]:
    async with vouched(server.url), rig(server.url, redis_timeout_ms=TIMEOUT_MS) as made:
        made.bench.put(account(HotGrant(1, 10**6)))
        await made.consume("warm", (TOKENS, 1))
        yield made
        assert made.process._transport.failures == 0


async def unavailable(gateway: Rig, key: str) -> str:
    """The details of a call that ends in UNAVAILABLE: not by the caller's own deadline, which would say so."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.consume(key, (TOKENS, 1), timeout=30)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(error.value.details())


async def health_is(gateway: Rig, status: int) -> None:
    """Returns when the process says so."""
    watch = health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
    while (await watch.read()).status != status:
        pass
    watch.cancel()


async def insisting(gateway: Rig, key: str) -> pb.CheckAndConsumeResponse:
    return await insisted(lambda: gateway.consume(key, (TOKENS, 1)))


async def insisted(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """As a client should: the same call, with the same key, again until there is an answer."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                await asyncio.sleep(0)


async def test_a_killed_hot_store_is_unavailable_at_once_and_works_again_after_its_restart(
    gateway: Rig, server: ValkeyProcess
) -> None:
    assert (await gateway.consume("k1", (TOKENS, 10))).balance.available_nanos == 10**6 - 11
    server.kill()
    assert "hot store" in await unavailable(gateway, "k2")
    await health_is(gateway, NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.balance()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.to_thread(server.restart)
    await health_is(gateway, SERVING)
    assert (await insisting(gateway, "k2")).sequence == 3
    again = await gateway.consume("k1", (TOKENS, 10))
    assert (again.replayed, again.balance.available_nanos) == (True, 10**6 - 11)  # The append-only file has it.


async def test_kills_under_load_lose_and_double_nothing(gateway: Rig, server: ValkeyProcess) -> None:
    callers = [asyncio.create_task(insisting(gateway, f"k{number}")) for number in range(600)]
    for number in (50, 200, 350):
        await asyncio.wait([callers[number]])
        server.kill()
        await asyncio.to_thread(server.restart)
    answers = await asyncio.gather(*callers)
    records = [record for record in gateway.journal() if isinstance(record, Consumed)]
    keys_charged = [pb.CheckAndConsumeRequest.FromString(record.request).idempotency_key for record in records]
    assert sorted(keys_charged) == sorted(["warm", *(f"k{number}" for number in range(600))])
    charged = dict(zip(keys_charged, records, strict=True))
    assert all(charged[answer.idempotency_key].sequence == answer.sequence for answer in answers)
    assert [record.sequence for record in records] == list(range(1, 602))
    # The last answers may have come just before the last kill.
    assert (await insisted(gateway.balance)).available_nanos == 10**6 - 601


async def test_a_hot_store_that_hangs_is_unavailable_within_the_deadline_and_no_answer_is_crossed(
    gateway: Rig, server: ValkeyProcess
) -> None:
    server.pause()
    try:
        assert f"no answer within {TIMEOUT_MS} ms" in await unavailable(gateway, "k1")
        outcomes = await asyncio.gather(*(unavailable(gateway, f"m{number}") for number in range(50)))
        assert len(outcomes) == 50
        # The store ended each, while the server still hung. How soon: test_connection_deadlines, by a hand-moved clock.
        assert all(told.startswith("hot store: ") for told in outcomes), set(outcomes)
    finally:
        server.resume()
    answers = await asyncio.gather(*(insisting(gateway, f"m{number}") for number in range(50)))
    assert [answer.idempotency_key for answer in answers] == [f"m{number}" for number in range(50)]
    assert {answer.verdict for answer in answers} == {pb.VERDICT_ALLOW}
    first = await insisting(gateway, "k1")
    assert first.replayed  # It had been decided: only its answer was late.
    assert (await gateway.balance()).settled_nanos == 52


async def test_too_many_calls_in_flight_are_refused_and_nothing_is_tried(server: ValkeyProcess) -> None:
    async with rig(server.url, redis_timeout_ms=2_000, max_in_flight=10) as gateway:
        gateway.bench.put(account(HotGrant(1, 10**6)))
        await gateway.consume("warm", (TOKENS, 1))
        server.pause()
        try:
            calls = [
                asyncio.create_task(gateway.consume(f"k{number}", (TOKENS, 1), timeout=30)) for number in range(30)
            ]
            for ended, call in enumerate(asyncio.as_completed(calls), 1):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
                if ended == 20:
                    break
        finally:
            server.resume()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len(refused) == 20
        assert "the limit is 10; retry with the same key" in str(refused[0].details())
        assert gateway.process.admission.in_flight == 0
        assert (await gateway.balance()).settled_nanos == 11


async def test_a_full_hot_store_is_unavailable_and_changes_nothing(gateway: Rig) -> None:
    gateway.client.config_set("maxmemory", 1)
    before = gateway.bench.everything()
    assert "OOM" in await unavailable(gateway, "k1")
    assert gateway.bench.everything() == before
    gateway.client.config_set("maxmemory", 0)
    assert (await gateway.consume("k1", (TOKENS, 1))).sequence == 2


async def test_an_emptied_hot_store_grants_nothing_until_the_account_is_loaded_again(server: ValkeyProcess) -> None:
    async with rig(server.url, load_timeout_ms=200) as gateway:
        gateway.bench.put(account(HotGrant(1, 10**6)))
        await gateway.consume("k1", (TOKENS, 1))
        for key in (*gateway.client.keys("a:*"), *gateway.client.keys("i:*")):
            gateway.client.delete(key)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await gateway.consume("k2", (TOKENS, 1))
        assert (error.value.code(), "is not loaded" in str(error.value.details())) == (
            grpc.StatusCode.UNAVAILABLE,
            True,
        )
        assert gateway.asked() == [("acme", "bob")]
        gateway.bench.put(account(HotGrant(1, 10), sequence=1))
        assert (await gateway.consume("k2", (TOKENS, 1))).sequence == 2
        assert gateway.client.get(keys.CATALOG) is not None
