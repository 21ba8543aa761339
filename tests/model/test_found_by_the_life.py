"""What the simulated life has found, each as a short story that failed before it was mended."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from entitlement.decision import Decision, Limits, Mode, parse_outcome
from entitlement.periods import DAY
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.pricing import PriceList
from tests.control_rig import TENANT, USD, Rig
from tests.model.conserved import verified
from tests.model.life import START, Life, at
from tests.virtual_clock import Clock, clocked_rig

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        yield made, clock


async def rest(shop: Shop, *customers: str) -> None:
    life = Life(*shop, seed=0, customers=0)
    await life.rest()
    for customer in customers:
        await shop[0].settled(customer)
    await life.rest()
    await verified(shop[0])


async def test_a_period_that_begins_where_an_earlier_one_began_goes_on_with_what_that_had_used(shop: Shop) -> None:
    rig, _ = shop
    await rig.customer("ada", 100 * USD)
    await rig.consume("ada", "input.tokens", 1_000_000)
    yearly = pb.Contract(id="contract-ada", customer="ada", rate_card="llm", period=pb.YEAR)
    await rig.stub.PutContract(yearly)  # January began on the day on which the year began.
    await rest(shop, "ada")
    account = await rig.account("ada")
    assert (account.settled, account.meters["input.tokens"]) == (3 * USD, 1_000_000)
    await rig.consume("ada", "input.tokens", 1_000_000)
    await rest(shop, "ada")
    assert (await rig.account("ada")).settled == 6 * USD


async def test_what_is_corrected_of_a_period_that_a_longer_one_has_come_to_hold_is_on_its_invoice(shop: Shop) -> None:
    rig, clock = shop
    weekly = pb.Contract(id="contract-ada", customer="ada", rate_card="llm", period=pb.WEEK)
    await rig.stub.PutCustomer(pb.Customer(id="ada"))
    await rig.stub.PutContract(weekly)
    event = gateway_pb2.CheckAndConsumeRequest(idempotency_key="k", customer="ada")
    event.usage.add(feature="input.tokens", quantity=1_000_000)
    await rig.stub.RecordUsage(pb.RecordUsageRequest(events=[event], backfill_id="b"))
    await rig.stub.CloseBackfill(pb.BackfillRequest(id="b"))
    await clock.advance(7 * DAY)
    await rest(shop, "ada")
    weekly.period = pb.YEAR
    await rig.stub.PutContract(weekly)
    await rest(shop, "ada")
    await rig.stub.RevertBackfill(pb.BackfillRequest(id="b"))
    await rest(shop, "ada")
    draft = await rig.stub.GetInvoice(pb.GetInvoiceRequest(customer="ada"))
    assert (draft.period_start, draft.total_nanos) == (at(START - 9 * DAY), -3 * USD)


async def test_a_grant_whose_time_was_over_long_ago_is_breakage(shop: Shop) -> None:
    rig, _ = shop
    await rig.customer("ada")
    await rig.account("ada")
    begins, ends = at(START - 90 * DAY), at(START - 60 * DAY)
    await rig.stub.CreateGrant(pb.Grant(id="g", customer="ada", amount_nanos=7, effective_at=begins, expires_at=ends))
    await rest(shop, "ada")
    broken = "SELECT sum(amount)::bigint FROM entries WHERE account = 'breakage'"
    assert (await rig.value(broken), await rig.value("SELECT remaining FROM grant_balances")) == (7, 0)
    await rest(shop, "ada")


async def test_seats_that_come_back_have_no_allotments_of_the_time_between(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutCustomer(pb.Customer(id="ada"))
    seats = pb.Contract(id="c", customer="ada", rate_card="llm", period=pb.WEEK, allowance_per_seat_nanos=10)
    for number, days in ((1, 3), (0, 60), (2, 0)):
        seats.seats = number
        await rig.stub.PutContract(seats)
        await rest(shop, "ada")
        await clock.advance(days * DAY)
        await rest(shop, "ada")
    listed = (await rig.stub.ListGrants(pb.ListRequest(customer="ada"))).grants
    assert [grant.amount_nanos for grant in listed] == [10, 20]


async def test_allotments_that_were_missed_roll_over_what_they_may_together(shop: Shop) -> None:
    rig, clock = shop
    await rig.customer("ada")
    daily = pb.Grant(id="r", customer="ada", amount_nanos=10, recurrence=pb.DAY, rollover_max_nanos=15)
    await rig.stub.CreateGrant(daily)
    await clock.advance(5 * DAY)  # Nobody swept meanwhile.
    await rest(shop, "ada")
    listed = (await rig.stub.ListGrants(pb.ListRequest(customer="ada"))).grants
    left = {grant.id: grant.remaining_nanos for grant in listed if grant.remaining_nanos}
    assert sum(left.values()) == 10 + 10 + 15, left  # Today's, tomorrow's, and what has been left of the others.


async def test_a_late_event_that_is_asked_twice_leaves_the_meters_of_its_period_as_they_were(shop: Shop) -> None:
    rig, clock = shop
    await rig.customer("ada", 100 * USD)
    await rig.account("ada")
    await clock.advance(30 * DAY)
    await rest(shop, "ada")
    message = gateway_pb2.CheckAndConsumeRequest(idempotency_key="k", customer="ada", event_time=at(START))
    message.usage.add(feature="input.tokens", quantity=1_000)
    request = parse_consume(TENANT, message)
    charge = PriceList((await rig.control.catalogs.snapshot()).tenants[0]).charge(request, "llm", START)
    for _ in range(2):  # The hot store forgets the key at once; the ledger does not.
        (reply,) = await rig.hot.consume([(request, charge)], Limits(remember_ms=1))
        decision = parse_outcome(reply, request)
        assert isinstance(decision, Decision) and not decision.replayed
        await rest(shop, "ada")
    account = await rig.account("ada")
    assert {units for (_, meter), units in account.archive.items() if meter == "input.tokens"} == {1_000}


async def test_what_is_taken_back_from_a_period_of_an_earlier_rule_leaves_nothing_below_zero(shop: Shop) -> None:
    rig, clock = shop
    await rig.customer("ada", 100 * USD)
    long_ago = gateway_pb2.CheckAndConsumeRequest(
        idempotency_key="k", customer="ada", event_time=at(START - 100 * DAY), mode=int(Mode.ADJUST_ONLY)
    )
    long_ago.usage.add(feature="input.tokens", quantity=1_000)
    await rig.stub.RecordUsage(pb.RecordUsageRequest(events=[long_ago], backfill_id="b"))
    await rig.stub.CloseBackfill(pb.BackfillRequest(id="b"))
    await rig.stub.PutContract(pb.Contract(id="contract-ada", customer="ada", rate_card="llm", period=pb.WEEK))
    await rest(shop, "ada")
    await rig.hot.drop((TENANT, "ada"))
    await clock.advance(DAY)
    await rig.stub.RevertBackfill(pb.BackfillRequest(id="b"))
    await rest(shop, "ada")
    assert min((await rig.account("ada")).archive.values(), default=0) == 0
