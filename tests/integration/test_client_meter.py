"""The client's meter: what it was told is charged once, whatever happens to the gateway meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random

import pytest

from gateway.cli.stack import DevStack
from gateway.client import Client, ClientClosed, InvalidArgument, Reason, Signal, Unavailable, Usage
from tests.stacks import DEADLINE_S, Site, down_and_up, fresh, opened, price_of, until

CALL = price_of(1)
USD = 10**9


@pytest.fixture
async def client(at: Site) -> AsyncIterator[Client]:
    async with Client(at.stack.gateway, timeout_ms=5_000) as client:
        yield client


async def settled(at: Site, customer: str, calls: int) -> None:
    balance = await until(lambda: at.balance(customer), lambda found: not found.held_nanos, "something stays held")
    await at.verified(customer)
    assert balance.settled_nanos == calls * CALL == sum((await at.booked(customer)).values())


async def test_what_is_used_is_charged_and_the_rest_given_back(at: Site, client: Client) -> None:
    customer = await at.customer(USD)
    async with client.meter(customer, "calls", 100) as meter:
        assert meter.allowed and meter.signal is Signal.CONTINUE and meter.units_left == 100
        assert meter.balance.held_nanos == 100 * CALL
        for _ in range(300):
            meter.use("calls", 2)
            await meter.room()
        assert meter.signal is Signal.CONTINUE
    await settled(at, customer, 600)
    assert len(await at.booked(customer)) < 60  # Of 300.


async def test_nothing_used_costs_nothing(at: Site, client: Client) -> None:
    customer = await at.customer(USD)
    async with client.meter(customer, "calls", 100) as meter:
        meter.use("calls", 0)
    await settled(at, customer, 0)
    await meter.end()  # Once more is nothing.


async def test_a_denial_is_an_answer(at: Site, client: Client) -> None:
    customer = await at.customer(10 * CALL)
    async with client.meter(customer, "calls", 11) as meter:
        assert not meter.allowed
        assert (meter.signal, meter.reason) == (Signal.STOP, Reason.INSUFFICIENT_CREDITS)
    await settled(at, customer, 0)


@pytest.mark.parametrize("step", [1, 7])
async def test_stop_comes_in_time(at: Site, client: Client, step: int) -> None:
    """Nobody is told to go on with what is not there: after each step it waits for room."""
    customer = await at.customer(100 * CALL)
    used = 0
    async with client.meter(customer, "calls", 16) as meter:
        while meter.signal is not Signal.STOP:
            meter.use("calls", step)
            used += step
            await meter.room()
    assert 99 <= used < 100 + step
    assert meter.reason is Reason.INSUFFICIENT_CREDITS
    await settled(at, customer, used)


async def test_what_is_due_is_kept_for_it(at: Site, client: Client) -> None:
    customer = await at.customer(100 * CALL)
    tokens = Usage("tokens", 10, {"token_type": "input"})
    other = Usage("calls", 40)
    used = 0
    async with client.meter(customer, usage=[other, tokens], due=[Usage("calls", 30)]) as meter:
        assert meter.units_left == 10 and meter.signal is Signal.CONTINUE
        while meter.signal is not Signal.STOP:
            meter.use("calls", 1)
            used += 1
            await meter.room()
        meter.expect()
        meter.use("calls", 30)
    assert 65 <= used <= 71  # 100 without what was due, and less than what could be reserved no more.
    await settled(at, customer, used + 30)


async def test_two_hundred_streams_over_a_gateway_that_is_killed(fragile: DevStack, seed: int) -> None:
    random = Random(seed)
    used = Counter[str]()
    async with opened(fragile) as (at, customers), Client(fragile.gateway, timeout_ms=10_000) as client:
        rich = customers[:20]
        started, over = asyncio.Semaphore(0), asyncio.Event()

        async def live(customer: str) -> None:
            async with client.meter(customer, "calls", 20) as meter:
                assert meter.allowed
                started.release()
                while not over.is_set() or random.random() < 0.8:
                    some = random.randrange(1, 4)
                    meter.use("calls", some)
                    used[customer] += some
                    await asyncio.sleep(random.random() * 0.2)
                    await meter.room()

        living = [asyncio.create_task(live(random.choice(rich))) for _ in range(200)]
        for _ in living:
            await started.acquire()
        for _ in range(2):
            await down_and_up(fragile, "gateway")
            await asyncio.sleep(random.random())
        over.set()
        async with asyncio.timeout(3 * DEADLINE_S):
            await asyncio.gather(*living)
        await at.verified()
        for customer in rich:
            assert sum((await at.booked(customer)).values()) == used[customer] * CALL, customer
            assert (await at.balance(customer)).held_nanos == 0


async def test_what_was_used_of_a_hold_that_expired_is_charged_late(at: Site, client: Client) -> None:
    customer = await at.customer(USD)
    meter = await client.open_meter(customer, "calls", 10, ttl=timedelta(seconds=1))
    meter.use("calls", 3)
    await until(lambda: at.balance(customer), lambda found: found.settled_nanos == 3 * CALL, "it is not charged")
    await meter.leave()
    await client.extend(customer, meter.hold, ttl=timedelta(seconds=1))
    await until(lambda: at.balance(customer), lambda found: not found.held_nanos, "it does not expire")
    meter.use("calls", 4)
    await meter.end()
    assert not meter.uncharged
    await settled(at, customer, 7)


async def test_one_that_somebody_released_tells_what_is_not_charged(at: Site, client: Client) -> None:
    customer = await at.customer(USD)
    async with client.meter(customer, "calls", 10) as meter:
        await client.release(customer, meter.hold)
        meter.use("calls", 4)
    assert meter.uncharged == (Usage("calls", 4),)
    await settled(at, customer, 0)


async def test_a_client_that_closes_ends_its_meters(at: Site) -> None:
    customer = await at.customer(USD)
    async with Client(at.stack.gateway, timeout_ms=5_000) as client:
        meter = await client.open_meter(customer, "calls", 10)
        meter.use("calls", 4)
    await settled(at, customer, 4)
    with pytest.raises(ClientClosed):
        await client.open_meter(customer, "calls", 10)


async def test_bad_input(at: Site, client: Client) -> None:
    customer = await at.customer(USD)
    with pytest.raises(InvalidArgument, match=r"hold_id: has 101 bytes; a stream.s has 1..100"):
        await client.open_meter(customer, "calls", 10, hold="h" * 101)
    with pytest.raises(InvalidArgument, match=r"quantity: -1 is not a whole number in 0.."):
        await client.open_meter(customer, "calls", 10, due=[Usage("calls", -1)])
    with pytest.raises(InvalidArgument, match=r"due\[0\]\.feature: 'a b' "):
        await client.open_meter(customer, "calls", 10, due=[Usage("a b", 1)])
    meter = await client.open_meter(customer, "calls", 10)
    for quantity in (-1, 1.5, 2**53, "3"):
        with pytest.raises(InvalidArgument, match=r"quantity: .* is not a whole number in 0.."):
            meter.use("calls", quantity)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        meter.use("calls", 1, {"model": 3})  # type: ignore[dict-item]
    meter.use("calls", 2)
    await meter.end()
    with pytest.raises(RuntimeError, match="the meter has ended"):
        meter.use("calls", 1)
    meter = await client.open_meter(customer, "calls", 10)
    meter.use("nothing", 1)
    with pytest.raises(InvalidArgument, match="usage: report 1 was denied: FEATURE_NOT_FOUND"):
        await meter.end()
    await at.verified(customer)
    assert sum((await at.booked(customer)).values()) == 2 * CALL


async def test_a_gateway_that_is_away() -> None:
    async with Client(f"unix:/nowhere/{fresh('socket')}", timeout_ms=200) as client:
        with pytest.raises(Unavailable):
            await client.open_meter("amy", "calls", 10)
