"""A closed gate is announced: once a cycle, and again after credit came and was used up."""

from __future__ import annotations

import asyncio

from entitlement.v1 import gateway_pb2 as gw
from entitlement.v1 import ledger_pb2 as pb
from tests.stacks import ALLOW, DENY, Event, Site, consume_request, price_of, until

GONE = gw.REASON_INSUFFICIENT_CREDITS


async def denials(at: Site, customer: str) -> list[Event]:
    return await at.events(customer, of=["gate.denied"])


async def denied_often(at: Site, customer: str) -> None:
    answers = await asyncio.gather(*[at.consume(customer) for _ in range(50)])
    assert {(answer.verdict, answer.reason) for answer in answers} == {(DENY, GONE)}


async def test_many_denials_are_one_event_and_another_after_credit_came(at: Site) -> None:
    customer = await at.customer(price_of(1, 2))
    for _ in range(2):
        assert (await at.consume(customer)).verdict == ALLOW
    await denied_often(at, customer)
    (event,) = await until(lambda: denials(at, customer), bool, "the event")
    assert event["data"]["usedNanos"] == event["data"]["allowanceNanos"] == str(price_of(1, 2))
    assert (event["subject"], event["data"]["creditType"]) == (customer, "USD")
    before = await at.balance(customer)
    await denied_often(at, customer)
    assert (await at.balance(customer)).sequence == before.sequence, "a denial leaves nothing in the journal"

    await at.grant(customer, price_of(1, 1))
    await at.balance_when(customer, price_of(1, 1))
    assert (await at.consume(customer)).verdict == ALLOW
    await denied_often(at, customer)
    events = await until(lambda: denials(at, customer), lambda found: len(found) > 1, "the second event")
    assert len({found["id"] for found in events}) == len(events) == 2
    await at.verified(customer)


async def test_other_denials_and_mere_checks_are_not_announced(at: Site) -> None:
    limited = pb.Contract(billing=pb.Contract.PREPAID, quotas=[pb.QuotaLimit(feature="calls", limit=1)])
    quota, poor = await at.customer(10**12, contract=limited), await at.customer(1)
    assert (await at.consume(quota, ("calls", 2, ""))).reason == gw.REASON_USAGE_LIMIT_REACHED
    assert (await at.ask(consume_request(poor, ("calls", 5, ""), mode=gw.MODE_CHECK_ONLY))).reason == GONE
    told = await at.customer(1)
    await denied_often(at, told)
    await until(lambda: denials(at, told), bool, "the event of another")  # Told in the order they were noted, or later.
    await denied_often(at, told)
    assert await denials(at, quota) == await denials(at, poor) == []
