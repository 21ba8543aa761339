"""Contracts follow one another on time, with seats, rates of their own and an end; running traffic follows at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from entitlement.account import Billing, Status
from entitlement.decision import Decision, Reason, Verdict
from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from tests.control_rig import TENANT, USD, Rig, card, eventually, refusal
from tests.virtual_clock import Clock, clocked_rig

START = days_from_civil(2026, 1, 10) * DAY
FEBRUARY, MARCH = (days_from_civil(2026, month, 1) * DAY for month in (2, 3))
JANUARY = days_from_civil(2026, 1, 1) * DAY
INVALID, NOT_YET = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        await made.stub.PutCustomer(pb.Customer(id="ada"))
        yield made, clock


def contract(name: str, *, begins: int = 0, ends: int = 0, **fields: object) -> pb.Contract:
    terms: dict[str, object] = {"id": name, "customer": "ada", "rate_card": "llm"} | fields
    message = pb.Contract(**terms)  # type: ignore[arg-type]
    if begins:
        message.effective_at.FromMilliseconds(begins)
    if ends:
        message.ends_at.FromMilliseconds(ends)
    return message


async def proved(rig: Rig) -> None:
    await rig.settled("ada")
    report = await rig.stub.Verify(pb.VerifyRequest())
    assert (report.drift_nanos, report.unbalanced_transactions, report.sequence_gaps) == (0, 0, 0), report


async def told(rig: Rig) -> list[tuple[str, str]]:
    rows = await rig.rows("SELECT event_id FROM outbox WHERE type = 'entitlement.contract.changed.v1' ORDER BY id")
    return [tuple(row["event_id"].split(":")[1:3]) for row in rows]  # type: ignore[misc]


async def test_a_trial_ends_and_arrears_begin_on_time(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("trial", ends=FEBRUARY, billing=pb.Contract.TRIAL))
    await rig.stub.PutContract(contract("paid", begins=FEBRUARY, billing=pb.Contract.ARREARS, allowance_nanos=10 * USD))
    await rig.stub.CreateGrant(pb.Grant(id="t", customer="ada", amount_nanos=3 * USD, category=pb.Grant.TRIAL_CREDIT))
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).verdict is Verdict.ALLOW
    denied = await rig.consume("ada", "input.tokens", 1_000_000)
    assert (denied.verdict, denied.reason) == (Verdict.DENY, Reason.INSUFFICIENT_CREDITS)
    await clock.set(FEBRUARY)
    account = await rig.account_when("ada", lambda account: account.config.billing is Billing.ARREARS)
    assert account.allowance == 10 * USD
    allowed = await rig.consume("ada", "input.tokens", 5_000_000)
    assert (allowed.verdict, allowed.overage) == (Verdict.ALLOW, 15 * USD)
    gate = await rig.consume("ada", "input.tokens", 1)
    assert (gate.verdict, gate.reason) == (Verdict.DENY, Reason.ARREARS_GATE)
    assert await told(rig) == [("trial", "put"), ("paid", "put"), ("trial", "ended"), ("paid", "started")]
    await proved(rig)


async def test_a_contract_that_ends_without_another_suspends_the_account_until_one_begins(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("trial", ends=FEBRUARY, billing=pb.Contract.TRIAL))
    await rig.stub.CreateGrant(pb.Grant(id="t", customer="ada", amount_nanos=30 * USD))
    await rig.consume("ada", "input.tokens", 1_000_000)
    await clock.set(FEBRUARY)
    await rig.account_when("ada", lambda account: account.config.status is Status.SUSPENDED)
    denied = await rig.consume("ada", "input.tokens", 1)
    assert denied.reason is Reason.CUSTOMER_SUSPENDED
    await rig.stub.PutCustomer(pb.Customer(id="ada", status=pb.Customer.SUSPENDED))
    await rig.stub.PutCustomer(pb.Customer(id="ada", status=pb.Customer.ACTIVE))
    assert (await rig.consume("ada", "input.tokens", 1)).reason is Reason.CUSTOMER_SUSPENDED
    code, text = await refusal(rig.stub.PutContract(contract("trial")))
    assert (code, text) == (NOT_YET, "id: contract 'trial' has ended; put another one")
    await rig.stub.PutContract(contract("paid"))
    await rig.account_when("ada", lambda account: account.config.status is Status.ACTIVE)
    assert (await rig.consume("ada", "input.tokens", 1)).verdict is Verdict.ALLOW
    await proved(rig)


async def test_a_first_contract_in_the_future_may_have_grants_and_denies_until_it_begins(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("later", begins=FEBRUARY))
    await rig.stub.CreateGrant(pb.Grant(id="g", customer="ada", amount_nanos=USD))
    assert (await rig.consume("ada", "input.tokens", 1)).reason is Reason.CUSTOMER_SUSPENDED
    await clock.set(FEBRUARY)
    await rig.account_when("ada", lambda account: account.config.status is Status.ACTIVE)
    assert (await rig.consume("ada", "input.tokens", 1)).verdict is Verdict.ALLOW


async def test_two_contracts_may_not_be_active_at_once(shop: Shop) -> None:
    rig, _ = shop
    await rig.stub.PutContract(contract("one"))
    code, text = await refusal(rig.stub.PutContract(contract("two", begins=FEBRUARY)))
    assert (code, text) == (
        NOT_YET,
        "effective_at: the contract 'one' is active then; it has no end: give it ends_at first",
    )
    await rig.stub.PutContract(contract("one", ends=FEBRUARY))
    code, text = await refusal(rig.stub.PutContract(contract("two", begins=FEBRUARY - 1)))
    assert text == "effective_at: the contract 'one' is active then; it ends at 2026-02-01T00:00:00.000Z"
    await rig.stub.PutContract(contract("two", begins=FEBRUARY, ends=MARCH))
    code, _ = await refusal(rig.stub.PutContract(contract("one", ends=FEBRUARY + 1)))
    assert code is NOT_YET
    listed = await rig.stub.ListContracts(pb.ListRequest(customer="ada"))
    assert [item.id for item in listed.contracts] == ["one", "two"]


BAD: list[tuple[dict[str, object], dict[str, int], str]] = [
    ({}, {"begins": FEBRUARY, "ends": FEBRUARY}, "ends_at: is not later than effective_at"),
    ({}, {"begins": JANUARY, "ends": START}, "ends_at: is over; expected later than now"),
    ({"seats": -1}, {}, "seats: -1 is outside 0..10000000"),
    ({"seats": 3, "allowance_per_seat_nanos": 2**62}, {}, "allowance_per_seat_nanos: times 3 seats is over 92233720"),
    ({"minimum_commit_nanos": -1}, {}, "minimum_commit_nanos: -1 is outside 0.."),
    ({"overrides": [pb.Rate(feature="nope", tiers=[pb.Tier(price_nanos=1)])]}, {}, "overrides[0].feature: feature 'n"),
    ({"overrides": [pb.Rate(feature="input.tokens")]}, {}, "overrides[0].tiers: has 0 tiers"),
    (
        {"overrides": [pb.Rate(feature="input.tokens", tiers=[pb.Tier(price_nanos=-1)])]},
        {},
        "overrides[0].tiers[0].price_nanos: -1 is outside 0..",
    ),
    ({"top_up": pb.TopUp(amount_nanos=5)}, {}, "top_up.below_nanos: 0 is outside 1.."),
    (
        {"top_up": pb.TopUp(below_nanos=1, amount_nanos=5, monthly_cap_nanos=4)},
        {},
        "top_up.monthly_cap_nanos: 4 is less than one top-up of 5",
    ),
]


async def test_bad_contracts_are_refused_and_leave_nothing(shop: Shop) -> None:
    rig, _ = shop
    for fields, times, problem in BAD:
        code, text = await refusal(rig.stub.PutContract(contract("bad", **times, **fields)))  # type: ignore[arg-type]
        assert (code, text[: len(problem)]) == (INVALID, problem)
    assert not (await rig.stub.ListContracts(pb.ListRequest())).contracts
    assert await rig.rows("SELECT 1 FROM rate_cards WHERE id LIKE '=%'") == []


async def test_seats_give_an_allotment_each_period_and_more_seats_count_at_once(shop: Shop) -> None:
    rig, clock = shop
    terms = {"allowance_per_seat_nanos": 2 * USD, "billing": pb.Contract.ARREARS}
    await rig.stub.PutContract(contract("team", seats=5, **terms))
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 7 * USD
    await rig.stub.PutContract(contract("team", seats=8, **terms))
    await rig.account_when("ada", lambda account: account.available(START) == 13 * USD)
    await rig.stub.PutContract(contract("team", seats=3, **terms))
    await clock.set(FEBRUARY - HOUR)
    await rig.account_when("ada", lambda account: len(account.grants) == 3)
    assert (await rig.account("ada")).available(FEBRUARY - HOUR) == 13 * USD, "fewer seats count from the next period"
    await clock.set(FEBRUARY)
    assert (await rig.account("ada")).available(FEBRUARY) == 6 * USD
    over = await rig.consume("ada", "input.tokens", 3_000_000)
    assert (over.verdict, over.overage) == (Verdict.ALLOW, 3 * USD)
    await proved(rig)


async def test_a_contracts_own_rates_win_and_follow_the_card(shop: Shop) -> None:
    rig, clock = shop
    own = pb.Rate(feature="input.tokens", per=1_000_000, tiers=[pb.Tier(price_nanos=2 * USD)])
    await rig.stub.PutContract(contract("deal", overrides=[own]))
    await rig.stub.CreateGrant(pb.Grant(id="g", customer="ada", amount_nanos=100 * USD))
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 98 * USD
    assert (await rig.consume("ada", "output.tokens", 1_000_000)).available == 83 * USD

    await clock.advance(HOUR)
    await rig.stub.PutRateCard(card("llm", {"input.tokens": 9 * USD, "output.tokens": 10 * USD}))
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 81 * USD
    assert (await rig.consume("ada", "output.tokens", 1_000_000)).available == 71 * USD
    late = await rig.consume("ada", "output.tokens", 1_000_000, event_ms=START + 1)
    assert late.available == 56 * USD, "by the price of its own time"

    await clock.advance(HOUR)
    cheaper = pb.Rate(feature="input.tokens", per=1_000_000, tiers=[pb.Tier(price_nanos=USD)])
    await rig.stub.PutContract(contract("deal", overrides=[cheaper]))
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 55 * USD
    await rig.stub.PutContract(contract("deal"))
    await rig.account_when("ada", lambda account: account.config.plan == "llm")
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 46 * USD
    listed = await rig.stub.ListRateCards(pb.ListRequest())
    assert {item.id for item in listed.rate_cards} == {"llm"}
    assert (await refusal(rig.stub.PutRateCard(card("=deal", {"input.tokens": 1}))))[0] is INVALID
    await proved(rig)


async def test_a_late_event_is_priced_by_the_card_of_its_time(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutRateCard(card("dear", {"input.tokens": 5 * USD, "output.tokens": 5 * USD}))
    await rig.stub.PutContract(contract("trial", ends=FEBRUARY))
    await rig.stub.PutContract(contract("paid", begins=FEBRUARY, rate_card="dear"))
    await rig.stub.CreateGrant(pb.Grant(id="g", customer="ada", amount_nanos=100 * USD))
    await rig.account("ada")
    await clock.set(FEBRUARY)
    await rig.account_when("ada", lambda account: account.config.plan == "dear")
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).charged[0].amount == 5 * USD
    before = await rig.consume("ada", "input.tokens", 1_000_000, event_ms=FEBRUARY - 1)
    assert before.charged[0].amount == 3 * USD
    at = await rig.consume("ada", "input.tokens", 1_000_000, event_ms=FEBRUARY)
    assert at.charged[0].amount == 5 * USD
    usage = gateway_pb2.CheckAndConsumeRequest(idempotency_key="late", customer="ada")
    usage.usage.add(feature="input.tokens", quantity=1_000_000)
    usage.event_time.FromMilliseconds(FEBRUARY - DAY)
    assert (await rig.stub.RecordUsage(pb.RecordUsageRequest(events=[usage]))).recorded == 1
    assert await rig.value("SELECT amount FROM usage_events WHERE idempotency_key = 'late'") == 3 * USD
    await rig.hot.drop((TENANT, "ada"))
    again = await rig.consume("ada", "input.tokens", 1_000_000, event_ms=FEBRUARY - 1)
    assert again.charged[0].amount == 3 * USD, "an install knows it too"
    await clock.advance(40 * DAY)
    await rig.stub.PutContract(contract("paid", rate_card="llm"))
    account = await rig.account_when("ada", lambda account: account.config.plan == "llm")
    assert [plan for _, plan in account.config.earlier] == ["llm", "dear"]
    await proved(rig)


async def test_calls_during_a_plan_change_lose_no_unit(shop: Shop) -> None:
    rig, _ = shop
    await rig.stub.PutRateCard(card("dear", {"input.tokens": 5 * USD, "output.tokens": 5 * USD}))
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(pb.Grant(id="g", customer="ada", amount_nanos=10_000 * USD))
    await rig.account("ada")
    gate, decisions = asyncio.Semaphore(20), list[Decision]()

    async def call(number: int) -> None:
        async with gate:
            if number == 500:
                await rig.stub.PutContract(contract("plan", rate_card="dear"))
            decisions.append(await rig.consume("ada", "input.tokens", 1_000, key=f"call-{number}"))

    await asyncio.gather(*[call(number) for number in range(1_000)])
    assert all(decision.verdict is Verdict.ALLOW for decision in decisions)
    await rig.settled("ada")
    charged = sum(line.amount for decision in decisions for line in decision.charged)
    assert await rig.value("SELECT sum(amount)::bigint FROM usage_events WHERE tenant = $1", TENANT) == charged
    assert {line.amount for decision in decisions for line in decision.charged} == {3_000_000, 5_000_000}
    await eventually(lambda: _spent(rig, charged))
    await proved(rig)


async def _spent(rig: Rig, charged: int) -> bool:
    account = await rig.account("ada")
    return account.available(START) == 10_000 * USD - charged
