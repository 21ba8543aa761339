"""Grants begin, recur, roll over and expire on time, without traffic; what late events burn of them is booked right."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from entitlement.decision import Mode, Reason, Verdict
from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.v1 import ledger_pb2 as pb
from tests.control_rig import TENANT, USD, Rig, eventually, refusal
from tests.virtual_clock import Clock, clocked_rig

START = days_from_civil(2026, 1, 10) * DAY
FEBRUARY, MARCH, APRIL = (days_from_civil(2026, month, 1) * DAY for month in (2, 3, 4))
JANUARY = days_from_civil(2026, 1, 1) * DAY
A_DOLLAR = 333_334  # input tokens at 3 USD a million: a little more than one USD

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        await made.customer("ada")
        yield made, clock


def grant(name: str, amount: int, *, begins: int = 0, ends: int = 0, **fields: object) -> pb.Grant:
    message = pb.Grant(id=name, customer="ada", amount_nanos=amount, **fields)  # type: ignore[arg-type]
    if begins:
        message.effective_at.FromMilliseconds(begins)
    if ends:
        message.expires_at.FromMilliseconds(ends)
    return message


async def balance(rig: Rig, account: str) -> int:
    """What the ledger has on an account of its own: breakage, issued:paid, ..."""
    found = await rig.value("SELECT coalesce(sum(amount), 0)::bigint FROM entries WHERE account = $1", account)
    return int(str(found))


async def proved(rig: Rig) -> None:
    report = await rig.stub.Verify(pb.VerifyRequest())
    assert (report.drift_nanos, report.unbalanced_transactions, report.sequence_gaps) == (0, 0, 0), report
    assert list(report.drifts) == []


async def grants(rig: Rig) -> dict[str, int]:
    listed = await rig.stub.ListGrants(pb.ListRequest(customer="ada"))
    return {item.id: item.remaining_nanos for item in listed.grants}


async def test_a_scheduled_grant_becomes_active_and_an_expired_one_stops_without_traffic(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("soon", 5 * USD, begins=START + HOUR, ends=START + 2 * HOUR))
    assert (await rig.consume("ada", "input.tokens", 1000)).verdict is Verdict.DENY
    await clock.set(START + HOUR)
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 2 * USD
    await clock.set(START + 2 * HOUR)
    denied = await rig.consume("ada", "input.tokens", 1)
    assert (denied.verdict, denied.reason, denied.available) == (Verdict.DENY, Reason.INSUFFICIENT_CREDITS, 0)
    await eventually(lambda: _is(balance(rig, "breakage"), 2 * USD))
    assert await grants(rig) == {"soon": 0}
    await proved(rig)


async def test_breakage_is_booked_for_an_account_that_was_never_hot(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("unused", 5 * USD, ends=START + HOUR))
    await clock.set(START + HOUR)
    await eventually(lambda: _is(balance(rig, "breakage"), 5 * USD))
    await clock.set(START + HOUR + 37 * DAY)
    await eventually(lambda: _is(_swept(rig, "unused"), 2))
    assert await balance(rig, "breakage") == 5 * USD
    assert await balance(rig, "expired:unused") == await balance(rig, "grant:unused") == 0
    await proved(rig)


async def test_a_late_event_burns_the_expired_grant_of_its_time_and_takes_it_back_from_breakage(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("old", 5 * USD, ends=START + HOUR))
    await rig.stub.CreateGrant(grant("new", 7 * USD, priority=9))
    await rig.account("ada")
    await clock.set(START + 2 * HOUR)
    await eventually(lambda: _is(balance(rig, "breakage"), 5 * USD))
    decision = await rig.consume("ada", "input.tokens", 1_000_000, event_ms=START + 1)
    assert (decision.verdict, decision.available) == (Verdict.ALLOW, 7 * USD)
    await rig.settled("ada")
    assert await balance(rig, "breakage") == 2 * USD
    assert await balance(rig, "grant:old") == 2 * USD == -await balance(rig, "expired:old")
    assert (await rig.consume("ada", "input.tokens", 1_000_000)).available == 4 * USD  # Not late: the new one.
    await proved(rig)


async def test_beyond_the_reach_of_late_events_an_expired_grant_leaves_the_hot_account(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("old", 5 * USD, ends=START + HOUR))
    await rig.consume("ada", "input.tokens", 1_000_000)
    await clock.set(START + HOUR)
    await eventually(lambda: _is(balance(rig, "breakage"), 2 * USD))
    assert [left.remaining for left in (await rig.account("ada")).grants] == [2 * USD]
    await clock.set(START + HOUR + 36 * DAY)
    await rig.account_when("ada", lambda account: not account.grants)
    await eventually(lambda: _is(balance(rig, "grant:old"), 0))
    assert (await balance(rig, "breakage"), await balance(rig, "expired:old")) == (2 * USD, 0)
    await proved(rig)


async def test_a_recurring_grant_issues_one_allotment_a_period_and_rolls_over_what_it_may(shop: Shop) -> None:
    rig, clock = shop
    monthly = grant("plan", 10 * USD, begins=JANUARY, recurrence=pb.MONTH, rollover_max_nanos=4 * USD)
    created = await rig.stub.CreateGrant(monthly)
    assert (created.id, created.recurrence, created.category) == ("plan", pb.MONTH, pb.Grant.ALLOTMENT)
    assert await rig.stub.CreateGrant(monthly) == created
    assert await grants(rig) == {"plan/20260101T000000Z": 10 * USD}
    await rig.consume("ada", "input.tokens", 1_000_000)  # 7 USD are left; 4 may live on.

    await clock.set(FEBRUARY - HOUR)
    await eventually(lambda: _has(rig, "plan/20260201T000000Z", 10 * USD))
    waiting = await rig.account_when("ada", lambda account: len(account.grants) == 2)
    assert waiting.available(FEBRUARY - HOUR) == 7 * USD, "the next one waits for its period"
    await clock.set(FEBRUARY)
    await eventually(lambda: _has(rig, "plan/20260201T000000Z+", 4 * USD))
    await rig.account_when("ada", lambda account: account.available(FEBRUARY) == 14 * USD)
    assert await balance(rig, "breakage") == 3 * USD
    await proved(rig)

    await rig.consume("ada", "input.tokens", 5_000_000)  # 15 USD: one more than there is.
    used = await rig.consume("ada", "input.tokens", 4_000_000)  # 12 USD: 2 are left of both together.
    assert used.available == 2 * USD
    await clock.set(MARCH)
    await rig.account_when("ada", lambda account: account.available(MARCH) == 12 * USD)
    await eventually(lambda: _has(rig, "plan/20260301T000000Z+", 2 * USD))
    assert await balance(rig, "breakage") == 3 * USD
    assert await balance(rig, "issued:allotment") == -30 * USD
    await proved(rig)


async def test_an_allotment_counts_towards_the_cycle_it_belongs_to(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("plan", 10 * USD, begins=JANUARY, recurrence=pb.MONTH))
    assert (await rig.account("ada")).allowance == 10 * USD
    await clock.set(FEBRUARY - HOUR)
    waiting = await rig.account_when("ada", lambda account: len(account.grants) == 2)
    assert waiting.allowance == 10 * USD
    await clock.set(FEBRUARY)
    await rig.consume("ada", "input.tokens", 1)
    assert (await rig.account("ada")).allowance == 10 * USD


async def test_voiding_a_recurring_grant_ends_what_it_has_issued_and_issues_nothing_more(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("plan", 10 * USD, begins=JANUARY, recurrence=pb.MONTH, rollover_max_nanos=USD))
    await rig.consume("ada", "input.tokens", 1_000_000)
    voided = await rig.stub.VoidGrant(pb.VoidGrantRequest(id="plan", reason="left"))
    assert voided.HasField("voided_at")
    await rig.account_when("ada", lambda account: not account.grants)
    await eventually(lambda: _is(balance(rig, "breakage"), 7 * USD))
    await clock.set(MARCH)
    await rig.control.sweeper.sweep()
    assert list(await grants(rig)) == ["plan/20260101T000000Z"]
    await proved(rig)


async def test_a_recurring_grant_ends_when_it_says(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("plan", 10 * USD, begins=JANUARY, ends=MARCH, recurrence=pb.MONTH))
    await clock.set(APRIL)
    await eventually(lambda: _is(_swept(rig, "plan/20260201T000000Z"), 1))
    assert list(await grants(rig)) == ["plan/20260101T000000Z", "plan/20260201T000000Z"]
    (listed,) = (await rig.stub.ListRecurringGrants(pb.ListRequest(customer="ada"))).grants
    assert listed.expires_at.ToMilliseconds() == MARCH
    await proved(rig)


async def test_a_debt_of_late_events_is_repaid_by_the_next_allotment(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.CreateGrant(grant("plan", 10 * USD, begins=JANUARY, recurrence=pb.MONTH))
    await rig.consume("ada", "input.tokens", 4_000_000, mode=Mode.ADJUST_ONLY)
    assert (await rig.account("ada")).overage == 2 * USD
    await clock.set(FEBRUARY)
    await rig.account_when("ada", lambda account: account.overage == 0 and account.available(FEBRUARY) == 8 * USD)
    await eventually(lambda: _is(balance(rig, "overage:ada"), 0))
    await proved(rig)


BAD = [
    ({"rollover_max_nanos": 5}, "rollover_max_nanos: is for recurring grants: nothing follows one that does not recur"),
    ({"recurrence": 9}, "recurrence: 9 is unknown; expected 0..6"),
    ({"recurrence": pb.MONTH, "rollover_max_nanos": -1}, "rollover_max_nanos: -1 is outside 0..9223372036854775807"),
    ({"recurrence": pb.MONTH, "id": "x" * 101}, "id: of a recurring grant has 101 characters; expected at most 100"),
    ({"id": "=mine"}, "id: '=mine' begins with '=', which is the ledger's own"),
    ({"source": "plan"}, "source: is set by the server; leave the field out"),
]


async def test_bad_recurring_grants_are_refused_and_leave_nothing(shop: Shop) -> None:
    rig, _ = shop
    for change, problem in BAD:
        message = pb.Grant(**({"id": "g", "customer": "ada", "amount_nanos": 5} | change))  # type: ignore[arg-type]
        assert await refusal(rig.stub.CreateGrant(message)) == (grpc.StatusCode.INVALID_ARGUMENT, problem)
    assert await refusal(rig.stub.CreateGrant(grant("g", 5, ends=START - 1, begins=JANUARY, recurrence=pb.DAY))) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "expires_at: is over: a recurring grant would issue nothing",
    )
    assert await grants(rig) == {}
    code, _ = await refusal(rig.stub.VoidGrant(pb.VoidGrantRequest(id="nothing")))
    assert code is grpc.StatusCode.NOT_FOUND


async def _is(found: object, wanted: int) -> bool:
    return await found == wanted  # type: ignore[misc, no-any-return]


async def _has(rig: Rig, name: str, wanted: int) -> bool:
    return (await grants(rig)).get(name) == wanted


async def _swept(rig: Rig, name: str) -> int:
    rows = await rig.rows("SELECT swept FROM grants WHERE tenant = $1 AND id = $2", TENANT, name)
    return int(rows[0]["swept"]) if rows else -1
