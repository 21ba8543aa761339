"""Edges of contracts: seats, billing and rates of their own, changed at bad moments."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from entitlement.account import Billing, Status
from entitlement.decision import Reason, Verdict
from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from tests.control_rig import TENANT, USD, Rig, card, eventually, refusal
from tests.integration.test_money_edges import applied, arrears, contract, grant, grants, proved, swept
from tests.virtual_clock import Clock, clocked_rig

START = days_from_civil(2026, 1, 10) * DAY
FEBRUARY, MARCH, APRIL = (days_from_civil(2026, month, 1) * DAY for month in (2, 3, 4))
MILLION = 1_000_000  # input tokens cost 3 USD, output tokens 15
INVALID, NOT_YET = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
ENDED, IN_FORCE = 2, 1

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        await made.stub.PutCustomer(pb.Customer(id="ada"))
        yield made, clock


def team(seats: int, **fields: object) -> pb.Contract:
    """One USD a seat and month."""
    return contract("team", seats=seats, allowance_per_seat_nanos=USD, **fields)  # type: ignore[arg-type]


def own(feature: str, price: int) -> list[pb.Rate]:
    return [pb.Rate(feature=feature, per=MILLION, tiers=[pb.Tier(price_nanos=price)])]


def since(begins: int, rate_card: pb.RateCard) -> pb.RateCard:
    rate_card.effective_at.FromMilliseconds(begins)
    return rate_card


async def states(rig: Rig) -> dict[str, int]:
    return {row["id"]: row["state"] for row in await rig.rows("SELECT id, state FROM contracts")}


async def invoices(rig: Rig) -> list[pb.Invoice]:
    return list((await rig.stub.ListInvoices(pb.ListRequest(customer="ada"))).invoices)


async def invoiced(rig: Rig, number: int) -> list[pb.Invoice]:
    """The invoices, once there are so many."""

    async def made() -> bool:
        return len(await invoices(rig)) >= number

    await eventually(made)
    found = await invoices(rig)
    assert len(found) == number
    return found


async def charged(rig: Rig, feature: str, *, event_ms: int = 0) -> int:
    """What a million of it costs then."""
    decision = await rig.consume("ada", feature, MILLION, event_ms=event_ms)
    assert decision.verdict is Verdict.ALLOW
    return sum(line.amount for line in decision.charged)


async def late(rig: Rig, event_ms: int) -> None:
    """A million input tokens of then, by a backfill."""
    usage = gateway_pb2.CheckAndConsumeRequest(idempotency_key="late", customer="ada")
    usage.usage.add(feature="input.tokens", quantity=MILLION)
    usage.event_time.FromMilliseconds(event_ms)
    gathered = await rig.stub.RecordUsage(pb.RecordUsageRequest(backfill_id="b", events=[usage]))
    closed = await rig.stub.CloseBackfill(pb.BackfillRequest(id="b", reason="found"))
    assert (gathered.recorded, closed.recorded) == (1, 1)


async def sweeps_without_contracts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper does not come to the contracts any more."""

    async def nothing(now_ms: int) -> bool:
        return False

    await swept(rig)
    monkeypatch.setattr(rig.control.contracts, "tend", nothing)


