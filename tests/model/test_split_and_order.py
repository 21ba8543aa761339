"""However usage is split, in whatever order and however late it comes: the ledger's total is the cost of the total.

SPLIT_EXAMPLES sets how many examples there are. All are lived on one control plane, each by a customer of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from entitlement.decision import Decision, Limits, Stale, parse_outcome
from entitlement.periods import DAY, days_from_civil
from entitlement.rating import Model, Rate, Tier, cost
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.install import ensure
from ledger_sync.pricing import PriceList
from tests.control_rig import DEADLINE_S, TENANT, Rig
from tests.model.conserved import verified
from tests.model.life import Life, at
from tests.virtual_clock import clocked_rig

T = TypeVar("T")
EXAMPLES = int(os.environ.get("SPLIT_EXAMPLES", "200"))
BATCH = 200  # customers, or events, in one go
JANUARY, FEBRUARY = (days_from_civil(2026, month, 1) * DAY for month in (1, 2))
PERIOD = FEBRUARY - JANUARY
LATE = 4 * DAY  # after the period's end: all of it is within reach of late events
RICH = 2**62


class Event(msgspec.Struct, frozen=True):
    """Units that are used at `at_ms` and told at `told_ms`, of the period's begin."""

    quantity: int
    at_ms: int
    told_ms: int
    recorded: bool  # by RecordUsage


class Example(msgspec.Struct, frozen=True):
    rate: Rate
    events: tuple[Event, ...]
    credit: int  # the rest is overage

    @property
    def units(self) -> int:
        return sum(event.quantity for event in self.events)


