"""Credit that runs low is bought as the contract says: once a fall, within its cap, however many calls make it fall."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import json_format

from entitlement.decision import Charge, Consume, Decision, Limits, Outcome, Verdict, parse_outcome
from entitlement.identity import MAX_ID_BYTES, check_id
from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.request import parse_consume
from entitlement.v1 import events_pb2, gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import top_ups
from ledger_sync.announcements import TOP_UP_CREATED, TOP_UP_REQUESTED
from ledger_sync.hot_store import CONNECTIONS
from ledger_sync.pricing import PriceList
from ledger_sync.top_ups import Standing, Step, TopUp, TopUps, grant_id, next_step
from tests.control_rig import TENANT, USD, Rig, eventually, refusal, rig
from tests.virtual_clock import Clock, clocked_rig

START = days_from_civil(2026, 1, 30) * DAY
FEBRUARY = days_from_civil(2026, 2, 1) * DAY
PER_USD = 66_667  # output tokens at 15 USD a million: five nanodollars of a thousand over one USD
PRICE = 15_000  # nanos of an output token

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        yield made, clock


def rule(below: int = 5, amount: int = 10, cap: int = 0, via: int = pb.TopUp.DIRECT) -> pb.TopUp:
    """In USD."""
    return pb.TopUp(
        below_nanos=below * USD,
        amount_nanos=amount * USD,
        monthly_cap_nanos=cap * USD,
        via=via,  # type: ignore[arg-type]
    )


async def customer(made: Rig, top_up: pb.TopUp, granted: int = 10 * USD, name: str = "bob") -> None:
    await made.customer(name, *([granted] if granted else []), top_up=top_up)


async def spend(made: Rig, tokens: int, name: str = "bob") -> None:
    decision = await made.consume(name, "output.tokens", tokens)
    assert decision.verdict is Verdict.ALLOW
    await made.settled(name)


async def swept(made: Rig) -> None:
    """Everything that is due has been done: the sweeper's own rounds or this one did it."""
    await made.control.sweeper.sweep()


async def bought(made: Rig, name: str = "bob") -> list[tuple[str, int]]:
    listed = await made.stub.ListGrants(pb.ListRequest(customer=name))
    return [(grant.id, grant.amount_nanos) for grant in listed.grants if grant.id.startswith("=")]


async def told(made: Rig, kind: str) -> list[tuple[str, events_pb2.TopUpEvent]]:
    rows = await made.rows("SELECT event_id, body FROM outbox WHERE type = $1 ORDER BY id", kind)
    return [
        (row["event_id"], json_format.ParseDict(json.loads(row["body"])["data"], events_pb2.TopUpEvent()))
        for row in rows
    ]


async def proved(made: Rig) -> None:
    report = await made.stub.Verify(pb.VerifyRequest())
    assert (report.drift_nanos, report.unbalanced_transactions, report.sequence_gaps) == (0, 0, 0), report


