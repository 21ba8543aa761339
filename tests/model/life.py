"""A random life of many customers on a virtual clock: everything that may happen to them, one thing after the other.

What is done goes the ways that callers go: decisions through the hot store's script, the rest through LedgerAdmin. What
was answered is remembered, so that the ledger can be held against it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count
from random import Random
from time import monotonic
from typing import TypeVar

import grpc
import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.decision import Consume, Decision, Limits, NotLoaded, OutOfTime, Stale, Verdict, parse_outcome
from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.install import ensure
from ledger_sync.pricing import NO_PLAN, PriceList
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig
from tests.virtual_clock import Clock

T = TypeVar("T")
START = days_from_civil(2026, 1, 10) * DAY
CARDS = ("llm", "alt")
UNITS = {"input.tokens": 2_000_000, "output.tokens": 150_000, "calls": 60, "storage": 700, "minutes": 400}
PERIODS = (pb.MONTH, pb.MONTH, pb.MONTH, pb.YEAR, pb.WEEK, pb.WEEK, pb.DAY)
LATE_DAYS = 35
FORGOTTEN = Limits(remember_ms=1)  # the hot store forgets the key at once: the ledger remembers it
REFUSALS = (  # what a call may be answered that does not fit what has happened before
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)

# Whatever is due by the clock, or on its way between the stores.
_OPEN = """
SELECT (SELECT min(customer) FROM hot_deltas) AS deltas, (SELECT min(customer) FROM ended_periods) AS ended,
       (SELECT min(customer) FROM accounts
        WHERE epoch > 0 AND period_end > 0 AND period_end <= ledger_now_ms()) AS turning"""


class Member(msgspec.Struct):
    """What the life remembers of a customer."""

    id: str
    plan: str = NO_PLAN
    grants: list[str] = []  # that may be voided
    subjects: list[str] = []
    contracts: int = 0
    status: int = pb.Customer.ACTIVE


class Life:
    """Customers, and what happens to them. `answers`: what each idempotency key was charged, by the first answer;
    `recorded`: keys that came by RecordUsage.
    """

    def __init__(self, rig: Rig, clock: Clock, seed: int, customers: int) -> None:
        self.rig = rig
        self.clock = clock
        self.random = Random(seed)
        self.members = [Member(f"c{number:03d}") for number in range(customers)]
        self.answers: dict[str, int] = {}
        self.recorded: set[str] = set()
        self.done: Counter[str] = Counter()  # by the name of what was done
        self.refused: Counter[str] = Counter()
        self.granted: Counter[str] = Counter()  # nanos that the life itself has granted, by customer
        self._sent: list[tuple[Member, gateway_pb2.CheckAndConsumeRequest]] = []
        self._keys = count(1)
        self._prices: PriceList | None = None
        self._backfills: list[str] = []

    async def begin(self) -> None:
        for feature in UNITS:
            await self.rig.stub.PutFeature(pb.Feature(key=feature, kind=pb.Feature.METERED, unit="unit"))
        for name in CARDS:
            await self._put_card(name, START - 500 * DAY)
        for member in self.members:
            await self.rig.stub.PutCustomer(pb.Customer(id=member.id, name=member.id))
            await self.contract(member)
            await self.grant(member)

    async def step(self) -> None:
        """Some days pass, and some things happen in them."""
        await self.clock.advance(self.random.randint(4 * DAY, 12 * DAY))
        await self.rest()
        for act in self._acts(len(self.members) // 8 + 1):
            await act
        await self.usage()
        if self.random.random() < 0.25:
            await self.clock.advance(self.random.randint(1, HOUR))
        for act in self._acts(len(self.members) // 10):
            await act
        await self.rest()

    def _acts(self, number: int) -> list[Awaitable[None]]:
        rare: list[Callable[[], Awaitable[None]]] = [self.price, self.backfill, self.take_back, self.replay]
        common: list[tuple[Callable[[Member], Awaitable[None]], int]] = [
            *((self.grant, 8), (self.recurring, 2), (self.void, 3), (self.contract, 4), (self.succession, 2)),
            *((self.suspend, 1), (self.limit, 2), (self.drop, 4), (self.record, 6), (self.void_invoice, 1)),
        ]
        chosen = self.random.choices([act for act, _ in common], [weight for _, weight in common], k=number)
        acts = [act(self.random.choice(self.members)) for act in chosen]
        acts += [act() for act in rare if self.random.random() < 0.2]
        self.random.shuffle(acts)
        return acts

    async def rest(self) -> None:
        """Returns when nothing is due any more, and the ledger and the hot store have all that they tell each other."""
        deadline = monotonic() + 3 * DEADLINE_S
        while True:
            done = await self.rig.control.sweeper.sweep()
            await self.settled()
            (row,) = await self.rig.rows(_OPEN)
            if done and not (row["deltas"] or row["ended"] or row["turning"]):
                return
            assert monotonic() < deadline, f"it does not come to rest: {done} {dict(row)}"
            self.rig.control.pusher.wake()
            await asyncio.sleep(0.002)

    async def settled(self) -> None:
        """Everything that the journal has is in the ledger."""
        hot = self.rig.hot
        ids = await hot.last_ids({hot.partition((TENANT, member.id)) for member in self.members})
        await asyncio.gather(*(self.rig.drain.settled(partition, last) for partition, last in ids.items()))

    # Usage

    async def usage(self) -> None:
        """Decisions for some customers, in one go, as the gateway makes them."""
        chosen = self.random.sample(self.members, len(self.members) // 3 + 1)
        asked = [(member, self._event(member)) for member in chosen for _ in range(self.random.randint(1, 4))]
        self._sent = [*self._sent, *asked][-200:]
        await self.decide(asked)

    async def replay(self) -> None:
        """Callers who ask again: the hot store may have forgotten the key, the ledger has not."""
        await self.decide(self.random.sample(self._sent, min(5, len(self._sent))), again=True)
        self.done["replay"] += 1

    async def decide(
        self, asked: list[tuple[Member, gateway_pb2.CheckAndConsumeRequest]], *, again: bool = False
    ) -> None:
        names = sorted({(TENANT, member.id) for member, _ in asked})
        open_ = [(member, parse_consume(TENANT, message), 0) for member, message in asked]
        limits = self.random.choice((Limits(), FORGOTTEN))
        for _ in range(8):
            async with asyncio.timeout(DEADLINE_S):
                await ensure(self.rig.hot, names)
            prices = await self.price_list()
            calls = [(request, prices.charge(request, member.plan, at_ms)) for member, request, at_ms in open_]
            replies = await self.rig.hot.consume(calls, limits)
            more: list[tuple[Member, Consume, int]] = []
            for (member, request, _), reply in zip(open_, replies, strict=True):
                outcome = parse_outcome(reply, request)
                if isinstance(outcome, Stale):
                    member.plan = outcome.plan
                    more.append((member, request, request.event_ms or outcome.now_ms))
                elif isinstance(outcome, NotLoaded):
                    more.append((member, request, 0))
                elif isinstance(outcome, Decision):
                    self._remember(request, outcome)
                else:
                    assert again and isinstance(outcome, OutOfTime), outcome
            if not more:
                return
            open_ = more
        raise AssertionError(f"no decision for {open_}")

    def _remember(self, request: Consume, decision: Decision) -> None:
        mode, verdict = request.mode.name, decision.verdict.name
        self.done[f"{mode} {verdict}"] += 1
        if request.mode is not request.mode.CHECK_ONLY and decision.verdict is not Verdict.DENY:
            self.answers.setdefault(request.key, sum(charged.amount for charged in decision.charged))

    def _event(
        self, member: Member, *, late: float = 0.25, oldest_days: int = LATE_DAYS
    ) -> gateway_pb2.CheckAndConsumeRequest:
        random = self.random
        message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=f"k-{next(self._keys)}", customer=member.id)
        for feature in random.sample(list(UNITS), random.choice((1, 1, 2, 3))):
            line = message.usage.add(feature=feature, quantity=random.randint(1, UNITS[feature]))
            if random.random() < 0.3:
                line.dimensions["model"] = random.choice(("big", "small"))
        message.mode = random.choice((0, 1, 1, 1, 2, 2, 3, 4))  # type: ignore[assignment]
        if member.subjects and random.random() < 0.5:
            message.subject = random.choice(member.subjects)
        if random.random() < late:
            message.event_time.FromMilliseconds(self.clock.now_ms - random.randint(0, oldest_days * DAY))
        return message

    async def record(self, member: Member) -> None:
        """Usage that did not pass the gateway, most of it late."""
        events = [self._event(member, late=0.8) for _ in range(self.random.randint(1, 4))]
        events = [event for event in events if event.mode != gateway_pb2.MODE_CHECK_ONLY]
        if events:
            response = await self.rig.stub.RecordUsage(pb.RecordUsageRequest(events=events))
            rejected = {item.idempotency_key for item in response.rejected}
            self.recorded |= {event.idempotency_key for event in events} - rejected
            self.done["record"] += response.recorded

    async def backfill(self) -> None:
        """Old usage of some customers, gathered and closed."""
        name = f"b-{next(self._keys)}"
        members = self.random.sample(self.members, 3)
        events = [self._event(member, late=1, oldest_days=300) for member in members for _ in range(3)]
        for event in events:
            event.mode = gateway_pb2.MODE_ADJUST_ONLY
        await self.rig.stub.RecordUsage(pb.RecordUsageRequest(events=events, backfill_id=name))
        closed = await self.rig.stub.CloseBackfill(pb.BackfillRequest(id=name))
        rejected = {item.idempotency_key for item in closed.rejected}
        self.recorded |= {event.idempotency_key for event in events} - rejected
        self._backfills.append(name)
        self.done["backfill"] += closed.recorded

    async def take_back(self) -> None:
        if self._backfills and self.random.random() < 0.5:
            name = self._backfills.pop(self.random.randrange(len(self._backfills)))
            reverted = await self.rig.stub.RevertBackfill(pb.BackfillRequest(id=name, reason="wrong"))
            assert reverted.amount_nanos == 0
            self.done["revert"] += reverted.recorded

    # Credit

    async def grant(self, member: Member) -> None:
        """Once, now or scheduled, for ever or not, for all features or some."""
        random, now_ms = self.random, self.clock.now_ms
        message = pb.Grant(id=f"g-{next(self._keys)}", customer=member.id, amount_nanos=random.randint(1, 30 * USD))
        message.category = random.choice((0, pb.Grant.PAID, pb.Grant.PROMOTIONAL, pb.Grant.TRIAL_CREDIT))  # type: ignore[assignment]
        message.priority = random.choice((0, 0, 5, -3))
        begins = now_ms + random.choice((0, 0, 0, -20, 5, 40)) * DAY
        if begins != now_ms:
            message.effective_at.CopyFrom(at(begins))
        if random.random() < 0.5:
            message.expires_at.CopyFrom(at(max(begins, now_ms) + random.randint(1, 60 * DAY)))
        if random.random() < 0.25:
            message.features.extend(random.sample(list(UNITS), 2))
        if await self._try("grant", self.rig.stub.CreateGrant(message)):
            member.grants.append(message.id)
            self.granted[member.id] += message.amount_nanos

    async def recurring(self, member: Member) -> None:
        random = self.random
        message = pb.Grant(id=f"r-{next(self._keys)}", customer=member.id, amount_nanos=random.randint(1, 10 * USD))
        message.recurrence = random.choice((pb.DAY, pb.WEEK, pb.WEEK, pb.MONTH, pb.MONTH, pb.YEAR))  # type: ignore[assignment]
        message.rollover_max_nanos = random.choice((0, 1, 2 * USD, 20 * USD))
        message.effective_at.CopyFrom(at(self.clock.now_ms - random.choice((0, 0, 13, 31, -9)) * DAY))
        if message.recurrence == pb.DAY or random.random() < 0.6:
            message.expires_at.CopyFrom(at(self.clock.now_ms + random.randint(10, 90) * DAY))
        if await self._try("recurring", self.rig.stub.CreateGrant(message)):
            member.grants.append(message.id)

    async def void(self, member: Member) -> None:
        """A grant, a recurring grant, or an allotment of one."""
        if self.random.random() < 0.3:
            listed = await self.rig.stub.ListGrants(pb.ListRequest(customer=member.id, page_size=1000))
            names = [grant.id for grant in listed.grants]
        else:
            names = member.grants
        if names:
            name = self.random.choice(names)
            await self._try("void", self.rig.stub.VoidGrant(pb.VoidGrantRequest(id=name, reason="left")))

    # Contracts

    async def contract(self, member: Member) -> None:
        """Other terms for the contract in force, or a new one when there is none. Never two in one millisecond: the
        credit of further seats is named by it.
        """
        await self.clock.advance(1)
        known = (await self.rig.stub.ListContracts(pb.ListRequest(customer=member.id))).contracts
        current = [item for item in known if not item.HasField("ends_at") or ms(item.ends_at) > self.clock.now_ms]
        if not current:
            member.contracts += 1
            terms = self._terms(member, f"{member.id}-{member.contracts}")
        else:
            terms = self._terms(member, current[0].id)
            terms.effective_at.CopyFrom(current[0].effective_at)
            if current[0].HasField("ends_at"):
                terms.ends_at.CopyFrom(current[0].ends_at)
            if self.random.random() < 0.6:  # Most changes leave the rule of periods as it is.
                terms.period = current[0].period
                terms.anchor.CopyFrom(current[0].anchor)
        await self._try("contract", self.rig.stub.PutContract(terms))

    async def succession(self, member: Member) -> None:
        """The contract in force ends, and another one follows; at times only later."""
        known = (await self.rig.stub.ListContracts(pb.ListRequest(customer=member.id))).contracts
        current = [item for item in known if not item.HasField("ends_at")]
        if len(current) != 1 or ms(current[0].effective_at) > self.clock.now_ms:
            return
        ends = self.clock.now_ms + self.random.randint(1, 40 * DAY)
        current[0].ends_at.CopyFrom(at(ends))
        if not await self._try("end", self.rig.stub.PutContract(current[0])):
            return
        member.contracts += 1
        terms = self._terms(member, f"{member.id}-{member.contracts}")
        terms.effective_at.CopyFrom(at(ends + self.random.choice((0, 0, 0, 7 * DAY))))
        await self._try("successor", self.rig.stub.PutContract(terms))

    def _terms(self, member: Member, name: str) -> pb.Contract:
        random, now_ms = self.random, self.clock.now_ms
        terms = pb.Contract(id=name, customer=member.id, rate_card=random.choice(CARDS))
        terms.billing = random.choice((pb.Contract.PREPAID, pb.Contract.ARREARS, pb.Contract.TRIAL))  # type: ignore[assignment]
        if terms.billing == pb.Contract.ARREARS:
            terms.allowance_nanos = random.choice((0, 5 * USD, 100 * USD))
        terms.period = random.choice(PERIODS)  # type: ignore[assignment]
        if random.random() < 0.5:
            terms.anchor.CopyFrom(at(now_ms - random.randint(0, 60 * DAY)))
        if random.random() < 0.4:
            terms.seats, terms.allowance_per_seat_nanos = random.randint(1, 9), random.randint(1, USD)
        if random.random() < 0.3:
            terms.minimum_commit_nanos = random.randint(1, 10 * USD)
        if random.random() < 0.3:
            terms.overrides.extend(self._rates(self.random.sample(list(UNITS), 2)))
        if random.random() < 0.3:
            feature = random.choice(list(UNITS))
            terms.quotas.add(
                feature=feature, limit=5 * UNITS[feature], period=random.choice(PERIODS), soft=random.random() < 0.5
            )
        if random.random() < 0.1:
            terms.entitled_features.extend(sorted(random.sample(list(UNITS), 3)))
        if random.random() < 0.3:
            terms.top_up.below_nanos = random.randint(1, 5 * USD)
            terms.top_up.amount_nanos = random.randint(USD, 8 * USD)
            terms.top_up.monthly_cap_nanos = 20 * USD
        return terms

    async def suspend(self, member: Member) -> None:
        active = member.status == pb.Customer.ACTIVE
        member.status = pb.Customer.SUSPENDED if active else pb.Customer.ACTIVE
        await self._put_customer("suspend", member)

    async def limit(self, member: Member) -> None:
        member.subjects = self.random.sample(["s1", "s2", "s3"], self.random.randint(0, 3))
        member.status = pb.Customer.ACTIVE
        await self._put_customer("limit", member)

    async def _put_customer(self, name: str, member: Member) -> None:
        message = pb.Customer(id=member.id, name=member.id, status=member.status)  # type: ignore[arg-type]
        for subject in member.subjects:
            limit = self.random.choice((0, USD, 7 * USD))
            message.subjects.add(id=subject, limit_nanos=limit, period=self.random.choice(PERIODS) if limit else 0)
        await self._try(name, self.rig.stub.PutCustomer(message))

    # Everything else

    async def drop(self, member: Member) -> None:
        """The hot store loses the account; the next call installs it anew."""
        await self.rig.hot.drop((TENANT, member.id))
        self.done["drop"] += 1

    async def void_invoice(self, member: Member) -> None:
        listed = (await self.rig.stub.ListInvoices(pb.ListRequest(customer=member.id, page_size=1000))).invoices
        final = [invoice.id for invoice in listed if invoice.status == pb.Invoice.FINAL]
        if final:
            request = pb.VoidInvoiceRequest(id=self.random.choice(final[-6:]), reason="wrong address")
            await self._try("void_invoice", self.rig.stub.VoidInvoice(request))

    async def price(self) -> None:
        """Another price, from now, later on or some time ago: then what was charged since is re-rated, most times."""
        random, now_ms = self.random, self.clock.now_ms
        name, days = random.choice(CARDS), random.choice((0, 10, -3, -20, -33))
        await self._put_card(name, now_ms + days * DAY)
        self.done["price"] += 1
        if days < 0 and random.random() < 0.8:
            derived = [member.plan for member in self.members if member.plan.startswith("=")]
            plan = random.choice([name, name, *derived[:1]])
            request = pb.RerateRequest(rate_card=plan, idempotency_key=f"rr-{next(self._keys)}")
            request.adjust_final = random.random() < 0.8
            getattr(request, "from").CopyFrom(at(now_ms + days * DAY - random.choice((0, DAY))))
            if random.random() < 0.3:
                request.customer = random.choice(self.members).id
            report = await self._try("rerate", self.rig.stub.Rerate(request))
            self.done["rerated"] += report.events if report else 0

    async def _put_card(self, name: str, effective_ms: int) -> None:
        message = pb.RateCard(id=name, credit_type="USD", rates=self._rates(list(UNITS)))
        message.effective_at.CopyFrom(at(effective_ms))
        await self.rig.stub.PutRateCard(message)

    def _rates(self, features: list[str]) -> list[pb.Rate]:
        """Prices that hardly ever come out even."""
        price = self.random.randint
        rates = {
            "input.tokens": pb.Rate(per=1_000_000, tiers=[pb.Tier(price_nanos=price(0, 3 * USD))]),
            "output.tokens": pb.Rate(per=7, tiers=[pb.Tier(price_nanos=price(1, 100_000))]),
            "calls": pb.Rate(model=pb.Rate.PACKAGE, per=10, tiers=[pb.Tier(price_nanos=price(1, USD // 10))]),
            "storage": pb.Rate(
                model=pb.Rate.GRADUATED,
                per=3,
                tiers=[
                    pb.Tier(up_to=price(1, 500), price_nanos=price(1, 9_000_000), flat_nanos=price(0, USD // 4)),
                    pb.Tier(up_to=price(501, 3_000), price_nanos=price(0, 5_000_000), flat_nanos=price(0, USD // 4)),
                    pb.Tier(price_nanos=price(0, 2_000_000)),
                ],
            ),
            "minutes": pb.Rate(
                model=pb.Rate.VOLUME,
                per=9,
                tiers=[
                    pb.Tier(up_to=price(1, 600), price_nanos=price(USD // 100, USD // 20), flat_nanos=price(0, USD)),
                    pb.Tier(price_nanos=price(0, USD // 100), flat_nanos=price(0, USD)),
                ],
            ),
        }
        chosen = []
        for feature in features:
            rates[feature].feature = feature
            chosen.append(rates[feature])
            if self.random.random() < 0.3:  # Another price for one value of a dimension, which has its own meter.
                split = pb.Rate()
                split.CopyFrom(rates[feature])
                split.match["model"] = "big"
                split.tiers[-1].price_nanos += price(0, 1_000)
                chosen.append(split)
        return chosen

    async def price_list(self) -> PriceList:
        if self._prices is None or self._prices.generation != await self.rig.control.catalogs.generation():
            self._prices = PriceList((await self.rig.control.catalogs.snapshot()).tenants[0])
        return self._prices

    async def _try(self, name: str, call: Awaitable[T]) -> T | None:
        """What does not fit is refused, and counted; anything else but success is a fault."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            assert error.code() in REFUSALS, f"{name}: {error.code()} {error.details()}"
            self.refused[f"{name}: {error.details()}"[:60]] += 1
            return None
        self.done[name] += 1
        return answer


def at(now_ms: int) -> Timestamp:
    time = Timestamp()
    time.FromMilliseconds(now_ms)
    return time


def ms(time: Timestamp) -> int:
    return int(time.ToMilliseconds())
