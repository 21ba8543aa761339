"""Edges of grants and allowances: what belongs to a cycle, what expires, and what goes wrong in between."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from entitlement.account import Account, Status
from entitlement.decision import Verdict
from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.expiry import KEEP_EXPIRED
from ledger_sync.rated import CROSSED
from tests.control_rig import TENANT, USD, Rig, card, eventually, refusal
from tests.virtual_clock import Clock, clocked_rig

START = days_from_civil(2026, 1, 10) * DAY
JANUARY, FEBRUARY = (days_from_civil(2026, month, 1) * DAY for month in (1, 2))
MILLION = 1_000_000  # input tokens cost 3 USD
INVALID = grpc.StatusCode.INVALID_ARGUMENT

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        await made.stub.PutCustomer(pb.Customer(id="ada"))
        yield made, clock


def contract(name: str, *, begins: int = 0, ends: int = 0, anchor: int = 0, **fields: object) -> pb.Contract:
    terms: dict[str, object] = {"id": name, "customer": "ada", "rate_card": "llm"} | fields
    message = pb.Contract(**terms)  # type: ignore[arg-type]
    for time, ms in ((message.effective_at, begins), (message.ends_at, ends), (message.anchor, anchor)):
        if ms:
            time.FromMilliseconds(ms)
    return message


def grant(name: str, amount: int, *, begins: int = 0, ends: int = 0, **fields: object) -> pb.Grant:
    terms: dict[str, object] = {"id": name, "customer": "ada", "amount_nanos": amount} | fields
    message = pb.Grant(**terms)  # type: ignore[arg-type]
    if begins:
        message.effective_at.FromMilliseconds(begins)
    if ends:
        message.expires_at.FromMilliseconds(ends)
    return message


def arrears(name: str, allowance: int, **fields: object) -> pb.Contract:
    return contract(name, billing=pb.Contract.ARREARS, allowance_nanos=allowance, **fields)  # type: ignore[arg-type]


async def swept(rig: Rig) -> None:
    """All that is due has been done."""

    async def done() -> bool:
        return await rig.control.sweeper.sweep()

    await eventually(done)


async def applied(rig: Rig) -> Account:
    """The hot account, once it has every change that the ledger has decided."""
    await rig.account("ada")

    async def done() -> bool:
        return bool(await rig.value("SELECT version = applied FROM accounts WHERE customer = 'ada'"))

    await eventually(done)
    return await rig.account("ada")


async def proved(rig: Rig) -> None:
    """Hot store and books agree, and no record of the journal was set aside."""
    await applied(rig)
    await rig.settled("ada")
    report = await rig.stub.Verify(pb.VerifyRequest())
    assert (report.drift_nanos, report.unbalanced_transactions, report.sequence_gaps) == (0, 0, 0), report
    assert list(report.drifts) == []
    assert await rig.rows("SELECT reason FROM quarantine") == []


async def grants(rig: Rig) -> dict[str, int]:
    """What is left of each that is not voided."""
    listed = await rig.stub.ListGrants(pb.ListRequest(customer="ada"))
    return {item.id: item.remaining_nanos for item in listed.grants if not item.HasField("voided_at")}


async def has_swept(rig: Rig, name: str, how_far: int) -> bool:
    return await rig.value("SELECT swept FROM grants WHERE tenant = $1 AND id = $2", TENANT, name) == how_far


async def runs_over_to_the_gate(rig: Rig, tokens: int) -> None:
    """So many input tokens come exactly to the gate; one more is denied."""
    assert (await rig.consume("ada", "input.tokens", tokens)).verdict is Verdict.ALLOW
    assert (await rig.consume("ada", "input.tokens", 1)).verdict is Verdict.DENY


@pytest.mark.parametrize("allowance", [MAX_NANOS, MAX_NANOS - 10 * USD + 1])
async def test_a_credit_line_that_is_over_int64_with_the_grants_is_refused(shop: Shop, allowance: int) -> None:
    rig, _ = shop
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(grant("g", 10 * USD))
    await rig.account("ada")
    code, text = await refusal(rig.stub.PutContract(arrears("plan", allowance)))
    assert (code, text) == (
        INVALID,
        f"allowance_nanos: {allowance} with the {10 * USD} that grants have left is over {MAX_NANOS}",
    )
    assert (await rig.consume("ada", "input.tokens", MILLION)).available == 7 * USD
    assert (await applied(rig)).allowance == 10 * USD
    await proved(rig)


async def test_a_credit_line_that_just_fits_beside_the_grants_is_booked(shop: Shop) -> None:
    rig, _ = shop
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(grant("g", 10 * USD))
    await rig.account("ada")
    await rig.stub.PutContract(arrears("plan", MAX_NANOS - 10 * USD))
    assert (await applied(rig)).allowance == MAX_NANOS
    assert (await refusal(rig.stub.CreateGrant(grant("more", 1))))[0] is INVALID
    assert (await rig.consume("ada", "input.tokens", MILLION)).verdict is Verdict.ALLOW
    await proved(rig)


async def test_grants_that_are_used_up_in_turn_bring_the_allowance_to_int64s_bound_and_not_beyond(shop: Shop) -> None:
    rig, _ = shop
    huge = 4 * 10**18
    await rig.stub.PutRateCard(card("dear", {"input.tokens": 10**12}, per=1))
    await rig.stub.PutContract(contract("plan", rate_card="dear"))
    await rig.account("ada")
    for number, allowance in enumerate((huge, 2 * huge, MAX_NANOS)):
        await rig.stub.CreateGrant(grant(f"g{number}", huge))
        assert (await applied(rig)).allowance == allowance
        tokens = huge // 10**12 if allowance < MAX_NANOS else 1  # A period's usage is an int64 too.
        assert (await rig.consume("ada", "input.tokens", tokens)).verdict is Verdict.ALLOW
        await rig.settled("ada")
    await proved(rig)


@pytest.mark.parametrize("live", [True, False])
async def test_voiding_a_grant_of_a_later_cycle_leaves_this_ones_allowance_and_gate(shop: Shop, live: bool) -> None:
    """Not live: the change arrives with an install."""
    rig, _ = shop
    await rig.stub.PutContract(arrears("plan", 10 * USD))
    before = await rig.account("ada")
    await rig.stub.CreateGrant(grant("next", 7 * USD, begins=FEBRUARY))
    assert (await applied(rig)).allowance == 10 * USD
    if not live:
        await rig.hot.drop((TENANT, "ada"))
    await rig.stub.VoidGrant(pb.VoidGrantRequest(id="next", reason="never mind"))
    account = await applied(rig)
    assert (account.allowance, account.grants, account.epoch == before.epoch) == (10 * USD, [], live)
    await runs_over_to_the_gate(rig, 5 * MILLION)
    await proved(rig)


@pytest.mark.parametrize("live", [True, False])
async def test_a_grant_of_an_earlier_cycle_that_leaves_the_account_takes_nothing_from_the_allowance(
    shop: Shop, live: bool
) -> None:
    rig, clock = shop
    await rig.stub.PutContract(arrears("plan", 10 * USD))
    await rig.stub.CreateGrant(grant("old", 8 * USD, ends=START + DAY))
    before = await rig.account("ada")
    assert before.allowance == 18 * USD
    await clock.set(START + DAY)
    await eventually(lambda: has_swept(rig, "old", 1))
    await clock.set(FEBRUARY + HOUR)
    turned = await rig.account_when("ada", lambda account: account.period_start == FEBRUARY)
    assert (turned.allowance, len(turned.grants)) == (10 * USD, 1), "late events may still burn it"
    await swept(rig)
    await rig.settled("ada")
    if not live:
        await rig.hot.drop((TENANT, "ada"))
    await clock.set(START + DAY + 36 * DAY)
    await eventually(lambda: has_swept(rig, "old", 2))
    account = await applied(rig)
    assert (account.allowance, account.grants, account.epoch == before.epoch) == (10 * USD, [], live)
    await runs_over_to_the_gate(rig, 5 * MILLION)
    await proved(rig)


async def test_a_grant_that_was_made_earlier_counts_in_the_cycle_in_which_it_begins(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(grant("g", 10 * USD, begins=FEBRUARY + 5 * DAY))
    assert (await rig.account("ada")).allowance == 0
    await clock.set(FEBRUARY + HOUR)
    await rig.account_when("ada", lambda account: account.period_start == FEBRUARY and account.allowance == 10 * USD)
    await clock.set(FEBRUARY + 6 * DAY)
    assert (await rig.consume("ada", "input.tokens", 3_200_000)).verdict is Verdict.ALLOW  # 9.6 USD
    assert (await rig.account("ada")).crossed == (80, 90)
    await proved(rig)
    assert len(await rig.rows("SELECT 1 FROM outbox WHERE type = $1", CROSSED)) == 2


async def test_what_rolls_over_within_a_cycle_is_in_its_allowance_once(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(arrears("plan", 0))
    daily = grant("d", 10 * USD, recurrence=pb.DAY, begins=START, ends=START + 4 * DAY, rollover_max_nanos=100 * USD)
    await rig.stub.CreateGrant(daily)
    await rig.account("ada")
    for day in (1, 2, 3):
        await clock.set(START + day * DAY)
        await swept(rig)
        account = await applied(rig)
        issued = await rig.value("SELECT -sum(amount)::bigint FROM entries WHERE account = 'issued:allotment'")
        assert account.allowance == issued
        assert account.available(clock.now_ms) == (day + 1) * 10 * USD, "nothing was used, so all of it rolls over"
    await runs_over_to_the_gate(rig, 20 * MILLION)  # 60 USD: 150 % of the four allotments.
    await proved(rig)


async def test_a_database_error_that_passes_loses_no_allotment(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(grant("m", 5 * USD, recurrence=pb.MONTH, begins=JANUARY))
    await rig.account("ada")
    await rig.execute("CREATE SEQUENCE inserts")  # What it counts is not rolled back.
    await rig.execute(
        """CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               IF nextval('inserts') = 1 THEN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END IF;
               RETURN NEW;
           END $$"""
    )
    await rig.execute("CREATE TRIGGER fail_once BEFORE INSERT ON grants FOR EACH ROW EXECUTE FUNCTION fail_once()")
    await clock.set(FEBRUARY)
    await eventually(lambda: _has(rig, "m/20260201T000000Z", 5 * USD))
    assert int(str(await rig.value("SELECT last_value FROM inserts"))) == 2, "it failed, and was tried again"
    assert await rig.rows("SELECT detail FROM audit WHERE action = 'SkipAllotment'") == []
    assert (await applied(rig)).available(FEBRUARY) == 5 * USD
    await proved(rig)


async def test_allotments_by_the_hour_that_nobody_uses_go_on_and_leave_room(shop: Shop) -> None:
    rig, clock = shop
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(grant("h", USD, recurrence=pb.HOUR, begins=START))
    await rig.account("ada")
    for day in range(1, 13):
        await clock.set(START + day * DAY)
        await swept(rig)
    await swept(rig)  # What was issued for hours that are over expires now.
    assert await rig.rows("SELECT detail FROM audit WHERE action = 'SkipAllotment'") == []
    account = await applied(rig)
    assert account.available(clock.now_ms) == USD, "the allotment of this hour"
    assert sum(item.expires_ms <= clock.now_ms for item in account.grants) == KEEP_EXPIRED
    assert await rig.value("SELECT count(*) FROM grants") == 12 * 24 + 1
    await rig.stub.CreateGrant(grant("more", 2 * USD))
    assert (await rig.consume("ada", "input.tokens", MILLION)).available == 0
    await proved(rig)


@pytest.mark.parametrize("ending", ["Z", "Z+", "Z+2", ".250Z", ".250Z+"])
async def test_ids_that_allotments_have_are_refused(shop: Shop, ending: str) -> None:
    rig, _ = shop
    await rig.stub.PutContract(contract("plan"))
    await rig.stub.CreateGrant(grant("m", 5 * USD, recurrence=pb.MONTH, begins=JANUARY, rollover_max_nanos=USD))
    for recurrence in (pb.NEVER, pb.MONTH):
        taken = grant(f"m/20260201T000000{ending}", 1, recurrence=recurrence)
        assert await refusal(rig.stub.CreateGrant(taken)) == (
            INVALID,
            f"id: {taken.id!r} reads like an allotment's, which the ledger gives",
        )
    await rig.stub.CreateGrant(grant("m/20260201", 1))
    assert (await grants(rig)).keys() == {"m/20260101T000000Z", "m/20260201"}
    await proved(rig)


async def test_a_top_up_is_not_answered_by_a_grant_that_recurs(shop: Shop) -> None:
    rig, _ = shop
    rule = pb.TopUp(below_nanos=USD, amount_nanos=5 * USD, via=pb.TopUp.WEBHOOK)
    await rig.stub.PutContract(contract("plan", top_up=rule))
    await eventually(lambda: _asked(rig))
    asked = str(await rig.value("SELECT grant_id FROM top_ups"))
    recurring = grant(asked, 5 * USD, recurrence=pb.DAY)
    assert await refusal(rig.stub.CreateGrant(recurring)) == (INVALID, "recurrence: the top-up asked for one grant")
    assert not (await rig.stub.ListRecurringGrants(pb.ListRequest(customer="ada"))).grants
    await rig.stub.CreateGrant(grant(asked, 5 * USD))
    account = await applied(rig)
    assert (account.available(START), account.config.status) == (5 * USD, Status.ACTIVE)
    await proved(rig)


async def _has(rig: Rig, name: str, wanted: int) -> bool:
    return (await grants(rig)).get(name) == wanted


async def _asked(rig: Rig) -> bool:
    return bool(await rig.rows("SELECT 1 FROM top_ups"))
