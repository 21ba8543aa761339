"""One request all the way: a balance debited, the journal, the ledger, the published event, and the proof."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement import keys
from entitlement.identity import key_digest
from entitlement.journal import Consumed, decode
from entitlement.rating import Model, Rate, Tier, amount, cost
from entitlement.v1 import events_pb2, gateway_pb2, ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from gateway.cli.stack import DevStack
from tests.stacks import (
    ALLOW,
    CALLS,
    CHANNEL,
    DEADLINE_S,
    DENY,
    INPUT,
    OUTPUT,
    PLAN,
    TENANT,
    Event,
    Site,
    amount_of,
    card,
    consume_request,
    environment,
    fresh,
    ids_of,
    prepared,
    price_of,
    put_catalogue,
    site,
    types_of,
)

CONCURRENT_ANSWER_S = 60.0  # a thousand calls at once, on a busy machine
GONE = gateway_pb2.REASON_INSUFFICIENT_CREDITS


# One request.


async def test_a_request_goes_all_the_way_to_the_ledger_and_out_as_an_event(at: Site) -> None:
    promotion = ledger_pb2.Grant(id=fresh("promo"), amount_nanos=1_000_001, category=ledger_pb2.Grant.PROMOTIONAL)
    customer = await at.customer(promotion, 10**9)
    lines = (("tokens", 1_234, "input"), ("tokens", 567, "output"))
    request = consume_request(customer, *lines)
    charged = [amount(INPUT, 0, 1_234), amount(OUTPUT, 0, 567)]
    total = sum(charged)

    answer = await at.ask(request)

    assert (answer.verdict, answer.replayed, answer.idempotency_key) == (ALLOW, False, request.idempotency_key)
    assert [line.amount_nanos for line in answer.consumed] == charged
    assert answer.balance.available_nanos == 1_000_001 + 10**9 - total
    balance = await at.balance(customer, at_least_sequence=answer.sequence)
    assert (balance.available_nanos, balance.settled_nanos) == (answer.balance.available_nanos, total)
    await at.verified(customer)

    await _is_in_the_journal(at, request, answer)
    paid = f"{customer}-g2"
    (event,) = await at.rows("SELECT * FROM usage_events WHERE customer = $1", customer)
    assert (event["idempotency_key"], event["amount"]) == (request.idempotency_key, total)
    granted = await at.transactions(customer, "grant")
    assert sorted(entry.amount_nanos for t in granted for entry in t.entries if entry.grant) == [1_000_001, 10**9]
    (booked,) = await at.transactions(customer, "consume")
    assert booked.idempotency_key == request.idempotency_key and booked.id == str(event["transaction_id"])
    assert {(entry.account, entry.amount_nanos) for entry in booked.entries} == {
        (f"grant:{promotion.id}", -1_000_001),
        (f"grant:{paid}", 1_000_001 - total),
        ("revenue:tokens", total),
    }
    explained = await at.admin.Explain(
        ledger_pb2.ExplainRequest(idempotency_key=request.idempotency_key), timeout=DEADLINE_S
    )
    assert explained.event == request and list(explained.decision.consumed) == list(answer.consumed)
    assert list(explained.transactions) == [booked]

    (published,) = await at.events(customer)
    _is_the_rated_event(published, request, answer, booked)


async def _is_in_the_journal(
    at: Site, request: gateway_pb2.CheckAndConsumeRequest, answer: gateway_pb2.CheckAndConsumeResponse
) -> None:
    records = [decode(record) for record in await at.journal(keys.partition_of(TENANT, request.customer))]
    (record,) = [one for one in records if isinstance(one, Consumed) and one.customer == request.customer]
    assert (record.epoch, record.sequence) == (answer.epoch, answer.sequence)
    assert gateway_pb2.CheckAndConsumeRequest.FromString(record.request) == request
    assert [line.amount for line in record.lines] == [line.amount_nanos for line in answer.consumed]


def _is_the_rated_event(
    published: Event,
    request: gateway_pb2.CheckAndConsumeRequest,
    answer: gateway_pb2.CheckAndConsumeResponse,
    booked: ledger_pb2.Transaction,
) -> None:
    envelope = {name: value for name, value in published.items() if name not in ("data", "time")}
    assert envelope == {
        "specversion": "1.0",
        "id": request.idempotency_key,
        "source": f"/entitlement/{TENANT}",
        "type": "entitlement.rated.v1",
        "subject": request.customer,
        "partitionkey": request.customer,
        "datacontenttype": "application/json",
    }
    data = ParseDict(published["data"], events_pb2.RatedEvent())
    assert data.event_time.ToJsonString() == published["time"]
    assert (data.customer, data.credit_type, data.transaction) == (request.customer, "USD", booked.id)
    assert (data.epoch, data.sequence) == (answer.epoch, answer.sequence)
    for line, asked, consumed in zip(data.lines, request.usage, answer.consumed, strict=True):
        assert (line.feature, dict(line.dimensions)) == (asked.feature, dict(asked.dimensions))
        assert (line.quantity, line.amount_nanos) == (consumed.quantity, consumed.amount_nanos)
        assert (line.rate_card, line.rate_card_version) == (PLAN, consumed.rate_card_version)
        assert sum(burn.amount_nanos for burn in line.burned) == line.amount_nanos
    burned = Counter[str]()
    for line in data.lines:
        for burn in line.burned:
            burned[burn.grant] += burn.amount_nanos
    assert burned == {entry.grant: -entry.amount_nanos for entry in booked.entries if entry.grant}


async def test_modes_reach_the_ledger_as_they_were_granted(at: Site) -> None:
    customer = await at.customer(price_of(10))
    looked = await at.ask(consume_request(customer, ("calls", 4, ""), mode=gateway_pb2.MODE_CHECK_ONLY))
    assert looked.verdict == ALLOW and looked.consumed[0].quantity == 4
    capped = await at.ask(consume_request(customer, ("calls", 25, ""), mode=gateway_pb2.MODE_BEST_EFFORT))
    assert capped.verdict == gateway_pb2.VERDICT_ALLOW_WITH_CAPS and capped.consumed[0].quantity == 10
    forced = await at.ask(consume_request(customer, ("calls", 2, ""), mode=gateway_pb2.MODE_ADJUST_ONLY))
    assert forced.verdict == ALLOW and forced.balance.available_nanos == -price_of(2)
    await at.verified(customer)
    assert await at.booked(customer) == {
        capped.idempotency_key: price_of(10),
        forced.idempotency_key: cost(CALLS, 12) - cost(CALLS, 10),
    }
    repaid = await at.grant(customer, price_of(5))
    await at.balance_when(customer, price_of(3))
    await at.verified(customer)
    (repay,) = await at.transactions(customer, "repay")
    assert {(entry.grant, entry.amount_nanos) for entry in repay.entries} == {
        (repaid.id, -price_of(2)),
        ("", price_of(2)),
    }


async def test_a_batch_is_as_many_requests_each_with_its_own_fate(at: Site) -> None:
    customer, poor = await at.customer(10**9), await at.customer()
    known = consume_request(customer)
    first = await at.ask(known)
    requests = [consume_request(customer), consume_request(poor), known, consume_request(customer, ("calls", 0, ""))]
    batch = await at.gateway.CheckAndConsumeBatch(
        gateway_pb2.CheckAndConsumeBatchRequest(requests=requests), timeout=DEADLINE_S
    )
    new, denied, repeated, bad = batch.responses
    assert (new.verdict, denied.verdict, bad.error.code) == (ALLOW, DENY, grpc.StatusCode.INVALID_ARGUMENT.value[0])
    assert repeated.replayed and repeated.consumed == first.consumed
    await at.verified(customer)
    assert set(await at.booked(customer)) == {known.idempotency_key, new.idempotency_key}
    assert await at.booked(poor) == {}


async def test_a_watcher_sees_the_balance_change(at: Site) -> None:
    customer = await at.customer(10**9)
    request = gateway_pb2.GetBalanceRequest(customer=customer)
    watch = at.gateway.WatchBalance(request, timeout=DEADLINE_S)
    seen = [(await anext(aiter(watch))).balance.available_nanos]
    answer = await at.consume(customer)
    async for message in watch:
        seen.append(message.balance.available_nanos)
        if message.balance.sequence >= answer.sequence:
            break
    watch.cancel()
    assert seen == [10**9, 10**9 - price_of(1)]


# Many at once.


async def test_64_callers_with_one_key_are_charged_once_and_get_one_answer(at: Site) -> None:
    customer = await at.customer(10**9)
    request = consume_request(customer, ("calls", 7, ""))
    async with AsyncExitStack() as exits:
        stubs = [
            EntitlementGatewayStub(await exits.enter_async_context(channel))
            for channel in [grpc.aio.insecure_channel(at.stack.gateway, CHANNEL) for _ in range(8)]
        ]
        calls = [stubs[index % 8].CheckAndConsume(request, timeout=DEADLINE_S) for index in range(64)]
        answers = await asyncio.gather(*calls)
    assert Counter(answer.replayed for answer in answers) == {False: 1, True: 63}
    for answer in answers:
        answer.replayed = False
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1
    assert answers[0].balance.available_nanos == 10**9 - price_of(1, 7)
    assert (await at.balance(customer)).available_nanos == 10**9 - price_of(1, 7)
    await at.verified(customer)
    assert await at.booked(customer) == {request.idempotency_key: price_of(1, 7)}
    assert ids_of(await at.events(customer)) == [request.idempotency_key]


async def test_of_1000_concurrent_calls_a_balance_for_400_allows_exactly_400(at: Site) -> None:
    customer = await at.customer(price_of(400))
    requests = [consume_request(customer) for _ in range(1_000)]
    calls = [at.gateway.CheckAndConsume(request, timeout=CONCURRENT_ANSWER_S) for request in requests]
    answers = await asyncio.gather(*calls)
    allowed = {answer.idempotency_key: amount_of(answer) for answer in answers if answer.verdict == ALLOW}
    denied = [answer for answer in answers if answer.verdict == DENY]
    assert (len(allowed), len(denied)) == (400, 600)
    assert {answer.reason for answer in denied} == {GONE} and sum(allowed.values()) == price_of(400)
    assert (await at.balance(customer)).available_nanos == 0
    assert sorted(answer.sequence for answer in answers if answer.verdict == ALLOW) == list(range(1, 401))
    await at.verified(customer)
    assert await at.booked(customer) == allowed
    events = await at.events(customer)
    assert Counter(types_of(events)) == {"rated": 400, "threshold.crossed": 3}
    assert {event["id"] for event in events if event["type"] == "entitlement.rated.v1"} == allowed.keys()


async def test_thresholds_that_many_calls_cross_together_are_published_once(at: Site) -> None:
    thresholds = [ledger_pb2.Threshold(percent=percent) for percent in (50, 80, 100)]
    customer = await at.customer(price_of(200), contract=ledger_pb2.Contract(thresholds=thresholds))
    answers = await asyncio.gather(*[at.consume(customer) for _ in range(150)])
    assert {answer.verdict for answer in answers} == {ALLOW}
    await at.verified(customer)
    assert await _crossings(at, customer) == [("crossed", 50, 1)]
    await asyncio.gather(*[at.consume(customer) for _ in range(100)])
    await at.verified(customer)
    assert await _crossings(at, customer) == [("crossed", 50, 1), ("crossed", 80, 2), ("crossed", 100, 3)]

    await at.grant(customer, price_of(300))  # 200 of 500 are used: below all of them
    await at.balance_when(customer, price_of(300))
    await asyncio.gather(*[at.consume(customer) for _ in range(60)])
    await at.verified(customer)
    after = await _crossings(at, customer)
    assert set(after[3:6]) == {("recovered", percent, 3) for percent in (50, 80, 100)}
    assert after[6:] == [("crossed", 50, 4)]


async def test_of_1000_parallel_calls_across_the_90_percent_line_one_crosses_it(at: Site) -> None:
    thresholds = [ledger_pb2.Threshold(percent=90)]
    customer = await at.customer(price_of(1_100), contract=ledger_pb2.Contract(thresholds=thresholds))
    await at.consume(customer, ("calls", 100, ""))
    request = gateway_pb2.CheckAndConsumeBatchRequest(requests=[consume_request(customer) for _ in range(500)])
    answers = await asyncio.gather(
        at.gateway.CheckAndConsumeBatch(request, timeout=CONCURRENT_ANSWER_S),
        *[at.gateway.CheckAndConsume(consume_request(customer), timeout=CONCURRENT_ANSWER_S) for _ in range(500)],
    )
    decided = [*answers[0].responses, *answers[1:]]
    assert len(decided) == 1_000 and {answer.verdict for answer in decided} == {ALLOW}
    await at.verified(customer)
    assert await _crossings(at, customer) == [("crossed", 90, 1)]


async def _crossings(at: Site, customer: str) -> list[tuple[str, int, int]]:
    """(what, percent, number) of the threshold events, as published; each belongs to a decision or a change."""
    events = await at.events(customer, of=["threshold.crossed", "threshold.recovered"])
    assert len({event["id"] for event in events}) == len(events)
    found = [ParseDict(event["data"], events_pb2.ThresholdEvent()) for event in events]
    booked = await at.booked(customer)
    assert all(one.caused_by in booked or one.caused_by.startswith(f"delta:{customer}:") for one in found)
    kinds = [kind.removeprefix("threshold.") for kind in types_of(events)]
    return [(kind, one.percent, one.crossing) for kind, one in zip(kinds, found, strict=True)]


# Denials.


async def test_what_was_denied_is_never_in_the_ledger(at: Site) -> None:
    quota = ledger_pb2.QuotaLimit(feature="calls", limit=3, period=ledger_pb2.DAY)
    few = ledger_pb2.Contract(quotas=[quota], entitled_features=["calls"])
    limited, poor = await at.customer(10**9, contract=few), await at.customer(price_of(1))
    gate = await at.customer(contract=ledger_pb2.Contract(billing=ledger_pb2.Contract.ARREARS))
    suspended = await at.customer(10**9)
    await at.admin.PutCustomer(
        ledger_pb2.Customer(id=suspended, status=ledger_pb2.Customer.SUSPENDED), timeout=DEADLINE_S
    )
    wanted = {
        "REASON_USAGE_LIMIT_REACHED": consume_request(limited, ("calls", 4, "")),
        "REASON_NO_ENTITLEMENT": consume_request(limited, ("tokens", 1, "input")),
        "REASON_PRICE_UNKNOWN": consume_request(poor, ("tokens", 1, "imagined")),
        "REASON_FEATURE_NOT_FOUND": consume_request(poor, ("dreams", 1, "")),
        "REASON_INSUFFICIENT_CREDITS": consume_request(poor, ("calls", 1, ""), ("calls", 1, "")),
        "REASON_ARREARS_GATE": consume_request(gate, ("calls", 1, "")),
        "REASON_CUSTOMER_SUSPENDED": consume_request(suspended, ("calls", 1, "")),
        "REASON_CUSTOMER_NOT_FOUND": consume_request(fresh("nobody"), ("calls", 1, "")),
    }
    answers = {name: await at.ask(request) for name, request in wanted.items()}
    assert {name: gateway_pb2.Reason.Name(answer.reason) for name, answer in answers.items()} == {
        name: name for name in wanted
    }
    assert not [answer for answer in answers.values() if answer.verdict != DENY or answer.consumed]
    for customer in (limited, poor, gate, suspended):
        await at.verified(customer)
        assert await at.booked(customer) == {} and await at.transactions(customer, "consume") == []
    assert await at.events(limited, poor, gate, suspended) == []
    denied = [request.idempotency_key for request in wanted.values()]
    assert await at.rows("SELECT 1 FROM usage_events WHERE idempotency_key = ANY($1::text[])", denied) == []


async def test_a_denied_key_is_decided_anew_after_a_top_up(at: Site) -> None:
    customer = await at.customer()
    request = consume_request(customer)
    assert (await at.ask(request)).verdict == DENY
    await at.grant(customer, price_of(2))
    await at.balance_when(customer, price_of(2))
    answer = await at.ask(request)
    assert (answer.verdict, answer.replayed) == (ALLOW, False)
    await at.verified(customer)
    assert await at.booked(customer) == {request.idempotency_key: price_of(1)}


# Changes from the ledger's side.


async def test_usage_that_did_not_pass_the_gateway_is_recorded_once_and_may_overdraw(at: Site) -> None:
    customer = await at.customer(price_of(10))
    await at.consume(customer, ("calls", 1, ""))
    time = Timestamp()
    time.GetCurrentTime()
    late = consume_request(customer, ("calls", 12, ""), event_time=Timestamp(seconds=time.seconds - 2 * 86_400))
    ancient = consume_request(customer, ("calls", 1, ""), event_time=Timestamp(seconds=time.seconds - 60 * 86_400))
    bad = consume_request(customer, ("dreams", 1, ""))
    usage = ledger_pb2.RecordUsageRequest(events=[late, bad, ancient, late])
    first = await at.admin.RecordUsage(usage, timeout=2 * DEADLINE_S)
    assert (first.recorded, first.duplicates) == (1, 1)
    assert [rejected.idempotency_key for rejected in first.rejected] == [bad.idempotency_key, ancient.idempotency_key]
    assert "FEATURE_NOT_FOUND" in first.rejected[0].error and "backfill_id" in first.rejected[1].error
    again = await at.admin.RecordUsage(usage, timeout=2 * DEADLINE_S)
    assert (again.recorded, again.duplicates) == (0, 2)
    assert late.idempotency_key in await at.booked(customer)  # It was in the ledger when the call returned.
    backfill = ledger_pb2.RecordUsageRequest(events=[ancient], backfill_id=fresh("backfill"))
    assert (await at.admin.RecordUsage(backfill, timeout=2 * DEADLINE_S)).recorded == 1
    assert ancient.idempotency_key not in await at.booked(customer)  # It is gathered, no more.
    whole = ledger_pb2.BackfillRequest(id=backfill.backfill_id)
    assert (await at.admin.CloseBackfill(whole, timeout=2 * DEADLINE_S)).recorded == 1

    booked = await at.booked(customer)
    assert set(booked) >= {late.idempotency_key, ancient.idempotency_key} and len(booked) == 3
    balance = await at.balance(customer)
    assert balance.available_nanos == price_of(10) - sum(booked.values()) < 0
    assert (await at.consume(customer)).verdict == DENY
    replayed = await at.ask(late)  # The gateway knows the key, too.
    assert replayed.replayed and amount_of(replayed) == booked[late.idempotency_key]
    await at.verified(customer)
    times = {str(event["id"]): event["time"] for event in await at.events(customer)}
    assert times[late.idempotency_key] == f"{late.event_time.ToJsonString()[:-1]}.000Z"


async def test_a_voided_grant_is_gone_from_the_balance_and_is_breakage_in_the_ledger(at: Site) -> None:
    customer = await at.customer(price_of(10), price_of(20))
    await at.consume(customer, ("calls", 4, ""))
    voided = await at.admin.VoidGrant(
        ledger_pb2.VoidGrantRequest(id=f"{customer}-g1", reason="test"), timeout=DEADLINE_S
    )
    assert voided.id == f"{customer}-g1"
    await at.balance_when(customer, price_of(20))
    answer = await at.consume(customer, ("calls", 5, ""))
    assert answer.balance.available_nanos == price_of(20) - (cost(CALLS, 9) - cost(CALLS, 4))
    await at.verified(customer)
    (void,) = await at.transactions(customer, "void")
    assert {(entry.account, entry.amount_nanos) for entry in void.entries} == {
        (f"grant:{customer}-g1", -price_of(6)),
        ("breakage", price_of(6)),
    }
    last = (await at.transactions(customer, "consume"))[-1]
    assert {entry.grant for entry in last.entries} == {f"{customer}-g2", ""}


async def test_a_price_change_is_live_within_a_second_and_without_a_restart(at: Site) -> None:
    plan, old, new = fresh("plan"), Rate("calls", 1_000), Rate("calls", 7_777)
    pid = at.stack.pid("gateway")
    first = (await at.admin.PutRateCard(card(plan, old), timeout=DEADLINE_S)).version
    customer = await at.customer(10**9, contract=ledger_pb2.Contract(rate_card=plan))
    answers = [await at.consume(customer)]
    second = (await at.admin.PutRateCard(card(plan, new), timeout=DEADLINE_S)).version
    changed, deadline = monotonic(), monotonic() + DEADLINE_S
    while answers[-1].consumed[0].rate_card_version != second:
        assert monotonic() < deadline, "the new price never came"
        answers.append(await at.consume(customer))
    took_s = monotonic() - changed
    print(f"the price was live {took_s * 1000:.0f} ms and {len(answers)} decisions after its change")
    assert took_s < 1
    answers += [await at.consume(customer) for _ in range(20)]
    versions = [answer.consumed[0].rate_card_version for answer in answers]
    assert versions == sorted(versions, key=int) and set(versions) == {first, second}
    for used, answer in enumerate(answers):
        rate = old if answer.consumed[0].rate_card_version == first else new
        assert amount_of(answer) == amount(rate, used, 1)
    assert at.stack.pid("gateway") == pid
    await at.verified(customer)
    assert await at.booked(customer) == {answer.idempotency_key: amount_of(answer) for answer in answers}


TIERS = (Tier(10, 1_000_003), Tier(25, 700_001, 5_000_000), Tier(0, 300_007))


@pytest.mark.parametrize(
    "rate",
    [
        Rate("calls", 7_000_001, 3, model=Model.PACKAGE),
        Rate("calls", 0, 7, model=Model.GRADUATED, tiers=TIERS),
        Rate("calls", 0, 7, model=Model.VOLUME, tiers=TIERS),
    ],
    ids=lambda rate: rate.model.name,
)
@pytest.mark.parametrize("billing", [ledger_pb2.Contract.PREPAID, ledger_pb2.Contract.ARREARS])
async def test_any_split_of_a_periods_usage_is_booked_at_the_cost_of_the_whole(
    at: Site, rate: Rate, billing: ledger_pb2.Contract.Billing.ValueType
) -> None:
    """Answered, debited and booked alike. Where a volume tier gives something back, it stands below zero as credit."""
    plan = fresh("plan")
    await at.admin.PutRateCard(card(plan, rate), timeout=DEADLINE_S)
    customer = await at.customer(10**9, contract=ledger_pb2.Contract(rate_card=plan, billing=billing))
    used, answers = 0, []
    for quantity in (1, 8, 1, 1, 13, 1, 1, 2, 30):
        answers.append(await at.consume(customer, ("calls", quantity, "")))
        assert (answers[-1].verdict, amount_of(answers[-1])) == (ALLOW, amount(rate, used, quantity))
        used += quantity
    total = cost(rate, used)
    assert sum(map(amount_of, answers)) == total
    balance = await at.balance(customer)
    assert (balance.settled_nanos, balance.available_nanos) == (total, 10**9 - total)
    await at.verified(customer)
    assert await at.booked(customer) == {answer.idempotency_key: amount_of(answer) for answer in answers}
    assert (min(map(amount_of, answers)) < 0) == (rate.model is Model.VOLUME)


# The second memory of idempotency.


async def _forget(at: Site, customer: str, key: str) -> None:
    """As if the hot store's window had passed."""
    name = keys.idempotency(keys.partition_of(TENANT, customer), key_digest(TENANT, customer, key))
    assert await at.hot.delete(name) == 1