async def test_seats_that_go_down_and_up_again_within_a_period_are_given_once(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(team(10))
    await rig.account("ada")
    for seats in (5, 10, 5, 10):
        await clock.advance(1000)
        await rig.stub.PutContract(team(seats))
    assert sum((await grants(rig)).values()) == 10 * USD
    assert (await applied(rig)).available(clock.now_ms) == 10 * USD
    await clock.advance(1000)
    await rig.stub.PutContract(team(12))
    assert (await applied(rig)).available(clock.now_ms) == 12 * USD, "what is more than ever before is given"
    await proved(rig)


@pytest.mark.parametrize("changes", [(0, 10), (5, 10, 5, 10), (20,), (0, 20, 5)])
async def test_seats_that_change_on_the_last_day_have_their_allotment_in_the_next_period(
    shop: Shop, changes: tuple[int, ...]
) -> None:
    rig, clock = shop
    await rig.stub.PutContract(team(10))
    await rig.account("ada")
    await clock.set(FEBRUARY - HOUR)
    await eventually(lambda: _number(rig, 2))  # February's is issued already.
    for seats in changes:
        await clock.advance(1000)
        await rig.stub.PutContract(team(seats))
    await clock.set(FEBRUARY + HOUR)
    await swept(rig)
    assert (await applied(rig)).available(clock.now_ms) == changes[-1] * USD
    await clock.set(MARCH + HOUR)
    await swept(rig)
    assert (await applied(rig)).available(clock.now_ms) == changes[-1] * USD
    await proved(rig)


async def test_an_anchor_that_changes_on_the_last_day_costs_no_allotment_of_the_new_periods(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(team(10))
    await rig.account("ada")
    await clock.set(FEBRUARY - HOUR)
    await eventually(lambda: _number(rig, 2))
    await rig.stub.PutContract(team(10, anchor=START - 2 * DAY))  # Periods begin on the 8th from now on.
    assert (await applied(rig)).available(clock.now_ms) == 10 * USD
    for begins in (FEBRUARY + 7 * DAY, MARCH + 7 * DAY):
        await clock.set(begins)
        await swept(rig)
        assert (await applied(rig)).available(clock.now_ms) == 10 * USD
    await proved(rig)


async def test_seats_that_have_no_room_are_refused_and_change_nothing(shop: Shop) -> None:
    rig, _ = shop
    await rig.stub.PutContract(contract("team"))
    await rig.stub.CreateGrant(grant("g", 10 * USD))
    code, text = await refusal(
        rig.stub.PutContract(contract("team", seats=1, allowance_per_seat_nanos=MAX_NANOS - 10 * USD + 1))
    )
    assert (code, text.partition(":")[0]) == (INVALID, "seats")
    assert (await rig.stub.ListContracts(pb.ListRequest(customer="ada"))).contracts[0].seats == 0
    assert await grants(rig) == {"g": 10 * USD}
    await rig.stub.PutContract(contract("team", seats=1, allowance_per_seat_nanos=MAX_NANOS - 10 * USD))
    assert (await applied(rig)).available(START) == MAX_NANOS
    await proved(rig)


async def test_a_contract_whose_seats_have_no_room_begins_without_them_and_keeps_nobody_waiting(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("one", ends=START + DAY))
    await rig.stub.PutContract(contract("two", begins=START + DAY, seats=1, allowance_per_seat_nanos=MAX_NANOS))
    await rig.stub.CreateGrant(grant("g", 3 * USD))
    await rig.stub.PutCustomer(pb.Customer(id="bob"))
    trial = contract("three", customer="bob", ends=START + DAY, billing=pb.Contract.TRIAL)
    await rig.stub.PutContract(trial)
    await rig.stub.PutContract(arrears("four", USD, customer="bob", begins=START + DAY))
    await rig.account("ada")
    await clock.set(START + DAY)
    await eventually(lambda: _states(rig, {"one": ENDED, "two": IN_FORCE, "three": ENDED, "four": IN_FORCE}))
    assert (await rig.consume("ada", "input.tokens", MILLION)).verdict is Verdict.ALLOW
    assert (await rig.account("bob")).config.billing is Billing.ARREARS
    assert len(await rig.rows("SELECT 1 FROM audit WHERE action = 'SkipSeats' AND subject = 'ada'")) == 1
    await proved(rig)


async def test_the_overage_of_arrears_that_end_inside_a_period_is_due_and_not_taken_from_later_grants(
    shop: Shop,
) -> None:
    rig, clock = shop
    await rig.stub.PutContract(arrears("before", 10 * USD, ends=START + DAY))
    await rig.stub.PutContract(contract("after", begins=START + DAY))
    assert (await rig.consume("ada", "input.tokens", 3 * MILLION)).overage == 9 * USD
    await clock.set(START + DAY)
    account = await rig.account_when("ada", lambda account: account.config.billing is Billing.PREPAID)
    assert account.overage == 0
    await rig.stub.CreateGrant(grant("g", 20 * USD))
    assert (await applied(rig)).available(clock.now_ms) == 20 * USD
    assert (await rig.consume("ada", "input.tokens", MILLION)).available == 17 * USD
    await proved(rig)
    await clock.set(FEBRUARY)
    await eventually(lambda: _closed(rig))
    found = await invoices(rig)
    assert sum(invoice.total_nanos for invoice in found) == 12 * USD
    assert sum(invoice.credits_applied_nanos for invoice in found) == 3 * USD
    assert sum(invoice.due_nanos for invoice in found) == 9 * USD
    await proved(rig)


async def test_arrears_that_end_together_with_their_periods_rule_are_due_too(shop: Shop) -> None:
    rig, _ = shop
    await rig.stub.PutContract(arrears("plan", 10 * USD))
    assert (await rig.consume("ada", "input.tokens", 4 * MILLION)).overage == 12 * USD
    await rig.stub.PutContract(contract("plan", billing=pb.Contract.PREPAID, anchor=START - DAY))
    account = await applied(rig)
    assert (account.config.billing, account.overage, account.period_start) == (Billing.PREPAID, 0, START - DAY)
    (invoice,) = await invoiced(rig, 1)
    assert (invoice.total_nanos, invoice.due_nanos) == (12 * USD, 12 * USD)
    await rig.stub.CreateGrant(grant("g", 20 * USD))
    assert (await applied(rig)).available(START) == 20 * USD
    await proved(rig)


async def test_a_backfill_from_before_a_change_of_rate_card_is_priced_by_the_card_of_its_time(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutRateCard(card("dear", {"input.tokens": 30 * USD}))
    await rig.stub.PutContract(contract("one", ends=START + 2 * DAY))
    await rig.stub.PutContract(contract("two", begins=START + 2 * DAY, rate_card="dear"))
    await rig.stub.CreateGrant(grant("g", 100 * USD))
    await rig.account("ada")
    await clock.set(START + 2 * DAY)
    await rig.account_when("ada", lambda account: account.config.plan == "dear")
    await clock.set(START + 50 * DAY)
    changed = contract("two", begins=START + 2 * DAY, rate_card="dear", thresholds=[pb.Threshold(percent=50)])
    await rig.stub.PutContract(changed)  # A change that has nothing to do with it.
    await applied(rig)
    await late(rig, START + DAY)
    assert await rig.value("SELECT amount FROM usage_events WHERE idempotency_key = 'late'") == 3 * USD
    assert await charged(rig, "input.tokens") == 30 * USD
    await proved(rig)


async def test_a_backdated_price_from_before_a_change_of_overrides_counts_from_its_own_date(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("deal", overrides=own("output.tokens", 9 * USD)))
    await rig.stub.CreateGrant(grant("g", 100 * USD))
    await clock.set(START + 5 * DAY)
    await rig.stub.PutContract(contract("deal", overrides=own("output.tokens", 8 * USD)))
    await clock.set(START + 6 * DAY)
    cheaper = card("llm", {"input.tokens": 2 * USD, "output.tokens": 15 * USD})
    await rig.stub.PutRateCard(since(START + DAY, cheaper))
    await clock.set(START + 7 * DAY)
    assert await charged(rig, "input.tokens") == 2 * USD
    assert await charged(rig, "input.tokens", event_ms=START + 2 * DAY) == 2 * USD
    assert await charged(rig, "input.tokens", event_ms=START + HOUR) == 3 * USD
    await proved(rig)


async def test_a_backdated_price_is_merged_with_the_overrides_of_its_time(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("deal", overrides=own("output.tokens", 9 * USD)))
    await rig.stub.CreateGrant(grant("g", 100 * USD))
    await clock.set(START + 5 * DAY)
    await rig.stub.PutContract(contract("deal", overrides=own("output.tokens", 8 * USD)))
    await clock.set(START + 6 * DAY)
    cheaper = card("llm", {"input.tokens": 2 * USD, "output.tokens": 7 * USD})
    await rig.stub.PutRateCard(since(START + DAY, cheaper))
    assert await charged(rig, "output.tokens", event_ms=START + HOUR) == 9 * USD
    assert await charged(rig, "output.tokens", event_ms=START + 2 * DAY) == 9 * USD
    assert await charged(rig, "output.tokens") == 8 * USD
    await proved(rig)


async def test_future_prices_of_a_card_that_a_contract_has_left_do_not_reach_it(shop: Shop) -> None:
    rig, clock = shop
    dear = card("llm", {"input.tokens": 50 * USD, "output.tokens": 15 * USD})
    await rig.stub.PutRateCard(since(FEBRUARY, dear))
    await rig.stub.PutRateCard(card("cheap", {"input.tokens": USD, "output.tokens": 15 * USD}))
    await rig.stub.PutContract(contract("deal", overrides=own("output.tokens", 9 * USD)))
    await rig.stub.CreateGrant(grant("g", 100 * USD))
    await clock.advance(DAY)
    await rig.stub.PutContract(contract("deal", rate_card="cheap", overrides=own("output.tokens", 9 * USD)))
    await clock.set(FEBRUARY + DAY)
    assert await charged(rig, "input.tokens") == USD
    assert await charged(rig, "output.tokens") == 9 * USD
    assert await charged(rig, "input.tokens", event_ms=START + HOUR) == 3 * USD
    await proved(rig)


@pytest.mark.parametrize("billing", [pb.Contract.PREPAID, pb.Contract.TRIAL])
async def test_only_arrears_have_a_gate_elsewhere_than_at_100_percent(shop: Shop, billing: pb.Contract.Billing) -> None:
    rig, _ = shop
    for percent in (99, 101, 150):
        assert await refusal(rig.stub.PutContract(contract("plan", billing=billing, gate_percent=percent))) == (
            INVALID,
            f"gate_percent: is {percent}; only ARREARS may run beyond or deny before 100",
        )
    put = await rig.stub.PutContract(contract("plan", billing=billing, gate_percent=100))
    assert put.gate_percent == 100
    await rig.stub.CreateGrant(grant("g", 6 * USD))
    denied = await rig.consume("ada", "input.tokens", 3 * MILLION)
    assert (denied.verdict, denied.reason) == (Verdict.DENY, Reason.INSUFFICIENT_CREDITS)
    await proved(rig)


async def test_a_customer_with_a_minimum_commit_that_never_calls_has_an_invoice_each_month(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(arrears("plan", 0, minimum_commit_nanos=100 * USD))
    await eventually(lambda: _installed(rig))
    for number, month in enumerate((FEBRUARY, MARCH, APRIL), 1):
        await clock.set(month)
        found = await invoiced(rig, number)
        assert found[-1].period_end.ToMilliseconds() == month
    assert [(item.minimum_commit_nanos, item.due_nanos) for item in found] == [(100 * USD, 100 * USD)] * 3
    await proved(rig)


async def test_a_put_between_a_contracts_end_and_the_sweep_works(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, clock = shop
    await rig.stub.PutRateCard(card("dear", {"input.tokens": 5 * USD}))
    await rig.stub.PutContract(contract("one", ends=START + DAY))
    await rig.stub.CreateGrant(grant("g", 10 * USD))
    await rig.account("ada")
    await sweeps_without_contracts(rig, monkeypatch)
    await clock.set(START + DAY)
    await rig.stub.PutContract(contract("two", rate_card="dear"))
    assert await states(rig) == {"one": ENDED, "two": IN_FORCE}
    await applied(rig)
    assert await charged(rig, "input.tokens") == 5 * USD
    await proved(rig)


async def test_a_contract_that_overlaps_one_that_has_ended_is_refused(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("one", ends=START + DAY))
    await rig.account("ada")
    await clock.set(START + DAY)
    await eventually(lambda: _states(rig, {"one": ENDED}))
    for begins in (START - 3 * DAY, START + HOUR):
        assert await refusal(rig.stub.PutContract(contract("two", begins=begins))) == (
            NOT_YET,
            "effective_at: the contract 'one' is active then; it ends at 2026-01-11T00:00:00.000Z",
        )
    assert (await applied(rig)).config.status is Status.SUSPENDED
    await rig.stub.PutContract(contract("two", begins=START + DAY))
    assert (await applied(rig)).config.status is Status.ACTIVE
    await proved(rig)


async def _states(rig: Rig, wanted: dict[str, int]) -> bool:
    return await states(rig) == wanted


async def _number(rig: Rig, wanted: int) -> bool:
    return len(await grants(rig)) == wanted


async def _installed(rig: Rig) -> bool:
    return bool(await rig.value("SELECT epoch FROM accounts WHERE tenant = $1 AND customer = 'ada'", TENANT))


async def _closed(rig: Rig) -> bool:
    """January's page has turned, and what ended has its invoice."""
    return bool(
        await rig.value(
            """SELECT period_start = $1 AND NOT EXISTS (SELECT 1 FROM ended_periods) FROM accounts
               WHERE customer = 'ada'""",
            FEBRUARY,
        )
    )
