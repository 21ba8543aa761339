"""Holds from the Python clients through both services: what is answered is what is held, charged and booked, once."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from gateway.cli.stack import DevStack
from gateway.client import Client, IdempotencyMismatch, InvalidArgument, Reason, SyncClient, Usage, Verdict
from tests.stacks import Site, fresh, price_of

CALL = price_of(1)
USD = 10**9
TIMEOUT_MS = 20_000


async def test_the_four_calls(at: Site, stack: DevStack) -> None:
    customer, hold = await at.customer(USD), fresh("h")
    async with Client(stack.gateway, timeout_ms=TIMEOUT_MS) as client:
        made = await client.reserve(customer, "calls", 100, hold=hold, ttl=timedelta(minutes=5))
        assert made.allowed and made.held[0].amount_nanos == made.balance.held_nanos == 100 * CALL
        assert made.expires_at is not None and made.expires_at.tzinfo is UTC
        assert timedelta(minutes=4) < made.expires_at - datetime.now(UTC) < timedelta(minutes=6)
        again = await client.reserve(customer, "calls", 100, hold=hold, ttl=timedelta(minutes=5))
        assert again.replayed and again.held == made.held and again.expires_at == made.expires_at
        with pytest.raises(IdempotencyMismatch) as refused:
            await client.reserve(customer, "calls", 101, hold=hold, ttl=timedelta(minutes=5))
        assert refused.value.key == hold

        more = await client.extend(customer, hold, "calls", 50, ttl=timedelta(days=1))
        assert more.balance.held_nanos == 150 * CALL and more.expires_at is not None
        assert more.expires_at > made.expires_at
        longest = await client.extend(customer, hold, ttl=timedelta(days=1))
        assert longest.expires_at is not None and longest.expires_at <= more.expires_at + timedelta(seconds=1)

        part = await client.settle(customer, hold, "calls", 30)
        assert (part.balance.held_nanos, part.consumed[0].amount_nanos) == (120 * CALL, 30 * CALL)
        last = [await client.settle(customer, hold, "calls", 40, key=f"{hold}-end", final=True) for _ in range(2)]
        assert [answer.replayed for answer in last] == [False, True] and last[0].consumed == last[1].consumed
        ended = await client.release(customer, hold)
        assert (ended.allowed, ended.reason) == (False, Reason.HOLD_FINALIZED)
        missing = await client.settle(customer, "never", "calls", 1)
        assert (missing.allowed, missing.reason) == (False, Reason.HOLD_NOT_FOUND)
        balance = await client.balance(customer)
        assert (balance.available_nanos, balance.held_nanos, balance.settled_nanos) == (USD - 70 * CALL, 0, 70 * CALL)
    await at.verified(customer)
    assert sum((await at.booked(customer)).values()) == 70 * CALL


async def test_tasks_with_a_block_each_share_what_there_is(at: Site, stack: DevStack) -> None:
    """Twelve of 75 against 500: six are held at once, never more. What was reported is charged, the rest is back."""
    customer = await at.customer(500 * CALL)
    everyone = asyncio.Barrier(12)

    async def work(client: Client) -> Verdict:
        async with client.hold(customer, "calls", 75, ttl=timedelta(minutes=5)) as hold:
            await everyone.wait()
            if hold.made.allowed:
                await hold.report("calls", 10)
                await hold.report(usage=[Usage("calls", 5)])
            return hold.made.verdict

    async with Client(stack.gateway, timeout_ms=TIMEOUT_MS) as client, asyncio.timeout(60):
        made = Counter(await asyncio.gather(*[work(client) for _ in range(12)]))
        assert made == {Verdict.ALLOW: 6, Verdict.DENY: 6}
        balance = await client.balance(customer)
    assert (balance.held_nanos, balance.settled_nanos) == (0, 6 * 15 * CALL)
    await at.verified(customer)


async def test_a_block_that_fails_holds_nothing(at: Site, stack: DevStack) -> None:
    customer = await at.customer(USD)
    async with Client(stack.gateway, timeout_ms=TIMEOUT_MS) as client:
        for reports in (0, 2):
            with pytest.raises(ZeroDivisionError):
                async with client.hold(customer, "calls", 50) as hold:
                    for _ in range(reports):
                        await hold.report("calls", 3)
                    raise ZeroDivisionError
        balance = await client.balance(customer)
    assert (balance.held_nanos, balance.available_nanos) == (0, USD - 6 * CALL)
    await at.verified(customer)


async def test_what_expired_is_reported_late_once(at: Site, stack: DevStack) -> None:
    customer, hold = await at.customer(USD), fresh("h")
    async with Client(stack.gateway, timeout_ms=TIMEOUT_MS) as client:
        await client.reserve(customer, "calls", 10, hold=hold, ttl=timedelta(seconds=1))
        await at.balance_when(customer, USD)
        over = await client.extend(customer, hold, ttl=timedelta(minutes=1))
        assert over.reason is Reason.HOLD_FINALIZED
        late = await client.settle(customer, hold, "calls", 12, final=True)
        assert late.allowed and late.late and late.balance.settled_nanos == 12 * CALL
        assert (await client.settle(customer, hold, "calls", 12)).reason is Reason.HOLD_FINALIZED
    await at.verified(customer)


async def test_what_is_wrong_is_told(at: Site, stack: DevStack) -> None:
    customer = await at.customer(USD)
    async with Client(stack.gateway, timeout_ms=TIMEOUT_MS) as client:
        with pytest.raises(InvalidArgument, match=r"ttl: 5 ms is outside 1 s\.\.24 h"):
            await client.reserve(customer, "calls", 1, ttl=timedelta(milliseconds=5))
        with pytest.raises(InvalidArgument, match="ttl: neither ttl nor more is set"):
            await client.extend(customer, "h")
        with pytest.raises(InvalidArgument, match="usage: reports nothing and is not final"):
            await client.settle(customer, "h")


async def test_threads_are_served_alike(at: Site, stack: DevStack) -> None:
    customer, hold = await at.customer(100 * CALL), fresh("h")

    def work() -> None:
        with SyncClient(stack.gateway, timeout_ms=TIMEOUT_MS) as client:
            capped = client.reserve(customer, "calls", 130, hold=hold, mode="best_effort")
            assert (capped.verdict, capped.held[0].quantity) == (Verdict.ALLOW_WITH_CAPS, 100)
            with client.hold(customer, "calls", 1) as other:
                assert other.made.reason is Reason.INSUFFICIENT_CREDITS
            above = client.settle(customer, hold, "calls", 130, final=True)
            assert (above.balance.available_nanos, above.balance.overage_nanos) == (-30 * CALL, 30 * CALL)

    await asyncio.to_thread(work)
    await at.verified(customer)