class TestDirect:
    async def test_a_fall_below_the_bound_buys_once(self, shop: Shop) -> None:
        made, _ = shop
        await customer(made, rule())
        await spend(made, 5 * USD // PRICE)  # Down to a little more than the bound.
        await swept(made)
        assert await bought(made) == []
        await spend(made, 1)
        await swept(made)
        await swept(made)
        assert await bought(made) == [("=topup/bob/1", 10 * USD)]
        hot = await made.account_when("bob", lambda account: account.available(START) > 14 * USD)
        (event,) = await told(made, TOP_UP_CREATED)
        assert event == (
            "=topup/bob/1:created",
            events_pb2.TopUpEvent(
                tenant=TENANT,
                customer="bob",
                grant="=topup/bob/1",
                amount_nanos=10 * USD,
                available_nanos=hot.available(START) - 10 * USD,
                credit_type="USD",
            ),
        )
        (grant,) = [g for g in (await made.stub.ListGrants(pb.ListRequest())).grants if g.id == "=topup/bob/1"]
        assert grant.category == pb.Grant.PAID and grant.effective_at.ToMilliseconds() == START
        audit = await made.rows("SELECT action, subject FROM audit WHERE actor = 'top-up'")
        assert [tuple(row) for row in audit] == [("CreateTopUp", "bob")]
        await made.settled("bob")
        await proved(made)

    async def test_one_that_does_not_lift_it_is_followed_by_another(self, shop: Shop) -> None:
        made, _ = shop
        await customer(made, rule(below=25), granted=0)
        await swept(made)
        assert [no for no, _ in await bought(made)] == ["=topup/bob/1", "=topup/bob/2", "=topup/bob/3"]

    async def test_the_cap_holds_until_the_calendar_month_is_over(self, shop: Shop) -> None:
        made, clock = shop
        await customer(made, rule(below=100, cap=25), granted=0)
        await swept(made)
        assert len(await bought(made)) == 2  # A third one would go beyond 25.
        await clock.set(FEBRUARY - 1)
        await swept(made)
        assert len(await bought(made)) == 2
        await clock.set(FEBRUARY)
        await swept(made)
        assert len(await bought(made)) == 4

    async def test_what_is_not_active_does_not_count(self, shop: Shop) -> None:
        made, clock = shop
        await customer(made, rule(below=7, amount=3), granted=0)
        later = pb.Grant(id="later", customer="bob", amount_nanos=50 * USD)
        later.effective_at.FromMilliseconds(START + HOUR)
        later.expires_at.FromMilliseconds(START + 2 * HOUR)
        await made.stub.CreateGrant(later)
        await swept(made)
        assert len(await bought(made)) == 3  # 9 USD: it is not there yet.
        await made.stub.VoidGrant(pb.VoidGrantRequest(id="=topup/bob/1", reason="test"))
        await swept(made)
        assert len(await bought(made)) == 4
        await clock.advance(HOUR)
        await made.stub.VoidGrant(pb.VoidGrantRequest(id="=topup/bob/2", reason="test"))
        await swept(made)
        assert len(await bought(made)) == 4  # There it is,
        await clock.advance(HOUR)
        await swept(made)
        assert len(await bought(made)) == 5  # and there it was.

    async def test_who_is_suspended_or_has_no_rule_buys_nothing(self, shop: Shop) -> None:
        made, _ = shop
        await made.stub.PutCustomer(pb.Customer(id="bob", status=pb.Customer.SUSPENDED))
        await made.stub.PutContract(pb.Contract(id="c-bob", customer="bob", rate_card="llm", top_up=rule()))
        await made.customer("amy")
        await swept(made)
        assert await bought(made) == [] and await bought(made, "amy") == []
        await made.stub.PutCustomer(pb.Customer(id="bob", status=pb.Customer.ACTIVE))
        await swept(made)
        assert await bought(made) == [("=topup/bob/1", 10 * USD)]

    async def test_an_account_that_takes_no_more_does_not_hold_others_up(self, shop: Shop) -> None:
        made, _ = shop
        await made.customer("amy", top_up=rule(amount=9_000_000_000))
        await made.execute("UPDATE contracts SET top_up_below = 9000000000000000001 WHERE customer = 'amy'")
        body = pb.Contract(top_up=pb.TopUp(below_nanos=9 * 10**18 + 1, amount_nanos=9 * 10**18, via=pb.TopUp.DIRECT))
        await made.execute("UPDATE contracts SET body = $1 WHERE customer = 'amy'", body.SerializeToString())
        await customer(made, rule(), granted=0)
        await swept(made)
        assert len(await bought(made, "amy")) == 1  # Twice as much is beyond what an account may hold.
        assert len(await bought(made)) == 1


class TestWebhook:
    async def test_it_asks_once_and_the_answer_is_the_grant_of_that_id(self, shop: Shop) -> None:
        made, clock = shop
        await customer(made, rule(via=pb.TopUp.WEBHOOK), granted=0)
        await swept(made)
        await clock.advance(DAY - 1)
        await swept(made)
        ((event_id, event),) = await told(made, TOP_UP_REQUESTED)
        assert (event_id, event.grant, event.amount_nanos) == (
            f"=topup/bob/1:requested:{START}",
            "=topup/bob/1",
            10 * USD,
        )
        assert await bought(made) == []
        code, _ = await refusal(
            made.stub.CreateGrant(pb.Grant(id="=topup/bob/2", customer="bob", amount_nanos=10 * USD))
        )
        assert code is grpc.StatusCode.INVALID_ARGUMENT  # Nobody has asked for that one.
        answer = pb.Grant(id=event.grant, customer="bob", amount_nanos=event.amount_nanos)
        await made.stub.CreateGrant(answer)
        await made.stub.CreateGrant(answer)
        await swept(made)
        assert await bought(made) == [("=topup/bob/1", 10 * USD)] and len(await told(made, TOP_UP_REQUESTED)) == 1
        await spend(made, 6 * USD // PRICE)
        await swept(made)
        assert [event.grant for _, event in await told(made, TOP_UP_REQUESTED)] == ["=topup/bob/1", "=topup/bob/2"]

    async def test_without_an_answer_it_asks_for_the_same_again_after_a_day(self, shop: Shop) -> None:
        made, clock = shop
        await customer(made, rule(via=pb.TopUp.WEBHOOK, cap=10), granted=0)
        await swept(made)
        await clock.advance(DAY)
        await swept(made)
        asked = await told(made, TOP_UP_REQUESTED)
        assert [event_id for event_id, _ in asked] == [
            *(f"=topup/bob/1:requested:{START}", f"=topup/bob/1:requested:{START + DAY}")
        ]
        assert asked[0][1] == asked[1][1]
        assert await made.value("SELECT count(*) FROM top_ups") == 1

    async def test_a_rule_that_no_longer_asks_buys_what_was_asked_for(self, shop: Shop) -> None:
        made, _ = shop
        await customer(made, rule(via=pb.TopUp.WEBHOOK), granted=0)
        await swept(made)
        await made.customer("bob", top_up=rule(amount=20))
        await swept(made)
        assert await bought(made) == [("=topup/bob/1", 10 * USD)]


@pytest.fixture
async def busy(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        yield made


async def calls(made: Rig, number: int, tokens: int) -> list[Decision]:
    """As many calls at once, through the hot store's scripts."""
    prices = PriceList((await made.control.catalogs.snapshot()).tenants[0])
    account, at_ms = await made.account("bob"), await made.hot.now_ms()
    requests: list[tuple[Consume, Charge]] = []
    for key in range(number):
        message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=f"call-{key}", customer="bob")
        message.usage.add(feature="output.tokens", quantity=tokens)
        request = parse_consume(TENANT, message)
        requests.append((request, prices.charge(request, account.config.plan, at_ms)))
    connections = asyncio.Semaphore(CONNECTIONS // 2)  # The control plane needs some, too.

    async def ask(request: Consume, charge: Charge) -> Outcome:
        async with connections:
            (reply,) = await made.hot.consume([(request, charge)], Limits())
        return parse_outcome(reply, request)

    found = await asyncio.gather(*(ask(*pair) for pair in requests))
    assert all(isinstance(outcome, Decision) for outcome in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("cap", "most"), [(0, 10**6), (40, 4)])
async def test_a_thousand_calls_at_once_buy_exactly_what_the_rule_allows(busy: Rig, cap: int, most: int) -> None:
    """The chore is tended by three at once, and by the sweeper besides: as if a lease had been lost unnoticed."""
    await customer(busy, rule(below=20, cap=cap), granted=100 * USD)
    stop = asyncio.Event()

    async def tend() -> None:
        chore = TopUps(busy.ledger, busy.control.pusher.wake)
        while not stop.is_set():
            async with busy.ledger.transaction(readonly=True) as connection:
                now_ms = await connection.fetchval("SELECT ledger_now_ms()")
            await chore.tend(now_ms)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(tend())
        try:
            decisions = await calls(busy, 1_000, 10_000)  # 0.15 USD each, 150 USD in all.
            await busy.settled("bob")
            await eventually(lambda: idle(busy, 20 * USD, most))
        finally:
            stop.set()
    allowed = sum(decision.verdict is Verdict.ALLOW for decision in decisions)
    spent = allowed * 10_000 * PRICE
    assert allowed >= 600
    needed = -((100 * USD - spent - 20 * USD) // (10 * USD))  # Rounded up: the fewest that lift it to the bound.
    expected = max(0, min(needed, most))
    assert await bought(busy) == [(f"=topup/bob/{no}", 10 * USD) for no in range(1, expected + 1)]
    assert len(await told(busy, TOP_UP_CREATED)) == expected
    await busy.account_when("bob", lambda hot: hot.available(2**53) == 100 * USD - spent + expected * 10 * USD)
    await busy.settled("bob")
    await proved(busy)


async def idle(made: Rig, below: int, most: int) -> bool:
    """The rule is satisfied, or its cap is reached."""
    left = await made.value("SELECT sum(remaining)::bigint FROM grant_balances")
    return int(str(left)) >= below or len(await bought(made)) >= most


async def test_every_customer_of_many_has_its_turn(busy: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several pages, half of them waiting for an answer all the while."""
    monkeypatch.setattr(top_ups, "PAGE", 100)
    monkeypatch.setattr(top_ups, "BATCH", 7)
    names = [f"c-{number:04}" for number in range(230)]
    for first in range(0, len(names), 50):
        await asyncio.gather(*(busy.stub.PutCustomer(pb.Customer(id=name)) for name in names[first : first + 50]))
        await asyncio.gather(
            *(
                busy.stub.PutContract(
                    pb.Contract(
                        id=f"of-{name}",
                        customer=name,
                        rate_card="llm",
                        top_up=rule(via=pb.TopUp.WEBHOOK if int(name[2:]) % 2 else pb.TopUp.DIRECT),
                    )
                )
                for name in names[first : first + 50]
            )
        )
    await eventually(lambda: decided(busy, len(names)))
    assert len(await told(busy, TOP_UP_CREATED)) == len(await told(busy, TOP_UP_REQUESTED)) == len(names) // 2


async def decided(made: Rig, number: int) -> bool:
    return await made.value("SELECT count(*) FROM top_ups") == number


class TestNextStep:
    def standing(self, available: int = 4, last: TopUp | None = None, spent: int = 0, **terms: int) -> Standing:
        return Standing(rule(**terms), available * USD, last, spent * USD, FEBRUARY)

    def asked(self, ms: int, *, answered: bool = False) -> TopUp:
        return TopUp(3, "=topup/bob/3", 7 * USD, ms, answered)

    def test_at_the_bound_nothing_is_bought(self) -> None:
        assert next_step(self.standing(available=5), FEBRUARY) is None
        assert next_step(self.standing(available=4), FEBRUARY) == Step(1, 10 * USD, ask=False)
        assert next_step(self.standing(available=-4), FEBRUARY) == Step(1, 10 * USD, ask=False)

    def test_the_cap_counts_what_was_decided_this_month(self) -> None:
        assert next_step(self.standing(spent=10, cap=20), FEBRUARY) == Step(1, 10 * USD, ask=False)
        assert next_step(self.standing(spent=11, cap=20), FEBRUARY) is None

    def test_what_is_asked_again_counts_once(self) -> None:
        now, via = FEBRUARY + 2 * DAY, pb.TopUp.WEBHOOK
        this_month = self.standing(last=self.asked(FEBRUARY + 1), spent=7, cap=7, via=via)
        assert next_step(this_month, now) == Step(3, 7 * USD, ask=True)
        last_month = self.standing(last=self.asked(FEBRUARY - 1), spent=0, cap=7, via=via)
        assert next_step(last_month, now) == Step(3, 7 * USD, ask=True)
        others = self.standing(last=self.asked(FEBRUARY - 1), spent=1, cap=7, via=via)
        assert next_step(others, now) is None

    def test_an_answer_makes_room_for_the_next(self) -> None:
        answered = self.asked(FEBRUARY, answered=True)
        assert next_step(self.standing(last=answered, via=pb.TopUp.WEBHOOK), FEBRUARY) == Step(4, 10 * USD, ask=True)


def test_ids_of_grants_are_ids_and_differ() -> None:
    long = ["c" * 127 + end for end in "ab"]
    ids = [grant_id(TENANT, name, no) for name in ("bob", "bob/1", *long) for no in (1, 2**31 - 1)]
    assert len(set(ids)) == len(ids) and max(map(len, ids)) <= MAX_ID_BYTES
    assert all(check_id("id", found) for found in ids)
