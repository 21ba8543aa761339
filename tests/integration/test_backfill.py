"""Backfills through LedgerAdmin, on a real ledger and a real hot store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.periods import DAY
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import backfill as module
from ledger_sync import corrections
from tests.control_rig import TENANT, USD, Rig, card, eventually, refusal, rig

NOT_YET = grpc.StatusCode.FAILED_PRECONDITION
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRICE = 3_000  # nanos a token


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    """Bob, with 10 USD since 500 days."""
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        await made.customer("bob", period=pb.MONTH)
        since = Timestamp()
        since.FromMilliseconds(await made.hot.now_ms() - 500 * DAY)
        await made.stub.CreateGrant(pb.Grant(id="g", customer="bob", amount_nanos=10 * USD, effective_at=since))
        yield made


def usage(key: str, quantity: int = 1_000, *, ms: int = 0, customer: str = "bob") -> gateway_pb2.CheckAndConsumeRequest:
    message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=key, customer=customer)
    message.usage.add(feature="input.tokens", quantity=quantity)
    if ms:
        message.event_time.FromMilliseconds(ms)
    return message


async def gather(shop: Rig, *events: gateway_pb2.CheckAndConsumeRequest, to: str = "old") -> pb.RecordUsageResponse:
    return await shop.stub.RecordUsage(pb.RecordUsageRequest(events=events, backfill_id=to))


async def verified(shop: Rig) -> pb.VerifyReport:
    async def settled() -> bool:
        pending = await shop.value("SELECT count(*) FROM hot_deltas")
        return not pending and not (await shop.stub.Verify(pb.VerifyRequest())).journal_lag

    await eventually(settled)
    report = await shop.stub.Verify(pb.VerifyRequest())
    assert (report.drifted, report.drift_nanos, report.unbalanced_transactions) == (0, 0, 0), report
    assert (report.quarantined, report.sequence_gaps) == (0, 0), report
    return report


async def books(shop: Rig) -> dict[str, object]:
    """What usage has come to, everywhere."""
    rows = await shop.rows("SELECT customer, period_start, meter, quantity, amount FROM meters WHERE quantity <> 0")
    account = await shop.account("bob")
    return {
        "meters": [tuple(row) for row in rows],
        "remaining": await shop.value("SELECT remaining FROM grant_balances"),
        "overage": await shop.value("SELECT overage FROM accounts"),
        "settled": await shop.value("SELECT coalesce(sum(settled), 0)::bigint FROM account_periods"),
        "revenue": await shop.value(
            "SELECT coalesce(sum(amount), 0)::bigint FROM entries WHERE account LIKE 'revenue:%'"
        ),
        "hot": (account.settled, account.overage, [grant.remaining for grant in account.grants]),
        "hot meters": {meter: units for meter, units in account.meters.items() if units},
        "quotas": {name: quota.used for name, quota in account.quotas.items()},
    }


async def test_it_is_invisible_until_closed_and_gone_when_reverted(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await shop.customer("bob", period=pb.MONTH, quotas=[pb.QuotaLimit(feature="input.tokens", limit=10**9)])
    await shop.consume("bob", "input.tokens", 500, key="live")
    await shop.settled("bob")
    before = await books(shop)
    events = [usage(f"b{n}", ms=now_ms - n * 20 * DAY) for n in range(1, 21)]
    events.append(usage("today"))  # Without a time: dated by the closing.
    assert (await gather(shop, *events)).recorded == 21
    await verified(shop)
    assert await books(shop) == before
    draft = await shop.value("SELECT count(*) FROM usage_events")
    assert draft == 1

    closed = await shop.stub.CloseBackfill(pb.BackfillRequest(id="old"))
    assert (closed.status, closed.events, closed.recorded, closed.duplicates) == (pb.Backfill.CLOSED, 21, 21, 0)
    assert (closed.amount_nanos, list(closed.rejected)) == (21 * 1_000 * PRICE, [])
    assert (await verified(shop)).total_nanos == (21_000 + 500) * PRICE
    after = await books(shop)
    assert after["remaining"] == 10 * USD - (21_000 + 500) * PRICE
    assert after["hot"] != before["hot"] and after["quotas"] != before["quotas"]
    assert await shop.stub.CloseBackfill(pb.BackfillRequest(id="old")) == closed

    reverted = await shop.stub.RevertBackfill(pb.BackfillRequest(id="old", reason="twice imported"))
    assert (reverted.status, reverted.recorded, reverted.amount_nanos) == (pb.Backfill.REVERTED, 21, 0)
    assert (await verified(shop)).total_nanos == 500 * PRICE
    assert await books(shop) == before
    assert await shop.value("SELECT count(*) FROM usage_events") == 22  # The history is kept.
    assert await shop.stub.RevertBackfill(pb.BackfillRequest(id="old")) == reverted
    assert await shop.value("SELECT count(*) FROM transactions WHERE kind = 'reverse'") == 21
    lines = await shop.rows("SELECT action, detail FROM audit WHERE subject = 'old' ORDER BY id")
    assert [row["action"] for row in lines] == ["RecordUsage", "CloseBackfill", "RevertBackfill"]
    assert lines[-1]["detail"] == "reason=twice imported"


async def test_a_meter_of_long_ago_counts_again_from_what_a_revert_has_left(shop: Rig) -> None:
    await shop.stub.PutRateCard(card("odd", {"input.tokens": 1}, per=3))  # A third of a nano.
    await shop.customer("amy", 1_000, rate_card="odd")
    long_ago = await shop.hot.now_ms() - 400 * DAY
    for name in ("kept", "wrong"):
        await gather(shop, *(usage(f"{name}-{n}", 5, ms=long_ago, customer="amy") for n in range(2)), to=name)
        await shop.stub.CloseBackfill(pb.BackfillRequest(id=name))
    await shop.hot.drop((TENANT, "amy"))  # Nobody needs those meters: the next install leaves them out.
    await shop.stub.RevertBackfill(pb.BackfillRequest(id="wrong"))
    await verified(shop)
    await gather(shop, usage("more", 5, ms=long_ago, customer="amy"), to="more")
    closed = await shop.stub.CloseBackfill(pb.BackfillRequest(id="more"))
    assert closed.amount_nanos == 5 - 3  # Units 11 to 15 of the period: a third of 15, less a rounded third of 10.
    assert await shop.value("SELECT quantity FROM meters WHERE customer = 'amy'") == 15
    await verified(shop)


async def test_what_live_traffic_has_charged_is_not_charged_again(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await shop.consume("bob", "input.tokens", 7, key="known")
    await shop.settled("bob")
    known = usage("known", 7)
    known.mode = gateway_pb2.MODE_NORMAL  # As it was asked then.
    gathered = await gather(shop, known, usage("fresh"), usage("fresh"), usage("later", 9), usage("fresh", 2))
    assert (gathered.recorded, gathered.duplicates) == (2, 2)
    assert [(item.idempotency_key, item.error.partition(";")[0]) for item in gathered.rejected] == [
        ("fresh", "idempotency_key: 'fresh' was used before with another payload (reason IDEMPOTENCY_MISMATCH)")
    ]
    again = await gather(shop, usage("fresh"), usage("later", 1))
    assert (again.recorded, again.duplicates, len(again.rejected)) == (0, 1, 1)
    # Another backfill brings one of the keys before this one is closed.
    await gather(shop, usage("later", 9), usage("own", ms=now_ms - 60 * DAY), to="other")
    assert (await shop.stub.CloseBackfill(pb.BackfillRequest(id="other"))).recorded == 2
    closed = await shop.stub.CloseBackfill(pb.BackfillRequest(id="old"))
    assert (closed.events, closed.recorded, closed.duplicates, closed.amount_nanos) == (2, 1, 1, 1_000 * PRICE)
    assert (await verified(shop)).total_nanos == (7 + 1_000 + 9 + 1_000) * PRICE
    # A duplicate is not this backfill's: it stays when this one is taken back.
    await shop.stub.RevertBackfill(pb.BackfillRequest(id="old"))
    assert (await verified(shop)).total_nanos == (7 + 9 + 1_000) * PRICE


async def test_each_event_has_its_own_fate(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    check = usage("check")
    check.mode = gateway_pb2.MODE_CHECK_ONLY
    gathered = await gather(
        shop,
        *(usage("good"), usage(""), check, usage("stranger", customer="nobody")),
        *(usage("ancient", ms=now_ms - 3_700 * DAY), usage("ahead", ms=now_ms + DAY)),
    )
    assert gathered.recorded == 4
    assert {item.idempotency_key for item in gathered.rejected} == {"", "check"}
    closed = await shop.stub.CloseBackfill(pb.BackfillRequest(id="old"))
    assert (closed.events, closed.recorded) == (4, 1)
    errors = {item.idempotency_key: item.error for item in closed.rejected}
    assert errors.keys() == {"stranger", "ancient", "ahead"} and errors["stranger"] == "CUSTOMER_NOT_FOUND"


async def test_an_open_one_is_reverted_without_a_trace_in_the_books(shop: Rig) -> None:
    before = await books(shop)
    await gather(shop, usage("k"))
    reverted = await shop.stub.RevertBackfill(pb.BackfillRequest(id="old", reason="never mind"))
    assert (reverted.status, reverted.events, reverted.recorded) == (pb.Backfill.REVERTED, 1, 0)
    await verified(shop)
    assert await books(shop) == before
    # The key is free: nothing was charged for it.
    assert (await shop.stub.RecordUsage(pb.RecordUsageRequest(events=[usage("k")]))).recorded == 1


async def test_a_closing_that_broke_off_is_carried_on(shop: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hot store has recorded a chunk and the outcome was not noted: the events are this backfill's all the same."""
    monkeypatch.setattr(module, "MAX_EVENTS", 10)
    events = [usage(f"k{n}") for n in range(10)]
    await gather(shop, *events)
    await shop.stub.RecordUsage(pb.RecordUsageRequest(events=[usage("k0")]))  # Charged before it is closed.
    note = module.Backfills._note
    noted = 0

    async def lost(self: module.Backfills, backfill: str, outcomes: dict[str, str]) -> None:
        nonlocal noted
        noted += 1
        if noted == 2:
            raise OSError("the machine is gone")
        await note(self, backfill, outcomes)

    with monkeypatch.context() as broken:
        broken.setattr(module.Backfills, "_note", lost)
        code, _ = await refusal(shop.stub.CloseBackfill(pb.BackfillRequest(id="old")))
        assert code is grpc.StatusCode.INTERNAL
    code, text = await refusal(shop.stub.RevertBackfill(pb.BackfillRequest(id="old")))
    assert (code, text) == (NOT_YET, "id: 'old' was not closed to its end: close it again first")
    closed = await shop.stub.CloseBackfill(pb.BackfillRequest(id="old"))
    assert (closed.recorded, closed.duplicates, closed.amount_nanos) == (9, 1, 9_000 * PRICE)
    assert (await verified(shop)).total_nanos == 10_000 * PRICE
    # A taking back that breaks off is carried on, too.
    monkeypatch.setattr(corrections, "CHUNK", 4)
    book, booked = corrections._correct, 0

    async def fail(*arguments: object) -> None:
        nonlocal booked
        booked += 1
        if booked == 2:
            raise OSError("the machine is gone")
        await book(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(corrections, "_correct", fail)
        await refusal(shop.stub.RevertBackfill(pb.BackfillRequest(id="old")))
    assert (await verified(shop)).total_nanos == 6_000 * PRICE
    assert (await shop.stub.RevertBackfill(pb.BackfillRequest(id="old"))).amount_nanos == 0
    assert (await verified(shop)).total_nanos == 1_000 * PRICE


async def test_bad_calls_are_refused(shop: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (shop.stub.CloseBackfill, shop.stub.RevertBackfill):
        code, text = await refusal(call(pb.BackfillRequest(id="a b")))
        assert (code, text[:27]) == (INVALID, "id: 'a b' has a character o")
        code, text = await refusal(call(pb.BackfillRequest(id="none")))
        assert (code, text) == (grpc.StatusCode.NOT_FOUND, "id: there is no backfill 'none'")
        code, text = await refusal(call(pb.BackfillRequest(id="none", reason="a\nb")))
        assert (code, text[:8]) == (INVALID, "reason: ")
    await gather(shop, usage("k"))
    await shop.stub.CloseBackfill(pb.BackfillRequest(id="old"))
    code, text = await refusal(gather(shop, usage("l")))
    assert (code, text) == (NOT_YET, "backfill_id: 'old' is CLOSED; gather under another id")
    await shop.stub.RevertBackfill(pb.BackfillRequest(id="old"))
    for attempt in (gather(shop, usage("l")), shop.stub.CloseBackfill(pb.BackfillRequest(id="old"))):
        code, text = await refusal(attempt)
        assert code is NOT_YET and "'old' is REVERTED" in text
    monkeypatch.setattr(module, "MAX_GATHERED", 3)
    await gather(shop, usage("m1"), usage("m2"), to="small")
    code, text = await refusal(gather(shop, usage("m2"), usage("m3"), usage("m4"), to="small"))
    assert (code, text) == (
        NOT_YET,
        "backfill_id: 'small' has 2 events and would have more than 3; take another",
    )
    assert await shop.value("SELECT count(*) FROM backfill_events WHERE backfill = 'small'") == 2
