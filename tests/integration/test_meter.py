"""Meter: one LLM stream, its reports gathered, its signals in time, and nothing lost or doubled when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

import grpc
import pytest

from entitlement.v1 import gateway_pb2 as pb
from gateway.cli.stack import DevStack
from tests.stacks import DEADLINE_S, Site, down_and_up, fresh, opened, persist, price_of, until

CALL = price_of(1)
USD = 10**9
CONTINUE, WIND_DOWN, STOP = pb.MeterResponse.CONTINUE, pb.MeterResponse.WIND_DOWN, pb.MeterResponse.STOP


class Stream:
    """A caller of Meter, and what it was told."""

    def __init__(self, at: Site, customer: str, calls: int, hold: str = "", ttl_s: int = 60) -> None:
        self.open = pb.ReserveRequest(hold_id=hold or fresh("h"), customer=customer)
        self.open.usage.add(feature="calls", quantity=calls)
        self.open.ttl.seconds = ttl_s
        self.call: Any = at.gateway.Meter(timeout=3 * DEADLINE_S)
        self.told: list[pb.MeterResponse] = []
        self.number = 0

    @property
    def acknowledged(self) -> int:
        return self.told[-1].acknowledged if self.told else 0

    async def begin(self) -> pb.MeterResponse:
        await self.call.write(pb.MeterRequest(open=self.open))
        answer = await self.hear()
        self.number = answer.acknowledged
        return answer

    async def report(self, calls: int, *, final: bool = False, number: int = 0) -> None:
        self.number = number or self.number + 1
        report = pb.SettleRequest(idempotency_key=f"{self.open.hold_id}-{self.number}", number=self.number, final=final)
        if calls:
            report.usage.add(feature="calls", quantity=calls)
        await self.call.write(pb.MeterRequest(report=report))

    async def hear(self) -> pb.MeterResponse:
        answer = await self.call.read()
        assert isinstance(answer, pb.MeterResponse), answer
        self.told.append(answer)
        return answer

    async def heard(self) -> pb.MeterResponse:
        """What is told once all that was reported is acknowledged."""
        while self.acknowledged < self.number:
            await self.hear()
        return self.told[-1]

    async def ended(self) -> None:
        await self.call.done_writing()
        assert await self.call.read() is grpc.aio.EOF


async def shorten(at: Site, *streams: Stream) -> None:
    """Their holds, left by a stream that broke off, expire in a second, and not in ten."""
    for stream in streams:
        message = pb.ExtendRequest(hold_id=stream.open.hold_id, customer=stream.open.customer)
        message.ttl.seconds = 1
        await at.gateway.Extend(message, timeout=DEADLINE_S)


@asynccontextmanager
async def refused(code: grpc.StatusCode, text: str) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        yield
    assert (refusal.value.code(), refusal.value.details()) == (code, text)


async def test_reports_are_gathered_and_charged_to_the_nano(at: Site) -> None:
    customer = await at.customer(USD)
    stream = Stream(at, customer, 100)
    assert (await stream.begin()).signal == CONTINUE
    for _ in range(200):
        await stream.report(1)
    await stream.report(7, final=True)
    assert (await stream.heard()).balance.held_nanos == 0
    await stream.ended()
    await at.verified(customer)
    booked = await at.booked(customer)
    assert sum(booked.values()) == 207 * CALL
    assert len(booked) < 50  # Of 201 reports.
    assert {answer.signal for answer in stream.told} == {CONTINUE}  # More was reserved as it went on.


async def test_it_winds_down_and_stops_before_the_money_is_gone(at: Site) -> None:
    customer = await at.customer(100 * CALL)
    stream = Stream(at, customer, 30)
    await stream.begin()
    signals = []
    while not signals or signals[-1] != STOP:
        await stream.report(4)
        answer = await stream.heard()
        signals.append(answer.signal)
        if answer.signal == WIND_DOWN:
            assert 0 < answer.units_left <= 30 and answer.reason == pb.REASON_INSUFFICIENT_CREDITS
        assert len(signals) < 60
    assert signals == sorted(signals) and WIND_DOWN in signals
    await stream.report(0, final=True)
    last = await stream.heard()
    assert last.balance.available_nanos > -4 * CALL  # No more than one report beyond.
    await stream.ended()
    await at.verified(customer)
    assert sum((await at.booked(customer)).values()) == 4 * len(signals) * CALL


async def test_what_cannot_be_opened_is_stopped_at_once(at: Site) -> None:
    customer = await at.customer(10 * CALL)
    stream = Stream(at, customer, 11)
    answer = await stream.begin()
    assert (answer.signal, answer.reason) == (STOP, pb.REASON_INSUFFICIENT_CREDITS)
    await stream.ended()


@pytest.mark.parametrize("how", ["half-closed", "cancelled"])
async def test_a_stream_that_breaks_off_is_charged_what_it_reported(at: Site, how: str) -> None:
    customer = await at.customer(USD)
    stream = Stream(at, customer, 100)
    await stream.begin()
    for _ in range(5):
        await stream.report(3)
    await stream.heard()
    await stream.report(2)
    if how == "cancelled":
        await asyncio.sleep(0)
        stream.call.cancel()
        least = 15
    else:
        await stream.call.done_writing()
        await stream.heard()
        least = 17
    if how == "cancelled":
        await until(lambda: at.balance(customer), lambda found: found.settled_nanos >= least * CALL, "not charged")
        await shorten(at, stream)
    settled = await until(lambda: at.balance(customer), lambda found: found.held_nanos == 0, "something stays held")
    assert settled.settled_nanos in (least * CALL, 17 * CALL)
    await at.verified(customer)


async def test_after_a_break_it_goes_on_with_the_same_hold(at: Site) -> None:
    customer = await at.customer(USD)
    first = Stream(at, customer, 100)
    await first.begin()
    for _ in range(5):
        await first.report(3)
    await first.heard()
    await first.report(4)
    first.call.cancel()
    again = Stream(at, customer, 100, first.open.hold_id)
    told = await again.begin()
    assert told.signal == CONTINUE and told.acknowledged in (5, 6)
    if told.acknowledged == 5:
        await again.report(4)
    await again.report(10, final=True)
    assert (await again.heard()).acknowledged == 7
    await again.ended()
    await at.verified(customer)
    assert (await at.balance(customer)).settled_nanos == 29 * CALL


async def test_callers_who_leave_at_any_moment_leave_no_hold_and_lose_nothing_acknowledged(at: Site, seed: int) -> None:
    random = Random(seed)
    customer = await at.customer(10 * USD)
    acknowledged = 0
    streams: list[Stream] = []

    async def leaves() -> int:
        stream = Stream(at, customer, 10)
        streams.append(stream)
        with suppress(TimeoutError, grpc.aio.AioRpcError, AssertionError):
            async with asyncio.timeout(random.random() * 0.4):
                await stream.begin()
                while True:
                    await stream.report(1)
                    await stream.heard()
        stream.call.cancel()
        return stream.acknowledged

    for _ in range(4):
        found = await asyncio.gather(*[leaves() for _ in range(10)], return_exceptions=True)
        acknowledged += sum(number for number in found if isinstance(number, int))
    await shorten(at, *streams)
    settled = await until(lambda: at.balance(customer), lambda found: found.held_nanos == 0, "something stays held")
    await at.verified(customer)
    assert acknowledged * CALL <= settled.settled_nanos <= (acknowledged + 40) * CALL


async def test_what_is_denied_is_not_acknowledged_and_takes_nothing_along(at: Site) -> None:
    customer = await at.customer(USD)
    stream = Stream(at, customer, 100)
    await stream.begin()
    await stream.report(3)
    await stream.report(2)
    bad = pb.SettleRequest(idempotency_key=fresh("k"), number=3)
    bad.usage.add(feature="nothing", quantity=1)
    await stream.call.write(pb.MeterRequest(report=bad))
    text = "usage: report 3 was denied: FEATURE_NOT_FOUND"
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, text):
        while True:
            await stream.hear()
    assert stream.acknowledged <= 2
    await until(lambda: at.balance(customer), lambda found: found.settled_nanos == 5 * CALL, "it is not charged")
    await at.verified(customer)


async def test_reports_of_more_kinds_than_one_call_may_have(at: Site) -> None:
    customer = await at.customer(USD)
    stream = Stream(at, customer, 100)
    await stream.begin()
    for first in (0, 9, 18):
        stream.number += 1
        report = pb.SettleRequest(idempotency_key=fresh("k"), number=stream.number)
        for part in range(first, first + 9):
            dimensions = {"token_type": "input", "part": f"p{part}"}
            report.usage.add(feature="tokens", quantity=10, dimensions=dimensions)
        await stream.call.write(pb.MeterRequest(report=report))
    await stream.report(1, final=True)
    await stream.heard()
    await stream.ended()
    await at.verified(customer)
    rows = await at.rows("SELECT sum(quantity) FROM meters WHERE customer = $1 AND meter LIKE 'tokens%'", customer)
    assert rows[0][0] == 270


async def test_a_hold_that_is_released_under_its_stream(at: Site) -> None:
    customer = await at.customer(USD)
    stream = Stream(at, customer, 100)
    await stream.begin()
    await stream.report(3)
    await stream.heard()
    release = pb.ReleaseRequest(hold_id=stream.open.hold_id, customer=customer)
    await at.gateway.Release(release, timeout=DEADLINE_S)
    await stream.report(3)
    answer = await stream.hear()
    assert (answer.signal, answer.reason, answer.acknowledged) == (STOP, pb.REASON_HOLD_FINALIZED, 1)
    await at.verified(customer)
    assert (await at.balance(customer)).settled_nanos == 3 * CALL


async def test_two_streams_of_one_hold_charge_each_report_once(at: Site) -> None:
    customer = await at.customer(USD)
    one = Stream(at, customer, 100)
    await one.begin()
    two = Stream(at, customer, 100, one.open.hold_id)
    await two.begin()
    for _ in range(3):
        await two.report(2)
    await two.heard()
    await one.report(2)
    assert (await one.heard()).acknowledged == 3
    one.number = 3
    await one.report(5)
    await one.heard()
    one.call.cancel()  # The hold is the other one's.
    await two.report(5)  # It does not know of it.
    assert (await two.heard()).acknowledged == 4
    await two.report(1, final=True)
    await two.heard()
    await at.verified(customer)
    assert (await at.balance(customer)).settled_nanos == 12 * CALL


async def test_an_account_that_is_built_anew_in_the_middle(at: Site) -> None:
    customer = await at.customer(USD)
    stream = Stream(at, customer, 100)
    await stream.begin()
    await stream.report(3)
    await stream.heard()
    (account,) = [key async for key in at.hot.scan_iter(f"a:*{customer}")]
    config = await at.hot.hget(account, "c")
    assert config is not None
    await at.hot.hset(account, "c", "frozen")
    for _ in range(5):
        await stream.report(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.8):
            await stream.hear()
    await at.hot.hset(account, "c", config)
    await at.verified(customer)


async def test_a_gateway_that_is_killed_in_the_middle_loses_and_doubles_no_report(fragile: DevStack, seed: int) -> None:
    random = Random(seed)
    async with opened(fragile) as (at, customers):
        sent: dict[str, int] = {}
        holds = {customer: fresh("h") for customer in customers[:20]}

        async def lived(customer: str) -> None:
            """Says ten things, again where it must: what is acknowledged is not said again."""
            sizes = [random.randrange(1, 4) for _ in range(10)]
            sent[customer] = sum(sizes)
            done = 0
            while done < len(sizes):
                with suppress(grpc.aio.AioRpcError, AssertionError):
                    stream = Stream(at, customer, 50, holds[customer], ttl_s=600)
                    done = (await stream.begin()).acknowledged
                    for number in range(done, len(sizes)):
                        await stream.report(sizes[number], final=number + 1 == len(sizes))
                        if random.random() < 0.4:
                            await stream.heard()
                    done = (await stream.heard()).acknowledged
                await persist(lambda: at.balance(customer))

        living = [asyncio.create_task(lived(customer)) for customer in holds]
        for _ in range(3):
            await asyncio.sleep(random.random())
            await down_and_up(fragile, "gateway")
        async with asyncio.timeout(3 * DEADLINE_S):
            await asyncio.gather(*living)
        await at.verified()
        for customer, calls in sent.items():
            assert sum((await at.booked(customer)).values()) == calls * CALL, customer
            assert (await at.balance(customer)).held_nanos == 0


class TestBadInput:
    async def test_the_first_message(self, at: Site) -> None:
        stream = Stream(at, await at.customer(USD), 10)
        async with refused(grpc.StatusCode.INVALID_ARGUMENT, "step: the first message of a stream is open"):
            await stream.report(1)
            await stream.hear()

    @pytest.mark.parametrize(
        ("report", "text"),
        [
            ({"number": 2}, "number: 2 does not follow 0; expected 1"),
            ({}, "number: 0 does not follow 0; expected 1"),
            ({"number": 1, "hold_id": "another"}, "hold_id: 'another' is not the stream's, 'HOLD'"),
            ({"number": 1, "customer": "another"}, "customer: 'another' is not the stream's, 'CUSTOMER'"),
            ({"number": 1, "idempotency_key": ""}, "idempotency_key: is empty; expected 1..128 bytes"),
        ],
    )
    async def test_a_report(self, at: Site, report: dict[str, Any], text: str) -> None:
        customer = await at.customer(USD)
        stream = Stream(at, customer, 10)
        await stream.begin()
        expected = text.replace("HOLD", stream.open.hold_id).replace("CUSTOMER", customer)
        async with refused(grpc.StatusCode.INVALID_ARGUMENT, expected):
            message = pb.SettleRequest(**{"idempotency_key": fresh("k")} | report)
            message.usage.add(feature="calls", quantity=1)
            await stream.call.write(pb.MeterRequest(report=message))
            await stream.hear()
        await at.verified(customer)

    async def test_opened_twice_and_after_the_last(self, at: Site) -> None:
        customer = await at.customer(USD)
        stream = Stream(at, customer, 10)
        await stream.begin()
        async with refused(grpc.StatusCode.INVALID_ARGUMENT, "step: the stream is open; what follows are reports"):
            await stream.call.write(pb.MeterRequest(open=stream.open))
            await stream.hear()

    async def test_a_hold_that_has_ended(self, at: Site) -> None:
        customer = await at.customer(USD)
        stream = Stream(at, customer, 10)
        await stream.begin()
        await stream.report(5, final=True)
        await stream.heard()
        again = Stream(at, customer, 10, stream.open.hold_id)
        answer = await again.begin()
        assert (answer.signal, answer.reason) == (STOP, pb.REASON_HOLD_FINALIZED)
        assert answer.acknowledged == 1
        assert (await at.balance(customer)).settled_nanos == 5 * CALL