async def test_a_retry_after_the_hot_window_is_charged_once_and_the_hot_balance_is_repaired(at: Site) -> None:
    customer = await at.customer(price_of(10))
    request = consume_request(customer, ("calls", 6, ""))
    first = await at.ask(request)
    await at.verified(customer)
    await _forget(at, customer, request.idempotency_key)
    again = await at.consume(customer, ("calls", 1, "")), await at.ask(request)
    assert (again[1].verdict, again[1].reason) == (DENY, GONE)  # The hot store has no memory of it, nor enough credit.
    await at.grant(customer, price_of(20))
    await at.balance_when(customer, price_of(23))
    third = await at.ask(request)
    assert (third.verdict, third.replayed) == (ALLOW, False)
    repaired = await at.balance_when(customer, price_of(23))
    assert repaired.settled_nanos == price_of(7) and repaired.sequence > third.sequence
    await at.verified(customer)
    assert await at.booked(customer) == {
        request.idempotency_key: amount_of(first),
        again[0].idempotency_key: amount_of(again[0]),
    }
    assert len(await at.transactions(customer, "consume")) == 2
    assert ids_of(await at.events(customer)).count(request.idempotency_key) == 1


async def test_a_key_that_another_customer_has_used_is_given_back_and_audited(at: Site) -> None:
    one, other = await at.customer(price_of(10)), await at.customer(price_of(10))
    request = consume_request(one, ("calls", 2, ""))
    assert (await at.ask(request)).verdict == ALLOW
    await at.verified(one)
    request.customer = other
    assert (await at.ask(request)).verdict == ALLOW  # Two accounts, two memories; the ledger's is one for the tenant.
    await at.balance_when(other, price_of(10))
    await at.verified(other, quarantined=1)
    assert await at.booked(one) == {request.idempotency_key: price_of(1, 2)} and await at.booked(other) == {}
    assert ids_of(await at.events(one, other)) == [request.idempotency_key]
    (record,) = await at.resolve_quarantine()
    assert record["reason"].startswith("key_mismatch: ")
    audited = await at.rows("SELECT detail FROM audit WHERE subject = $1 AND outcome = 'IDEMPOTENCY_MISMATCH'", other)
    assert len(audited) == 1 and request.idempotency_key in audited[0]["detail"]


