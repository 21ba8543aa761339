"""What the gateway does not have it asks for, once: accounts, plans, prices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import msgspec
import pytest

from entitlement import keys
from entitlement.account import Account, HotGrant
from entitlement.catalog import Feature
from entitlement.rating import Rate
from entitlement.v1 import gateway_pb2 as pb
from tests.gateway_rig import FEATURES, RATES, Rig, card, rig
from tests.hot_stores import TOKENS, account

DEADLINE_S = 10.0


@pytest.fixture
async def gateway(valkey_url: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, load_timeout_ms=5_000) as made:
        yield made
        assert made.process._transport.failures == 0


def on_plan(plan: str, *grants: HotGrant) -> Account:
    made = account(*grants)
    return msgspec.structs.replace(made, config=msgspec.structs.replace(made.config, plan=plan))


async def amount(gateway: Rig, key: str, event_ms: int = 0) -> tuple[str, int]:
    answer = await gateway.consume(key, (TOKENS, 10), event_ms=event_ms)
    (line,) = answer.consumed
    return line.rate_card_version, line.amount_nanos


async def until(gateway: Rig, expected: tuple[str, int]) -> None:
    """Asks until the price is the expected one."""
    async with asyncio.timeout(DEADLINE_S):
        number = 0
        while await amount(gateway, f"until-{gateway.bench.now()}-{number}") != expected:
            number += 1


async def test_an_account_that_is_not_here_is_asked_for_and_decided_on(gateway: Rig) -> None:
    ledger = asyncio.create_task(gateway.plays_ledger({"bob": account(HotGrant(1, 1_000))}, 1))
    answer = await gateway.consume("k1", (TOKENS, 10))
    assert (answer.verdict, answer.balance.available_nanos) == (pb.VERDICT_ALLOW, 990)
    assert await ledger == ["bob"]


async def test_100_callers_of_an_account_that_is_not_here_ask_for_it_once(gateway: Rig) -> None:
    ledger = asyncio.create_task(gateway.plays_ledger({"bob": account(HotGrant(1, 1_000))}, 1))
    answers = await asyncio.gather(*(gateway.consume(f"k{number}", (TOKENS, 10)) for number in range(100)))
    assert {answer.verdict for answer in answers} == {pb.VERDICT_ALLOW}
    assert sorted(answer.sequence for answer in answers) == list(range(1, 101))
    assert await ledger == ["bob"]
    assert gateway.asked() == []


async def test_each_account_is_asked_for_on_its_own(gateway: Rig) -> None:
    customers = {f"c{number}": account(HotGrant(1, 1_000)) for number in range(20)}
    ledger = asyncio.create_task(gateway.plays_ledger(dict(customers), 20))
    calls = [gateway.consume(f"k{number}", (TOKENS, 10), customer=name) for name in customers for number in range(5)]
    answers = await asyncio.gather(*calls)
    assert {answer.verdict for answer in answers} == {pb.VERDICT_ALLOW}
    assert sorted(await ledger) == sorted(customers)
    assert gateway.asked() == []


async def test_a_balance_loads_its_account_too(gateway: Rig) -> None:
    ledger = asyncio.create_task(gateway.plays_ledger({"bob": account(HotGrant(1, 1_000))}, 1))
    assert (await gateway.balance()).available_nanos == 1_000
    assert await ledger == ["bob"]


async def test_an_account_that_comes_without_news_is_noticed(gateway: Rig) -> None:
    """The news may be lost with a connection: the gateway looks, and asks again."""
    calling = asyncio.create_task(gateway.consume("k1", (TOKENS, 10)))
    lists = [keys.install_requests(partition) for partition in range(keys.PARTITIONS)]
    for _ in range(2):
        assert await asyncio.to_thread(gateway.client.blpop, lists, DEADLINE_S) is not None
    gateway.bench.put(account(HotGrant(1, 1_000)))
    assert (await calling).verdict == pb.VERDICT_ALLOW


async def test_news_that_cannot_be_read_does_no_harm(gateway: Rig) -> None:
    gateway.client.publish(keys.LOADED_CHANNEL, b"\xff\xfe")
    gateway.client.publish(keys.LOADED_CHANNEL, b"")
    ledger = asyncio.create_task(gateway.plays_ledger({"bob": account(HotGrant(1, 1_000))}, 1))
    assert (await gateway.consume("k1", (TOKENS, 10))).verdict == pb.VERDICT_ALLOW
    assert await ledger == ["bob"]


async def test_an_account_that_does_not_come_in_time_is_unavailable_for_all_who_wait(valkey_url: str) -> None:
    async with rig(valkey_url, load_timeout_ms=100) as gateway:
        calls = [gateway.consume(f"k{number}", (TOKENS, 10)) for number in range(20)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {outcome.code() for outcome in outcomes} == {grpc.StatusCode.UNAVAILABLE}  # type: ignore[union-attr]
        assert "'bob' is not loaded and did not come within 100 ms" in str(outcomes[0])
        assert gateway.asked() == [("acme", "bob")]
        gateway.bench.put(account(HotGrant(1, 1_000)))
        assert (await gateway.consume("k1", (TOKENS, 10))).verdict == pb.VERDICT_ALLOW


async def test_a_caller_that_goes_away_does_not_end_the_loading_for_the_others(gateway: Rig) -> None:
    first = asyncio.create_task(gateway.consume("k1", (TOKENS, 10)))
    lists = [keys.install_requests(partition) for partition in range(keys.PARTITIONS)]
    assert await asyncio.to_thread(gateway.client.blpop, lists, DEADLINE_S) is not None
    second = asyncio.create_task(gateway.consume("k2", (TOKENS, 10)))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gateway.bench.put(account(HotGrant(1, 1_000)))
    gateway.client.publish(keys.LOADED_CHANNEL, "acme bob")
    assert (await second).verdict == pb.VERDICT_ALLOW


async def test_a_new_price_goes_live_without_a_restart(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 10**9)))
    assert await amount(gateway, "k1") == ("1", 10)
    gateway.publish(card(1), card(2, gateway.bench.now() - 1, (Rate(TOKENS, 7),)))
    await until(gateway, ("2", 70))
    assert await amount(gateway, "k1") == ("1", 10)  # What was answered stays answered.


async def test_a_price_announced_for_later_begins_at_its_time(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 10**9)))
    at = gateway.bench.now() + 700
    gateway.publish(card(1), card(2, at, (Rate(TOKENS, 7),)))
    await until(gateway, ("2", 70))
    for record in gateway.journal():
        assert (record.rate_version == "2") == (record.recorded_ms >= at)  # type: ignore[union-attr]


async def test_an_old_event_has_the_price_of_its_time_and_one_ahead_that_of_now(gateway: Rig) -> None:
    now = gateway.bench.now()
    gateway.bench.put(account(HotGrant(1, 10**9)))
    gateway.publish(card(1), card(2, now - 60_000, (Rate(TOKENS, 7),)), card(3, now + 60_000, (Rate(TOKENS, 9),)))
    await until(gateway, ("2", 70))
    assert await amount(gateway, "old", event_ms=now - 60_001) == ("1", 10)
    assert await amount(gateway, "on-time", event_ms=now - 60_000) == ("2", 70)
    assert await amount(gateway, "ahead", event_ms=now + 120_000) == ("2", 70)


async def test_an_account_that_moves_to_another_plan_has_its_price_at_once(gateway: Rig) -> None:
    gateway.publish(card(1), card(4, 0, (Rate(TOKENS, 3),), "premium"))
    gateway.bench.put(account(HotGrant(1, 10**9)))
    await until(gateway, ("1", 10))
    gateway.bench.put(on_plan("premium", HotGrant(1, 10**9)))
    assert await amount(gateway, "k2") == ("4", 30)
    gateway.bench.put(account(HotGrant(1, 10**9)))
    assert await amount(gateway, "k3") == ("1", 10)


async def test_a_plan_published_a_moment_ago_is_found_by_every_one_of_many_callers(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 10**9)))
    assert await amount(gateway, "k1") == ("1", 10)
    gateway.bench.put(on_plan("brand-new", HotGrant(1, 10**9)))
    gateway.publish(card(1), card(9, 0, (Rate(TOKENS, 5),), "brand-new"))
    found = await asyncio.gather(*(amount(gateway, f"m{number}") for number in range(100)))
    assert set(found) == {("9", 50)}


async def test_a_plan_that_nobody_published_has_no_price(gateway: Rig) -> None:
    gateway.bench.put(on_plan("unheard-of", HotGrant(1, 10**9)))
    assert (await gateway.consume("k1", (TOKENS, 10))).reason == pb.REASON_PRICE_UNKNOWN


async def test_a_catalogue_that_cannot_be_read_leaves_the_last_one_in_force(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 10**9)))
    assert await amount(gateway, "k1") == ("1", 10)
    for number, garbage in enumerate((b"", b"\xff\xfe", b"[]", b'{"generation": 1, "tenants": [{"rate_cards": 7}]}')):
        gateway.client.set(keys.CATALOG, garbage)
        gateway.client.incr(keys.CATALOG_GENERATION)
        gateway.bench.put(on_plan("other", HotGrant(1, 1)), "somebody")
        with pytest.raises(grpc.aio.AioRpcError) as error:  # Its plan is not in the last catalogue that was read.
            await gateway.consume("s", (TOKENS, 1), customer="somebody")
        assert (error.value.code(), str(error.value.details()).partition(":")[0]) == (
            grpc.StatusCode.UNAVAILABLE,
            "catalogue",
        )
        assert await amount(gateway, f"m{number}") == ("1", 10)
    gateway.publish(card(1), card(2, 0, (Rate(TOKENS, 7),)))
    await until(gateway, ("2", 70))


async def test_a_feature_that_joins_the_catalogue_is_sold_and_one_that_leaves_is_not(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 10**9)))
    assert (await gateway.consume("k1", ("video", 1))).reason == pb.REASON_FEATURE_NOT_FOUND
    gateway.publish(card(1, 0, (*RATES, Rate("video", 5))), features=(*FEATURES, Feature("video")))
    async with asyncio.timeout(DEADLINE_S):
        while (await gateway.consume("k1", ("video", 1))).verdict != pb.VERDICT_ALLOW:
            pass
    gateway.publish(card(1))
    async with asyncio.timeout(DEADLINE_S):
        number = 0
        while (await gateway.consume(f"gone-{number}", ("video", 1))).reason != pb.REASON_FEATURE_NOT_FOUND:
            number += 1
