"""Holds from end to end: both services, the hot store and the ledger, over either transport, and through faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from random import Random
from typing import Any, Final

import grpc
import pytest

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1 import ledger_pb2
from gateway.cli.stack import DevStack
from tests.stacks import DEADLINE_S, Site, down_and_up, fresh, opened, persist, price_of, site, until

CALL = price_of(1)
USD = 10**9
FAULTS: Final[tuple[Any, ...]] = ("gateway", "sync", "valkey", "postgres", "flushall")  # of what is killed, or emptied


def reserve(customer: str, calls: int, hold: str = "", *, ttl_s: float = 60, **more: Any) -> pb.ReserveRequest:
    request = pb.ReserveRequest(hold_id=hold or fresh("h"), customer=customer, **more)
    request.usage.add(feature="calls", quantity=calls)
    request.ttl.FromMilliseconds(int(ttl_s * 1000))
    return request


def settle(request: pb.ReserveRequest, calls: int, *, final: bool = True, key: str = "") -> pb.SettleRequest:
    report = pb.SettleRequest(
        hold_id=request.hold_id, customer=request.customer, idempotency_key=key or fresh("s"), final=final
    )
    if calls:
        report.usage.add(feature="calls", quantity=calls)
    return report


async def held(at: Site, customer: str) -> list[tuple[str, int, int]]:
    rows = await at.rows("SELECT id, state, remaining FROM holds WHERE customer = $1 ORDER BY id", customer)
    return [tuple(row) for row in rows]


class TestLife:
    async def test_reserve_extend_settle_in_parts(self, at: Site) -> None:
        customer = await at.customer(USD)
        wanted = reserve(customer, 100)
        made = await at.gateway.Reserve(wanted, timeout=DEADLINE_S)
        assert (made.verdict, made.balance.held_nanos) == (pb.VERDICT_ALLOW, 100 * CALL)
        assert made.balance.available_nanos == USD - 100 * CALL and made.expires_at.seconds > 0
        assert [(line.feature, line.quantity, line.amount_nanos) for line in made.held] == [("calls", 100, 100 * CALL)]
        extend = pb.ExtendRequest(hold_id=wanted.hold_id, customer=customer, idempotency_key=fresh("e"))
        extend.more.add(feature="calls", quantity=50)
        more = await at.gateway.Extend(extend, timeout=DEADLINE_S)
        assert more.balance.held_nanos == 150 * CALL and more.expires_at == made.expires_at
        assert (await at.gateway.Extend(extend, timeout=DEADLINE_S)).replayed
        first = await at.gateway.Settle(settle(wanted, 30, final=False), timeout=DEADLINE_S)
        assert (first.balance.held_nanos, first.balance.settled_nanos) == (120 * CALL, 30 * CALL)
        last = settle(wanted, 40)
        done = await at.gateway.Settle(last, timeout=DEADLINE_S)
        assert (done.balance.held_nanos, done.balance.available_nanos) == (0, USD - 70 * CALL)
        again = await at.gateway.Settle(last, timeout=DEADLINE_S)
        assert again.replayed and again.consumed == done.consumed
        await at.verified(customer)
        assert sum((await at.booked(customer)).values()) == 70 * CALL
        assert await held(at, customer) == [(wanted.hold_id, 2, 0)]

    async def test_twenty_at_once_of_75_against_500_make_six(self, at: Site) -> None:
        customer = await at.customer(500 * CALL)
        calls = [at.gateway.Reserve(reserve(customer, 75), timeout=DEADLINE_S) for _ in range(20)]
        answers = await asyncio.gather(*calls)
        assert Counter(answer.verdict for answer in answers) == {pb.VERDICT_ALLOW: 6, pb.VERDICT_DENY: 14}
        assert {answer.reason for answer in answers} == {0, pb.REASON_INSUFFICIENT_CREDITS}
        assert (await at.balance(customer)).held_nanos == 450 * CALL
        await at.verified(customer)

    async def test_release_and_nothing_used(self, at: Site) -> None:
        customer = await at.customer(USD)
        for calls, end in ((10, "release"), (20, "settle")):
            wanted = reserve(customer, calls)
            await at.gateway.Reserve(wanted, timeout=DEADLINE_S)
            if end == "release":
                release = pb.ReleaseRequest(hold_id=wanted.hold_id, customer=customer)
                assert (await at.gateway.Release(release, timeout=DEADLINE_S)).balance.available_nanos == USD
                assert (await at.gateway.Release(release, timeout=DEADLINE_S)).replayed
            else:
                answer = await at.gateway.Settle(settle(wanted, 0), timeout=DEADLINE_S)
                assert answer.balance.available_nanos == USD and not answer.consumed
        await at.verified(customer)
        assert sorted(state for _, state, _ in await held(at, customer)) == [2, 3]
        assert await at.booked(customer) == {}

    async def test_it_expires_and_is_settled_late_once(self, at: Site) -> None:
        customer = await at.customer(USD)
        wanted = reserve(customer, 100, ttl_s=1)
        await at.gateway.Reserve(wanted, timeout=DEADLINE_S)
        await at.balance_when(customer, USD)
        late = settle(wanted, 60)
        answer = await at.gateway.Settle(late, timeout=DEADLINE_S)
        assert answer.late and answer.balance.settled_nanos == 60 * CALL
        assert (await at.gateway.Settle(late, timeout=DEADLINE_S)).replayed
        another = await at.gateway.Settle(settle(wanted, 60), timeout=DEADLINE_S)
        assert (another.verdict, another.reason) == (pb.VERDICT_DENY, pb.REASON_HOLD_FINALIZED)
        await at.verified(customer)
        assert list((await at.booked(customer)).values()) == [60 * CALL]

    async def test_above_the_hold_it_is_posted_in_full(self, at: Site) -> None:
        customer = await at.customer(100 * CALL)
        wanted = reserve(customer, 100)
        await at.gateway.Reserve(wanted, timeout=DEADLINE_S)
        answer = await at.gateway.Settle(settle(wanted, 130), timeout=DEADLINE_S)
        assert (answer.balance.available_nanos, answer.balance.overage_nanos) == (-30 * CALL, 30 * CALL)
        await at.verified(customer)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"hold_id": ""}, "hold_id: is empty; expected 1..128 bytes"),
            ({"customer": "a b"}, "customer: 'a b' has a character outside A-Z a-z 0-9 . _ ~ @ / + = -"),
            ({"mode": pb.MODE_ADJUST_ONLY}, "mode: 4 is not for holds; expected 0..2 (NORMAL, BEST_EFFORT)"),
            ({"ttl": {"nanos": 5_000_000}}, "ttl: 5 ms is outside 1 s..24 h"),
            ({"ttl": {"seconds": 86_401}}, "ttl: 86401000 ms is outside 1 s..24 h"),
            ({"usage": []}, "usage: has 0 lines; expected 1..16"),
        ],
    )
    async def test_reserve(self, at: Site, change: dict[str, Any], text: str) -> None:
        fields: dict[str, Any] = {"hold_id": "h", "customer": "c", "usage": [{"feature": "calls", "quantity": 1}]}
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await at.gateway.Reserve(pb.ReserveRequest(**fields | change), timeout=DEADLINE_S)
        assert (refusal.value.code(), refusal.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, text)

    async def test_what_is_not_there_or_has_ended(self, at: Site) -> None:
        customer = await at.customer(USD)
        wanted = reserve(customer, 10)
        for answer in (
            await at.gateway.Settle(settle(wanted, 1), timeout=DEADLINE_S),
            await at.gateway.Release(pb.ReleaseRequest(hold_id="never", customer=customer), timeout=DEADLINE_S),
        ):
            assert (answer.verdict, answer.reason) == (pb.VERDICT_DENY, pb.REASON_HOLD_NOT_FOUND)
        await at.gateway.Reserve(wanted, timeout=DEADLINE_S)
        last = settle(wanted, 5)
        await at.gateway.Settle(last, timeout=DEADLINE_S)
        release = pb.ReleaseRequest(hold_id=wanted.hold_id, customer=customer)
        for ended in (
            await at.gateway.Settle(settle(wanted, 5), timeout=DEADLINE_S),
            await at.gateway.Release(release, timeout=DEADLINE_S),
        ):
            assert (ended.verdict, ended.reason) == (pb.VERDICT_DENY, pb.REASON_HOLD_FINALIZED)
        for changed in (settle(wanted, 6, key=last.idempotency_key), reserve(customer, 11, wanted.hold_id)):
            call = at.gateway.Settle if isinstance(changed, pb.SettleRequest) else at.gateway.Reserve
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call(changed, timeout=DEADLINE_S)  # type: ignore[arg-type]
            assert refusal.value.code() == grpc.StatusCode.ALREADY_EXISTS
        await at.verified(customer)
        assert (await at.balance(customer)).settled_nanos == 5 * CALL

    async def test_nothing_to_extend_or_report(self, at: Site) -> None:
        for call, text in (
            (
                at.gateway.Extend(pb.ExtendRequest(hold_id="h", customer="c"), timeout=DEADLINE_S),
                "ttl: neither ttl nor more is set: there is nothing to extend",
            ),
            (
                at.gateway.Settle(pb.SettleRequest(hold_id="h", customer="c", idempotency_key="k"), timeout=DEADLINE_S),
                "usage: reports nothing and is not final; expected a quantity in 1..1000000000000",
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call
            assert refusal.value.details().startswith(text.partition(" a quantity")[0])  # type: ignore[union-attr]


class Holders:
    """Callers that reserve, settle and release, and what they were told: `spent` nanos, `open` holds."""

    def __init__(self, at: Site, customers: list[str], random: Random) -> None:
        self.at, self.customers, self.random = at, customers, random
        self.spent: Counter[str] = Counter()
        self.open: dict[str, pb.ReserveRequest] = {}
        self.sized: dict[str, int] = {}

    async def begin(self, count: int) -> None:
        for _ in range(count):
            wanted = reserve(self.random.choice(self.customers), self.random.randrange(2, 60), ttl_s=3_600)
            made = await persist(partial(self.at.gateway.Reserve, wanted, timeout=DEADLINE_S))
            if made.verdict == pb.VERDICT_ALLOW:
                self.open[wanted.hold_id] = wanted
                self.sized[wanted.hold_id] = wanted.usage[0].quantity

    async def go_on(self, count: int) -> None:
        for _ in range(min(count, len(self.open))):
            wanted = self.open[self.random.choice(list(self.open))]
            calls, final = self.random.randrange(1, 20), self.random.random() < 0.5
            answer = await persist(
                partial(self.at.gateway.Settle, settle(wanted, calls, final=final), timeout=DEADLINE_S),
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
            assert answer.verdict == pb.VERDICT_ALLOW and not answer.late, answer
            self.spent[wanted.customer] += calls * CALL
            self.sized[wanted.hold_id] = max(0, self.sized[wanted.hold_id] - calls)
            if final:
                del self.open[wanted.hold_id]

    def held(self, customer: str) -> int:
        return sum(self.sized[name] for name, wanted in self.open.items() if wanted.customer == customer) * CALL

    async def prove(self) -> None:
        await self.at.verified()
        for customer in self.customers:
            balance = await self.at.balance(customer)
            assert (balance.held_nanos, balance.settled_nanos) == (self.held(customer), self.spent[customer])
            assert sum((await self.at.booked(customer)).values()) == self.spent[customer]


async def test_holds_survive_what_balances_survive(fragile: DevStack, seed: int) -> None:
    """What was set aside stays so, what was reported is charged once, whoever has been killed or emptied."""
    async with opened(fragile) as (at, customers):
        holders = Holders(at, customers, Random(seed))
        for fault in FAULTS:
            await holders.begin(15)
            await holders.go_on(15)
            if fault == "flushall":
                await at.verified()
                await at.hot.flushall()
            else:
                await down_and_up(fragile, fault)
            await holders.go_on(15)
            await holders.begin(5)
            await holders.go_on(10)
            await holders.prove()


async def forgets(stack: DevStack, seed: int) -> None:
    """Redis loses holds and reports that the ledger has not seen; then everything is as callers were told."""
    async with opened(stack) as (at, customers):
        holders = Holders(at, customers, Random(seed))
        await asyncio.gather(*[at.balance(customer) for customer in customers])  # They are there from now on.
        await holders.begin(10)
        await at.verified()
        await asyncio.to_thread(stack.kill, "sync")
        await at.hot.config_set("appendonly", "no")
        await holders.begin(15)
        await holders.go_on(20)
        await down_and_up(stack, "valkey")
        await asyncio.to_thread(stack.restart, "sync")
        for customer in customers:
            await persist(partial(at.balance, customer))
        await holders.prove()
        await holders.go_on(10)
        await holders.prove()


async def test_what_redis_forgot_comes_back_with_the_receipts(fragile: DevStack, seed: int) -> None:
    await forgets(fragile, seed)


async def test_without_receipts_holds_are_seen_to_be_lost(unprotected: DevStack, seed: int) -> None:
    """The proof of the proof."""
    with pytest.raises(AssertionError):
        await forgets(unprotected, seed)


async def test_holds_of_an_account_that_is_built_anew(stack: DevStack, seed: int) -> None:
    async with site(stack) as at:
        customer = await at.customer(USD)
        holders = Holders(at, [customer], Random(seed))
        await holders.begin(8)
        await holders.go_on(3)
        await holders.prove()
        first = next(iter(holders.open.values()))
        before = (await at.balance(customer)).epoch
        partition_keys = [key async for key in at.hot.scan_iter(f"a:*{customer}")]
        await at.hot.delete(*partition_keys)
        again = await persist(partial(at.gateway.Reserve, first, timeout=DEADLINE_S))
        assert again.replayed and (await at.balance(customer)).epoch == before + 1
        await holders.go_on(20)
        await holders.prove()

        async def look() -> int:
            return (await at.balance(customer)).held_nanos

        for wanted in holders.open.values():
            await at.gateway.Release(pb.ReleaseRequest(hold_id=wanted.hold_id, customer=customer), timeout=DEADLINE_S)
        await until(look, lambda nanos: nanos == 0, "something stayed set aside")
        await at.verified(customer)


async def test_quotas_and_limits_count_what_is_held_after_it_was_built_anew_too(at: Site) -> None:
    contract = ledger_pb2.Contract(billing=ledger_pb2.Contract.PREPAID)
    contract.quotas.add(feature="calls", limit=1_000)
    customer = await at.customer(USD, contract=contract)
    subject = ledger_pb2.Subject(id="ann", limit_nanos=500 * CALL)
    await at.admin.PutCustomer(ledger_pb2.Customer(id=customer, subjects=[subject]), timeout=DEADLINE_S)
    await at.balance(customer)

    async def limited() -> bool:
        answer = await at.gateway.GetBalance(pb.GetBalanceRequest(customer=customer, subject="ann"), timeout=DEADLINE_S)
        return answer.balance.HasField("subject")

    await until(limited, bool, "the subject's limit did not come")
    wanted = reserve(customer, 300, subject="ann")
    await at.gateway.Reserve(wanted, timeout=DEADLINE_S)
    await at.gateway.Settle(settle(wanted, 100, final=False), timeout=DEADLINE_S)
    extend = pb.ExtendRequest(hold_id=wanted.hold_id, customer=customer, idempotency_key=fresh("e"))
    extend.more.add(feature="calls", quantity=50)
    await at.gateway.Extend(extend, timeout=DEADLINE_S)

    async def counted() -> tuple[int, int, int]:
        request = pb.GetBalanceRequest(customer=customer, subject="ann")
        balance = (await at.gateway.GetBalance(request, timeout=DEADLINE_S)).balance
        return balance.quotas[0].used, balance.subject.used_nanos, balance.held_nanos

    assert await counted() == (350, 350 * CALL, 250 * CALL)
    await at.verified(customer)
    await at.hot.delete(*[key async for key in at.hot.scan_iter(f"a:*{customer}")])
    assert await persist(counted) == (350, 350 * CALL, 250 * CALL)
    again = await at.gateway.Extend(extend, timeout=DEADLINE_S)
    assert again.replayed
    await at.gateway.Settle(settle(wanted, 20), timeout=DEADLINE_S)
    assert await counted() == (120, 120 * CALL, 0)
    await at.verified(customer)
