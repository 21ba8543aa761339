"""Re-rating through LedgerAdmin, on a real ledger and a real hot store, while decisions go on.

RERATE_EVENTS sets how many events the large one takes (100,000 on a quiet machine; it prints the seconds).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.periods import DAY, HOUR
from entitlement.rating import Model, Rate, Tier, cost
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import corrections
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, card, eventually, refusal, rig

EVENTS = int(os.environ.get("RERATE_EVENTS", "5000"))
CALL = 1_000  # events
OLD, NEW = 3_000, 2_000  # nanos a token


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        yield made


def at(ms: int) -> Timestamp:
    time = Timestamp()
    time.FromMilliseconds(ms)
    return time


def usage(
    customer: str, key: str, quantity: int, ms: int, feature: str = "input.tokens", model: str = ""
) -> gateway_pb2.CheckAndConsumeRequest:
    message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=key, customer=customer)
    line = message.usage.add(feature=feature, quantity=quantity)
    if model:
        line.dimensions["model"] = model
    message.event_time.FromMilliseconds(ms)
    return message


async def record(shop: Rig, events: Sequence[gateway_pb2.CheckAndConsumeRequest]) -> None:
    for first in range(0, len(events), CALL):
        part = events[first : first + CALL]
        response = await shop.stub.RecordUsage(pb.RecordUsageRequest(events=part))
        assert (response.recorded, list(response.rejected)) == (len(part), [])


async def customer(shop: Rig, name: str, now_ms: int, **contract: object) -> None:
    """Whose contract and period began 40 days ago."""
    terms = {"period": pb.YEAR, "anchor": at(now_ms - 40 * DAY)} | contract
    await shop.customer(name, **terms)


async def grant(shop: Rig, name: str, amount: int, now_ms: int, *, expires_ms: int = 0) -> None:
    await shop.stub.CreateGrant(
        pb.Grant(
            id=f"{name}-{amount}",
            customer=name,
            amount_nanos=amount,
            effective_at=at(now_ms - 40 * DAY),
            expires_at=at(expires_ms) if expires_ms else None,
        )
    )


async def verified(shop: Rig) -> pb.VerifyReport:
    """Every account and projection is what it follows from, once the journal and the changes have come through."""

    async def settled() -> bool:
        pending = await shop.value("SELECT count(*) FROM hot_deltas")
        return not pending and not (await shop.stub.Verify(pb.VerifyRequest())).journal_lag

    await eventually(settled)
    report = await shop.stub.Verify(pb.VerifyRequest())
    assert (report.drifted, report.drift_nanos, report.unbalanced_transactions) == (0, 0, 0), report
    assert (report.quarantined, report.sequence_gaps, report.journal_lag) == (0, 0, 0), report
    return report


async def revenue(shop: Rig) -> object:
    return await shop.value("SELECT coalesce(sum(amount), 0)::bigint FROM entries WHERE account LIKE 'revenue:%'")


async def breakage(shop: Rig) -> int:
    found = await shop.value("SELECT coalesce(sum(amount), 0)::bigint FROM entries WHERE account = 'breakage'")
    assert isinstance(found, int)
    return found


def since(priced: pb.RateCard, effective_ms: int) -> pb.RateCard:
    priced.effective_at.CopyFrom(at(effective_ms))
    return priced


def order(now_ms: int, key: str = "drop-1", **fields: object) -> pb.RerateRequest:
    request = pb.RerateRequest(rate_card="llm", idempotency_key=key, **fields)  # type: ignore[arg-type]
    getattr(request, "from").CopyFrom(at(now_ms - 20 * DAY))
    return request


@asynccontextmanager
async def traffic(shop: Rig, name: str) -> AsyncIterator[list[int]]:
    """Decisions one after the other while the block runs; the quantities that were allowed."""
    allowed: list[int] = []
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            decision = await shop.consume(name, "output.tokens", 10)
            allowed.append(decision.charged[0].quantity)

    async with asyncio.TaskGroup() as group:
        group.create_task(run())
        try:
            yield allowed
        finally:
            stop.set()


async def market(shop: Rig, now_ms: int, count: int) -> list[gateway_pb2.CheckAndConsumeRequest]:
    """Prepaid bob, amy in arrears with more overage than credit, eve with a grant that expired two days ago."""
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 1_000 * USD, now_ms)
    await customer(shop, "amy", now_ms, billing=pb.Contract.ARREARS)
    await grant(shop, "amy", 1 * USD, now_ms)
    await customer(shop, "eve", now_ms)
    await grant(shop, "eve", 100 * USD, now_ms, expires_ms=now_ms - 2 * DAY)
    await grant(shop, "eve", 1_000 * USD, now_ms)
    step = 15 * DAY // count
    return [
        usage(("bob", "amy", "eve")[n % 3], f"e-{n}", 1_000 + n % 7, now_ms - 18 * DAY + n * step) for n in range(count)
    ]


async def test_a_backdated_price_drop(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    events = await market(shop, now_ms, 3_000)
    await record(shop, events)

    async def expired() -> bool:
        return await shop.value("SELECT count(*) FROM transactions WHERE kind = 'expire'") == 1

    await eventually(expired)
    before, broken = await verified(shop), await breakage(shop)
    drop_ms = now_ms - 10 * DAY
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD, "output.tokens": 15 * USD}), drop_ms))
    units = dict.fromkeys(("amy", "bob", "eve"), 0)
    touched = 0
    for event in events:
        if event.event_time.ToMilliseconds() >= drop_ms:
            units[event.customer] += event.usage[0].quantity
            touched += 1
    preview = await shop.stub.PreviewRerate(order(now_ms, key=""))
    assert preview.events == touched > 1_000
    assert {item.customer: item.after_nanos - item.before_nanos for item in preview.lines} == {
        name: (NEW - OLD) * quantity for name, quantity in units.items()
    }
    assert (await verified(shop)).total_nanos == before.total_nanos  # A preview books nothing.

    async with traffic(shop, "bob") as allowed:
        rerating = asyncio.ensure_future(shop.stub.Rerate(order(now_ms)))
        looked = 0
        while not rerating.done() or not looked:
            assert (await shop.stub.Verify(pb.VerifyRequest())).drift_nanos == 0  # Also while it is half done.
            looked += 1
        report = await rerating
        assert report == preview
    assert allowed
    after = await verified(shop)
    live = sum(allowed) * 15_000
    assert after.total_nanos == before.total_nanos + report.delta_nanos + live == await revenue(shop)
    assert await shop.value("SELECT quantity FROM meters WHERE customer = 'bob' AND meter = 'output.tokens'") == sum(
        allowed
    )
    balances = {row[0]: row[1] for row in await shop.rows("SELECT customer, overage FROM accounts")}
    spent = sum(
        event.usage[0].quantity * (OLD if event.event_time.ToMilliseconds() < drop_ms else NEW)
        for event in events
        if event.customer == "amy"
    )
    assert balances == {"amy": spent - USD, "bob": 0, "eve": 0}
    assert (await shop.account("amy")).overage == spent - USD
    # What an expired grant gets back is breakage at once.
    (left,) = await shop.rows("SELECT remaining, broken FROM grant_balances WHERE broken > 0")
    assert left["remaining"] == left["broken"] == await breakage(shop) > broken

    again = await shop.stub.Rerate(order(now_ms))
    assert again == report
    assert await shop.value("SELECT count(*) FROM corrections") == touched
    assert (await shop.stub.PreviewRerate(order(now_ms))).events == 0


async def test_what_is_booked_and_published(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", "k", 1_000_000, now_ms - DAY)])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    await shop.stub.Rerate(order(now_ms))
    booked = (await shop.stub.ListTransactions(pb.ListRequest(customer="bob"))).transactions
    _, consume, reverse, rebook = booked
    name = f"bob-{10 * USD}"
    assert [(entry.account, entry.amount_nanos) for entry in reverse.entries] == [
        (f"grant:{name}", 3 * USD),
        ("revenue:input.tokens", -3 * USD),
    ]
    assert [(entry.account, entry.amount_nanos) for entry in rebook.entries] == [
        (f"grant:{name}", -2 * USD),
        ("revenue:input.tokens", 2 * USD),
    ]
    assert (reverse.kind, reverse.reverses, reverse.idempotency_key) == ("reverse", consume.id, "rerate:drop-1:k")
    assert (rebook.kind, rebook.event_time) == ("rebook", consume.event_time)
    (row,) = await shop.rows("SELECT event_id, body FROM outbox WHERE event_id LIKE '%#%'")
    data = json.loads(row["body"])["data"]
    assert (row["event_id"], data["reverses"], data["idempotencyKey"]) == ("k#1", "k", "k")
    assert (data["lines"][0]["amountNanos"], data["transaction"]) == (str(2 * USD), rebook.id)
    # Corrected once more, it is the rebooking that is reversed.
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 5 * USD}), now_ms - 4 * DAY))
    report = await shop.stub.Rerate(order(now_ms, key="rise-2"))
    assert report.delta_nanos == 3 * USD
    *_, second, _ = (await shop.stub.ListTransactions(pb.ListRequest(customer="bob"))).transactions
    assert second.reverses == rebook.id
    assert [tuple(row) for row in await shop.rows("SELECT no, difference FROM corrections ORDER BY no")] == [
        (1, -USD),
        (2, 3 * USD),
    ]
    await verified(shop)
    told = await shop.stub.Explain(pb.ExplainRequest(idempotency_key="k"))
    assert [item.kind for item in told.transactions] == ["consume", "reverse", "rebook", "reverse", "rebook"]
    assert told.rate.startswith("input.tokens: 1000000 x 5 USD per 1000000 = 5 USD")
    assert told.decision.consumed[0].amount_nanos == 3 * USD, "as it was answered"


async def test_contracts_with_rates_of_their_own_are_rerated_with_the_card(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    own = pb.Rate(feature="output.tokens", per=1_000_000, tiers=[pb.Tier(price_nanos=USD)])
    await customer(shop, "bob", now_ms, overrides=[own])
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", "in", 1_000_000, now_ms - DAY)])
    await record(shop, [usage("bob", "out", 1_000_000, now_ms - DAY, "output.tokens")])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD, "output.tokens": USD}), now_ms - 5 * DAY))
    report = await shop.stub.Rerate(order(now_ms))
    assert [(line.feature, line.before_nanos, line.after_nanos) for line in report.lines] == [
        ("input.tokens", 3 * USD, 2 * USD),
        ("output.tokens", USD, USD),
    ]
    await verified(shop)


async def test_a_subjects_limit_gets_back_what_a_correction_gives_back(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 10 * USD, now_ms)
    subject = pb.Subject(id="key-1", limit_nanos=9 * USD, period=pb.YEAR)
    await shop.stub.PutCustomer(pb.Customer(id="bob", name="Bob", subjects=[subject]))
    event = usage("bob", "k", 2_000_000, now_ms - DAY)
    event.subject = "key-1"
    await record(shop, [event])
    assert (await shop.account("bob")).subjects["key-1"].used == 6 * USD
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    await shop.stub.Rerate(order(now_ms))
    await shop.account_when("bob", lambda account: account.subjects["key-1"].used == 4 * USD)
    await shop.hot.drop((TENANT, "bob"))
    assert (await shop.account("bob")).subjects["key-1"].used == 4 * USD, "and an install knows as much"
    await verified(shop)


async def test_a_price_rise_burns_what_is_left_and_then_runs_over(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 4 * USD, now_ms)
    await grant(shop, "bob", 5 * USD, now_ms)
    await record(shop, [usage("bob", "k", 1_000_000, now_ms - DAY)])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 10 * USD}), now_ms - 5 * DAY))
    assert (await shop.stub.Rerate(order(now_ms, customer="bob"))).delta_nanos == 7 * USD
    await verified(shop)
    account = await shop.account("bob")
    assert ([held.remaining for held in account.grants], account.overage, account.settled) == ([], USD, 10 * USD)


async def test_what_a_voided_grant_gets_back_is_breakage(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", "k", 1_000_000, now_ms - DAY)])
    await shop.stub.VoidGrant(pb.VoidGrantRequest(id=f"bob-{10 * USD}"))
    await verified(shop)
    assert await breakage(shop) == 7 * USD
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    await shop.stub.Rerate(order(now_ms))
    await verified(shop)
    assert (await breakage(shop), await shop.value("SELECT remaining FROM grant_balances")) == (8 * USD, 0)
    assert (await shop.account("bob")).grants == []


async def test_volume_rates_may_come_below_zero(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", f"k{n}", 60, now_ms - DAY + n) for n in range(3)])
    tiers = [pb.Tier(up_to=100, price_nanos=1_000), pb.Tier(price_nanos=100)]
    priced = pb.RateCard(id="llm", credit_type="USD")
    priced.rates.add(feature="input.tokens", model=pb.Rate.VOLUME, per=1, tiers=tiers)
    await shop.stub.PutRateCard(since(priced, now_ms - 5 * DAY))
    await shop.stub.Rerate(order(now_ms))
    assert (await verified(shop)).total_nanos == 180 * 100
    amounts = [row["amount"] for row in await shop.rows("SELECT amount FROM corrections ORDER BY idempotency_key")]
    assert amounts == [60_000, 12_000 - 60_000, 6_000]
    # Taken back to the old price: credit that stood in the overage goes first.
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 3 * USD}), now_ms - 4 * DAY))
    await shop.stub.Rerate(order(now_ms, key="back"))
    assert (await verified(shop)).total_nanos == 180 * OLD
    account = await shop.account("bob")
    assert (account.overage, account.grants[0].remaining) == (0, 10 * USD - 180 * OLD)


async def test_graduated_rates_by_the_order_of_the_journal(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", f"k{n}", 70, now_ms - DAY + n) for n in range(30)])
    tiers = [pb.Tier(up_to=1_000, price_nanos=900), pb.Tier(price_nanos=100, flat_nanos=50)]
    tiered = pb.RateCard(id="llm", credit_type="USD")
    tiered.rates.add(feature="input.tokens", model=pb.Rate.GRADUATED, per=7, tiers=tiers)
    await shop.stub.PutRateCard(since(tiered, now_ms - 5 * DAY))
    preview = await shop.stub.PreviewRerate(order(now_ms))
    assert await shop.stub.Rerate(order(now_ms)) == preview
    rate = Rate("", 0, 7, model=Model.GRADUATED, tiers=(Tier(1_000, 900), Tier(0, 100, 50)))
    assert (await verified(shop)).total_nanos == cost(rate, 2_100)
    assert (preview.lines[0].before_nanos, preview.lines[0].after_nanos) == (2_100 * OLD, cost(rate, 2_100))


async def test_another_rule_moves_units_to_its_own_meter(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", "k", 1_000, now_ms - DAY, model="big"), usage("bob", "l", 7, now_ms - DAY)])
    split = card("llm", {"input.tokens": 3 * USD})
    split.rates.add(feature="input.tokens", match={"model": "big"}, per=1, tiers=[pb.Tier(price_nanos=5_000)])
    await shop.stub.PutRateCard(since(split, now_ms - 5 * DAY))
    report = await shop.stub.Rerate(order(now_ms))
    assert report.delta_nanos == 1_000 * (5_000 - OLD)
    await verified(shop)
    rows = await shop.rows("SELECT meter, quantity, amount FROM meters WHERE customer = 'bob' ORDER BY meter")
    assert [tuple(row) for row in rows] == [
        ("input.tokens", 7, 7 * OLD),
        ("input.tokens,model=big", 1_000, 5_000_000),
    ]
    hot = await shop.account("bob")
    assert {meter: units for meter, units in hot.meters.items() if units} == {
        "input.tokens": 7,
        "input.tokens,model=big": 1_000,
    }


async def test_the_difference_of_a_period_that_has_ended_lands_on_its_meters(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await shop.customer("bob", period=pb.DAY, anchor=at(now_ms - 40 * DAY - HOUR))
    await grant(shop, "bob", 10 * USD, now_ms)
    await record(shop, [usage("bob", "old", 1_000, now_ms - 3 * DAY), usage("bob", "new", 500, now_ms - 1)])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    await shop.stub.Rerate(order(now_ms))
    await verified(shop)
    rows = await shop.rows("SELECT amount FROM meters WHERE customer = 'bob' ORDER BY period_start")
    assert [row["amount"] for row in rows] == [1_000 * NEW, 500 * NEW]
    account = await shop.account("bob")
    assert (account.settled, account.grants[0].remaining) == (500 * NEW, 10 * USD - 1_500 * NEW)


async def test_a_run_that_broke_off_is_carried_on(shop: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 100 * USD, now_ms)
    await record(shop, [usage("bob", f"k{n}", 1_000, now_ms - DAY + n) for n in range(50)])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    preview = await shop.stub.PreviewRerate(order(now_ms))
    monkeypatch.setattr(corrections, "CHUNK", 20)
    book = corrections._correct
    booked = 0

    async def fail_after_two(*arguments: object) -> None:
        nonlocal booked
        booked += 1
        if booked == 3:
            raise OSError("the machine is gone")
        await book(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(corrections, "_correct", fail_after_two)
        code, _ = await refusal(shop.stub.Rerate(order(now_ms)))
        assert code is grpc.StatusCode.UNAVAILABLE
    assert await shop.value("SELECT count(*) FROM corrections") == 40
    await verified(shop)  # Each chunk is whole.
    assert await shop.stub.Rerate(order(now_ms)) == preview
    assert (await verified(shop)).total_nanos == 50 * 1_000 * NEW


async def test_calls_at_the_same_time_correct_each_event_once(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 100 * USD, now_ms)
    await record(shop, [usage("bob", f"k{n}", 1_000, now_ms - DAY + n) for n in range(200)])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    keys = ("same", "same", "other")
    reports = await asyncio.gather(*(shop.stub.Rerate(order(now_ms, key=key)) for key in keys))
    assert reports[0] == reports[1] and {reports[0].events, reports[2].events} == {200, 0}
    assert await shop.value("SELECT count(*) FROM corrections") == 200
    assert (await verified(shop)).total_nanos == 200 * 1_000 * NEW


async def test_a_price_beyond_all_bounds_books_nothing(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    events = [usage("bob", f"k{n}", 10**6, now_ms - DAY + n) for n in range(20)]
    await record(shop, events)
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 10**12}, per=1), now_ms - 5 * DAY))
    for call in (shop.stub.PreviewRerate, shop.stub.Rerate):
        code, text = await refusal(call(order(now_ms)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "bound" in text
    assert await shop.value("SELECT count(*) FROM audit WHERE action = 'Rerate'") == 0
    assert (await verified(shop)).total_nanos == 20 * 10**6 * OLD
    # The key is not burned: with a sane price it does what it was meant for.
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 4 * DAY))
    assert (await shop.stub.Rerate(order(now_ms))).events == 20


async def test_a_key_stands_for_one_request(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    assert await shop.stub.Rerate(order(now_ms)) == pb.RerateReport()
    assert await shop.stub.Rerate(order(now_ms)) == pb.RerateReport()
    code, text = await refusal(shop.stub.Rerate(order(now_ms, customer="bob")))
    assert code is grpc.StatusCode.ALREADY_EXISTS and "IDEMPOTENCY_MISMATCH" in text
    assert [tuple(row) for row in await shop.rows("SELECT action, subject FROM audit WHERE action LIKE 'Rerate%'")] == [
        ("Rerate", "drop-1"),
        ("Rerated", "drop-1"),
    ]


async def test_bad_requests_are_refused(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    unbounded = pb.RerateRequest(rate_card="llm", idempotency_key="k")
    long = order(now_ms, to=at(now_ms + 400 * DAY))
    backwards = order(now_ms, to=at(now_ms - 20 * DAY))
    elsewhere = order(now_ms)
    elsewhere.rate_card = "nope"
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    for request, code, problem in (
        (unbounded, invalid, "from: is required"),
        (long, invalid, "to: is 420 days after from; expected at most 400"),
        (backwards, invalid, "to: is not later than from"),
        (order(now_ms, customer="a b"), invalid, "customer: 'a b' has a character"),
        (elsewhere, missing, "rate_card: there is no rate card 'nope'"),
        (order(now_ms, customer="nobody"), missing, "customer: there is no customer 'nobody'"),
    ):
        for call in (shop.stub.PreviewRerate, shop.stub.Rerate):
            found, text = await refusal(call(request))
            assert (found, text[: len(problem)]) == (code, problem)
    code, text = await refusal(shop.stub.Rerate(order(now_ms, key="")))
    assert (code, text[:25]) == (invalid, "idempotency_key: is empty")
    assert await shop.value("SELECT count(*) FROM audit WHERE action LIKE 'Rerate%'") == 0


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_many_events(shop: Rig) -> None:
    now_ms = await shop.hot.now_ms()
    await customer(shop, "bob", now_ms)
    await grant(shop, "bob", 1_000_000 * USD, now_ms)
    for first in range(0, EVENTS, CALL):
        count = min(CALL, EVENTS - first)
        await record(shop, [usage("bob", f"e-{first + n}", 1_000, now_ms - DAY + first + n) for n in range(count)])
    await shop.stub.PutRateCard(since(card("llm", {"input.tokens": 2 * USD}), now_ms - 5 * DAY))
    started = monotonic()
    preview = await shop.stub.PreviewRerate(order(now_ms))
    previewed = monotonic()
    assert await shop.stub.Rerate(order(now_ms)) == preview
    booked = monotonic()
    print(f"{EVENTS} events: preview {previewed - started:.1f} s, booking {booked - previewed:.1f} s")
    assert (preview.events, preview.delta_nanos) == (EVENTS, EVENTS * 1_000 * (NEW - OLD))
    async with asyncio.timeout(DEADLINE_S):
        assert (await verified(shop)).total_nanos == EVENTS * 1_000 * NEW
