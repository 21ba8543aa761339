"""Processes and servers end in the middle of traffic, and come back: nothing answered is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from entitlement.v1 import ledger_pb2
from gateway.cli.stack import START_ORDER, DevStack, Name
from gateway.client import Client
from tests.stacks import Site, down_and_up, on_sockets, opened, persist, price_of, put_catalogue, site
from tests.traffic import Answer, Audit, Traffic, audit, balances_add_up, by_client, by_stub, flowing

KILLS = 10
MOST_BETWEEN = 400  # answers between two kills
CLIENT_MS = 20_000

pytestmark = pytest.mark.slow


async def proven(at: Site, answers: dict[str, Answer]) -> str:
    """Every answer is in the ledger once, with its amount; no drift, no gap; every event is out. The figures."""
    await at.verified()
    found = await audit(at, answers)
    assert found.clean, found
    await balances_add_up(at, answers)
    return (
        f"answers {len(answers)} (allowed {found.allowed}, denied {found.denied}, replayed {found.replayed}), "
        f"lost {len(found.lost)}, doubled {len(found.doubled)}, unasked {len(found.unasked)}, "
        f"events published again {found.republished}"
    )


@pytest.mark.timeout(180)
async def test_kill_9_of_gateway_or_ledger_sync_loses_and_doubles_nothing(fragile: DevStack, seed: int) -> None:
    random = Random(seed)
    took: dict[Name, list[float]] = {"gateway": [], "sync": []}
    async with opened(fragile) as (at, customers):
        async with flowing(Traffic(by_stub(at), customers, random)) as traffic:
            for number in range(KILLS):
                name: Name = ("gateway", "sync")[number % 2]
                await traffic.more(random.randrange(1, MOST_BETWEEN))
                topped_up = asyncio.create_task(_top_up(at, random.choice(customers), f"top-up-{number}"))
                took[name].append(await down_and_up(fragile, name))
                await topped_up
                customers.append(await persist(lambda: at.customer(price_of(10**6))))
            await traffic.more(MOST_BETWEEN)
        figures = await proven(at, traffic.answers)
    slowest = ", ".join(f"{name} back in {max(times):.1f} s at most" for name, times in took.items())
    print(f"kills {KILLS}, {figures}, unknown {dict(traffic.unknown)}, {slowest}")


async def _top_up(at: Site, customer: str, grant: str) -> None:
    """A ledger change in the middle of it, asked for until it is answered, under one id."""
    await persist(lambda: at.grant(customer, ledger_pb2.Grant(id=grant, amount_nanos=price_of(7))))


@pytest.mark.parametrize("name", ["valkey", "postgres"])
async def test_a_server_that_restarts_under_load_loses_and_doubles_nothing(
    fragile: DevStack, seed: int, name: Name
) -> None:
    random = Random(seed)
    async with opened(fragile) as (at, customers), Client(fragile.gateway, timeout_ms=CLIENT_MS) as client:
        async with flowing(Traffic(by_client(client), customers, random)) as traffic:
            await traffic.more(random.randrange(1, MOST_BETWEEN))
            await asyncio.to_thread(fragile.restart, name)  # Gently.
            if name == "valkey":  # With everysec, on a busy disk, it answers before it writes: a kill would lose that.
                await at.hot.config_set("appendfsync", "always")
            await traffic.more(random.randrange(1, MOST_BETWEEN))
            took_s = await down_and_up(fragile, name)
            await traffic.more(MOST_BETWEEN)
        figures = await proven(at, traffic.answers)
    print(f"{name} restarted twice, back {took_s:.1f} s after a kill, {figures}, unknown {dict(traffic.unknown)}")


async def test_decisions_go_on_while_the_ledger_is_away(fragile: DevStack, seed: int) -> None:
    random = Random(seed)
    async with opened(fragile) as (at, customers):
        for customer in customers:
            await at.balance(customer)  # It is loaded: from here on the hot store needs nobody.
        await asyncio.to_thread(fragile.kill, "sync")
        await asyncio.to_thread(fragile.kill, "postgres")
        async with flowing(Traffic(by_stub(at), customers, random)) as traffic:
            await traffic.more(2_000)
        assert not traffic.unknown
        await asyncio.to_thread(fragile.restart, "postgres")
        await asyncio.to_thread(fragile.restart, "sync")
        print(f"without a ledger: {await proven(at, traffic.answers)}")


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_stack_that_ends_whole_and_is_started_again_has_its_balances(
    transport: str, folders: Callable[[], Path], seed: int, how: str
) -> None:
    random, folder = Random(seed), folders()
    first, second = on_sockets(folder, transport), on_sockets(folder, transport)
    try:
        await asyncio.to_thread(first.start)
        await asyncio.to_thread(put_catalogue, first)
        async with opened(first) as (at, customers):
            async with flowing(Traffic(by_stub(at), customers, random)) as traffic:
                await traffic.more(500)
            await asyncio.to_thread(first.kill, "sync")  # What comes now stays in the journal.
            async with flowing(traffic_after := Traffic(by_stub(at), customers, random)):
                await traffic_after.more(500)
            before = {customer: await at.balance(customer) for customer in customers}
        for name in START_ORDER if how == "killed" else ():
            await asyncio.to_thread(first.kill, name)
        await asyncio.to_thread(first.stop)
        await asyncio.to_thread(second.start)
        async with site(second) as at:
            after = {customer: await persist(partial(at.balance, customer)) for customer in customers}
            assert after == before
            async with flowing(more := Traffic(by_stub(at), customers, random)):
                await more.more(200)
            everything = traffic.answers | traffic_after.answers | more.answers
            print(f"{how}, {await proven(at, everything)}")
    finally:
        await asyncio.to_thread(first.stop)
        await asyncio.to_thread(second.stop)


async def forgets(stack: DevStack, seed: int) -> tuple[Audit, list[str]]:
    """What is found when the hot store is gone, with what the ledger has not seen; and what was allowed of that."""
    random = Random(seed)
    async with opened(stack) as (at, customers):
        async with flowing(Traffic(by_stub(at), customers, random)) as traffic:
            await traffic.more(100)
        await proven(at, traffic.answers)
        await asyncio.to_thread(stack.kill, "sync")
        await at.hot.config_set("appendonly", "no")
        async with flowing(unseen := Traffic(by_stub(at), customers, random)):
            await unseen.more(100)
        await down_and_up(stack, "valkey")
        await asyncio.to_thread(stack.restart, "sync")
        for customer in customers:
            await persist(partial(at.balance, customer))  # Answered only after the receipts have been replayed.
        await at.verified()
        found = await audit(at, traffic.answers | unseen.answers)
    return found, sorted(answer.key for answer in unseen.answers.values() if answer.allowed)


async def test_what_the_hot_store_forgot_comes_back_with_the_receipts(fragile: DevStack, seed: int) -> None:
    found, unseen = await forgets(fragile, seed)
    assert found.clean and unseen


async def test_the_audit_sees_what_is_lost_without_receipts(unprotected: DevStack, seed: int) -> None:
    """The proof of the proof: with the protection off, the same audit must fail."""
    found, unseen = await forgets(unprotected, seed)
    assert found.lost == unseen
    assert not found.clean