prices = st.integers(0, 10**9)
flats = st.sampled_from([0, 0, 1, 10**9 + 1])
pers = st.sampled_from([1, 2, 3, 7, 1_000, 999_983, 1_000_000])


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    model = draw(st.sampled_from(list(Model)))
    if model in (Model.PER_UNIT, Model.PACKAGE):
        return Rate("u", draw(prices), draw(pers), model=model)
    bounds = sorted(draw(st.sets(st.integers(1, 5_000), max_size=4)))
    tiers = tuple(Tier(bound, draw(prices), draw(flats)) for bound in (*bounds, 0))
    return Rate("u", 0, draw(pers), model=model, tiers=tiers)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A total, cut into events; each happens at any time of the period, and is told then or later, in any order."""
    total = draw(st.integers(1, 20_000))
    cuts = sorted(draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=7)) - {total})
    parts = [high - low for low, high in zip([0, *cuts], [*cuts, total], strict=True)]
    events = []
    for quantity in draw(st.permutations(parts)):
        at_ms = draw(st.integers(0, PERIOD - 1))
        told_ms = draw(st.one_of(st.just(at_ms), st.integers(at_ms, PERIOD + LATE - 1)))
        events.append(Event(quantity, at_ms, told_ms, draw(st.booleans())))
    return Example(draw(rates()), tuple(events), draw(st.sampled_from([0, 1_000_000_000, RICH])))


def drawn(number: int, seed: int) -> list[Example]:
    """Examples as hypothesis makes them. They are lived together, so that none of them can be looked at on its own."""
    found: list[Example] = []

    @seeded(seed)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples())
    def collect(example: Example) -> None:
        found.append(example)

    collect()
    return found[:number]


def batches(items: list[T]) -> Iterator[list[T]]:
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_any_split_in_any_order_costs_what_the_total_costs(
    monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str, postgres_server: object, seed: int
) -> None:
    found = await asyncio.to_thread(drawn, EXAMPLES, seed)
    assert len(found) >= EXAMPLES * 9 // 10
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, JANUARY) as (rig, clock):
        await rig.stub.PutFeature(pb.Feature(key="u", kind=pb.Feature.METERED, unit="unit"))
        named = {f"c{number:04d}": example for number, example in enumerate(found)}
        for group in batches(list(named.items())):
            await asyncio.gather(*(begin(rig, name, example) for name, example in group))
        life = Life(rig, clock, seed, 0)
        told = sorted((event.told_ms, name, n) for name, one in named.items() for n, event in enumerate(one.events))
        steps = sorted({told_ms // DAY for told_ms, _, _ in told})
        for day in steps:
            await clock.set(JANUARY + (day + 1) * DAY - 1)
            due = [(named[name].events[n], name, n) for told_ms, name, n in told if told_ms // DAY == day]
            await tell(rig, life, due)
        await clock.set(FEBRUARY + 30 * DAY)
        await settle(rig, life, named)
        await verified(rig)
        await compare(rig, named)


async def begin(rig: Rig, name: str, example: Example) -> None:
    """A card, a contract in arrears with room for all of it, and credit for a part or the whole."""
    rate = example.rate
    tiers = rate.tiers or (Tier(0, rate.price_nanos),)
    card = pb.RateCard(id=name, credit_type="USD", effective_at=at(JANUARY - 100 * DAY))
    card.rates.add(
        feature="u",
        model=int(rate.model),  # type: ignore[arg-type]
        per=rate.per,
        tiers=[pb.Tier(up_to=t.up_to, price_nanos=t.price_nanos, flat_nanos=t.flat_nanos) for t in tiers],
    )
    await rig.stub.PutRateCard(card)
    terms = {"rate_card": name, "billing": pb.Contract.ARREARS, "allowance_nanos": RICH - 1}
    await rig.customer(name, *([example.credit] if example.credit else []), **terms)


async def tell(rig: Rig, life: Life, due: list[tuple[Event, str, int]]) -> None:
    """One after the other through the hot store, then the others by RecordUsage."""
    recorded: list[gateway_pb2.CheckAndConsumeRequest] = []
    for event, name, number in due:
        message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=f"{name}-{number}", customer=name)
        message.usage.add(feature="u", quantity=event.quantity)
        message.event_time.FromMilliseconds(JANUARY + event.at_ms)
        if event.recorded:
            recorded.append(message)
            continue
        await consume(rig, life, message, name)
    for events in batches(recorded):
        response = await rig.stub.RecordUsage(pb.RecordUsageRequest(events=events))
        assert (response.recorded, list(response.rejected)) == (len(events), [])


async def consume(rig: Rig, life: Life, message: gateway_pb2.CheckAndConsumeRequest, name: str) -> None:
    request = parse_consume(TENANT, message)
    async with asyncio.timeout(DEADLINE_S):
        await ensure(rig.hot, [(TENANT, name)])
    outcome = Stale("", 0)
    for _ in range(3):
        prices: PriceList = await life.price_list()
        (reply,) = await rig.hot.consume([(request, prices.charge(request, name, request.event_ms))], Limits())
        outcome = parse_outcome(reply, request)
        if isinstance(outcome, Decision):
            assert outcome.verdict.name == "ALLOW", (name, outcome)
            return
    raise AssertionError(outcome)


async def settle(rig: Rig, life: Life, named: dict[str, Example]) -> None:
    names = [(TENANT, name) for name in named]
    for group in batches(names):
        async with asyncio.timeout(DEADLINE_S):
            await ensure(rig.hot, group)
    await life.rest()
    for partition, last in (await rig.hot.last_ids({rig.hot.partition(name) for name in names})).items():
        await rig.drain.settled(partition, last)
    await life.rest()


async def compare(rig: Rig, named: dict[str, Example]) -> None:
    """The total of each customer, and what is left in both stores."""
    total, units, left, owed = [
        {row["customer"]: row["found"] for row in await rig.rows(query)}
        for query in (
            "SELECT customer, sum(amount)::bigint AS found FROM usage_events GROUP BY 1",
            "SELECT customer, sum(quantity)::bigint AS found FROM meters WHERE period_start = 1767225600000 GROUP BY 1",
            """SELECT customer, sum(b.remaining)::bigint AS found
               FROM grants g JOIN grant_balances b ON b.grant_no = g.no GROUP BY 1""",
            """SELECT t.customer, -sum(e.amount)::bigint AS found FROM entries e
               JOIN transactions t ON t.id = e.transaction_id
               WHERE e.account LIKE 'overage:%' OR e.account LIKE 'receivable:%' GROUP BY 1""",
        )
    ]
    accounts = await rig.hot.snapshots([(TENANT, name) for name in named])
    for (name, example), account in zip(named.items(), accounts, strict=True):
        assert account is not None
        wanted = cost(example.rate, example.units)
        assert total[name] == wanted, (name, example)
        assert units[name] == example.units, (name, example)
        assert sum(grant.remaining for grant in account.grants) == left.get(name, 0), (name, example)
        assert example.credit - left.get(name, 0) + owed.get(name, 0) == wanted, (name, example)