async def test_the_same_key_with_another_payload_is_refused_and_charges_nothing(at: Site) -> None:
    customer = await at.customer(10**9)
    request = consume_request(customer, ("calls", 1, ""))
    await at.ask(request)
    request.usage[0].quantity = 2
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await at.ask(request)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await at.verified(customer)
    assert await at.booked(customer) == {request.idempotency_key: price_of(1)}


# Poison.


async def test_a_poisoned_journal_does_not_stall_the_rest(at: Site) -> None:
    customer = await at.customer(10**9)
    partition = keys.partition_of(TENANT, customer)
    neighbour = await at.customer(10**9, partition=partition)
    answers = [await at.consume(customer), await at.consume(neighbour)]
    await at.verified(neighbour)
    (good, *_) = [record for record in await at.journal(partition) if neighbour.encode() in record]
    stranger = good.replace(neighbour.encode(), fresh("cust").encode())
    stream = keys.journal(partition)
    poison: list[dict[str, bytes]] = [
        {"r": b"garbage"},
        {"r": b"\x63" + good[1:]},  # a codec of the future
        {"r": stranger},
        {"other": b"field"},
        {"r": good[: len(good) // 2]},
    ]
    began = monotonic()
    for index in range(10):
        for fields in poison if index == 5 else ():
            await at.hot.xadd(stream, dict(fields.items()))
        answers += [await at.consume(customer), await at.consume(neighbour)]
    await at.verified(customer)
    await at.verified(neighbour, quarantined=2)  # Half of its record, and one of the future: its name can be read.
    await at.verified(quarantined=len(poison))
    took_s = monotonic() - began
    print(f"22 good records and {len(poison)} bad ones were settled in {took_s * 1000:.0f} ms")
    booked = await at.booked(customer) | await at.booked(neighbour)
    assert booked == {answer.idempotency_key: amount_of(answer) for answer in answers}
    kept = await at.resolve_quarantine()
    assert {record["stream"] for record in kept} == {stream} and len(kept) == len(poison)
    assert {fields["r"] for fields in poison if "r" in fields} <= {record["record"] for record in kept}
    assert Counter(record["reason"].partition(":")[0] for record in kept)["undecodable"] >= 3
    (entry,) = await at.hot.xpending_range(stream, keys.GROUP, "-", "+", 1) or (None,)
    assert entry is None, "the poison is still pending"


async def test_events_leave_in_commit_order_when_transaction_ids_grow_by_a_digit(at: Site) -> None:
    customer = await at.customer()
    await at.verified()
    await asyncio.to_thread(at.stack.kill, "sync")
    (row,) = await at.rows("SELECT pg_snapshot_xmax(pg_current_snapshot())::text AS next")
    last = 10 ** len(row["next"]) - 1
    await at.rows(
        f"DO $$ BEGIN FOR i IN {row['next']}..{last - 1} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
    )
    ids = []
    for transaction in (last, last + 1):  # More together than one batch of the outbox holds.
        rows = await at.rows(
            """INSERT INTO outbox (event_id, tenant, customer, type, body)
               SELECT $1 || number, $2, $3, 'test', convert_to(json_build_object('id', $1 || number)::text, 'UTF8')
               FROM generate_series(1, 700) number RETURNING txid::text, event_id""",
            *(f"{customer}-{transaction}-", TENANT, customer),
        )
        assert {row["txid"] for row in rows} == {str(transaction)}
        ids += [row["event_id"] for row in rows]
    await asyncio.to_thread(at.stack.restart, "sync")
    await at.verified()
    found = ids_of(await at.events(customer, of=()))
    assert [name for name in found if ":put:" not in name] == ids


async def test_the_whole_stack_is_clean_in_the_end(at: Site) -> None:
    report = await at.verified()
    (sums,) = await at.rows(
        """SELECT (SELECT sum(amount) FROM entries) AS all_entries,
                  (SELECT sum(amount) FROM entries WHERE account LIKE 'revenue:%') AS revenue"""
    )
    assert sums["all_entries"] == 0 and sums["revenue"] == report.total_nanos
    print(f"customers {report.customers}, events {report.events}, drift {report.drift_nanos}")


# Another publisher.


@pytest.fixture(scope="module")
def events_file(folders: Callable[[], Path]) -> Path:
    return folders() / "events.jsonl"


@pytest.fixture(scope="module")
def to_file(transport: str, folders: Callable[[], Path], events_file: Path) -> Iterator[DevStack]:
    events_file.unlink(missing_ok=True)
    env = environment(transport, {"sync": {"ENTITLEMENT_SYNC_PUBLISHER": f"file://{events_file}"}})
    with DevStack(prepared(folders() / "data"), env=env) as running:
        put_catalogue(running)
        yield running


async def test_a_file_gets_every_event_once_and_in_each_customers_order(to_file: DevStack, events_file: Path) -> None:
    async with site(to_file) as at:
        customers = [await at.customer(10**9) for _ in range(3)]
        answers = [await at.consume(customers[index % 3]) for index in range(60)]
        await at.verified()
        await asyncio.to_thread(to_file.restart, "sync")
        answers += [await at.consume(customers[index % 3]) for index in range(60)]
        report = await at.verified()
        assert report.events == 120
        events = [event for event in map(json.loads, _lines(events_file)) if types_of([event]) == ["rated"]]
        assert Counter(ids_of(events)) == Counter(answer.idempotency_key for answer in answers)
        for customer in customers:
            mine = [ParseDict(e["data"], events_pb2.RatedEvent()) for e in events if e["subject"] == customer]
            assert [event.sequence for event in mine] == list(range(1, 41))
            booked = {event.idempotency_key: sum(line.amount_nanos for line in event.lines) for event in mine}
            assert booked == await at.booked(customer)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()
