"""The memory store and Redis: the same random calls get the same answers and write the same records, times aside."""

from __future__ import annotations

import asyncio
import random

import msgspec

from entitlement import journal
from entitlement.account import Account, Billing, HotGrant, Quota, Status, SubjectLimit
from entitlement.decision import Consume, Decision, Mode, Outcome, OutOfTime, Price, Stale
from entitlement.journal import Consumed, Record
from entitlement.periods import DAY, HOUR, Recurrence, period
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, MAX_QUANTITY
from tests.hot_stores import PLAN, TENANT, MemoryBench, RedisBench, account, charge, redis_bench, request

ACCOUNTS, CALLS = 150, 30
SUBJECTS = ["key-1", "key-2", "user~3"]
FEATURES = ["alpha", "beta", "gamma", "gamma.x", "delta"]
MINUTES_17 = 17 * 60_000  # Between the hours on which grants and periods begin and end.


class Draw:
    """One random account and the calls on it. All times are hours before or after `now`, never near it."""

    def __init__(self, rng: random.Random, now: int) -> None:
        self.rng, self.now = rng, now
        self.scale = rng.choice([10, 1_000, 10**6, 10**12, 10**18, MAX_NANOS])

    def amount(self) -> int:
        return self.rng.randrange(self.rng.choice([1, 10, self.scale, self.scale]) + 1)

    def features(self) -> tuple[str, ...]:
        return tuple(self.rng.sample(FEATURES, self.rng.choice([0, 0, 1, 2])))

    def grant(self, no: int) -> HotGrant:
        rng = self.rng
        effective = rng.choice(
            [0, 0, 0, self.now - rng.randrange(1, 800) * HOUR, self.now + rng.randrange(1, 90) * HOUR]
        )
        expires = rng.choice([0, 0, 0, self.now - rng.randrange(1, 800) * HOUR, self.now + rng.randrange(1, 90) * HOUR])
        return HotGrant(no, self.amount() + 1, effective, expires, self.features())

    def quota(self, feature: str) -> Quota:
        rng = self.rng
        recurrence, anchor = rng.choice(list(Recurrence)), self.anchor()
        start, end = period(recurrence, anchor, self.now - rng.choice([0, 0, 50 * DAY]))
        limit = rng.choice([0, 5, 50, 10**6, MAX_CUMULATIVE])
        return Quota(feature, limit, rng.random() < 0.3, recurrence, anchor, rng.randrange(limit + 1), start, end)

    def limit(self, subject: str) -> SubjectLimit:
        rng = self.rng
        recurrence, anchor = rng.choice(list(Recurrence)), self.anchor()
        start, end = period(recurrence, anchor, self.now - rng.choice([0, 0, 50 * DAY]))
        most = self.amount() + 1
        return SubjectLimit(subject, most, recurrence, anchor, rng.randrange(-5, most + 1), start, end)

    def anchor(self) -> int:
        """Such that every period begins half an hour from now, or some hours from it."""
        return self.now - HOUR // 2 - self.rng.randrange(0, 2_000) * HOUR

    def account(self) -> Account:
        rng = self.rng
        recurrence, anchor = rng.choice(list(Recurrence)), self.anchor()
        made = account(
            *[self.grant(no) for no in range(1, rng.randint(1, 6))],
            billing=rng.choice(list(Billing)),
            status=rng.choice([Status.ACTIVE] * 12 + list(Status)),
            gate_percent=rng.choice([0, 50, 100, 100, 150, 150, 1000]),
            credit_line=rng.choice([0, 0, self.amount()]),
            thresholds=tuple(sorted(rng.sample([1, 10, 50, 80, 90, 100, 150, 333], rng.randint(0, 5)))),
            entitled=rng.choice([(), (), self.features()]),
            quotas=[self.quota(feature) for feature in rng.sample(FEATURES, rng.choice([0, 1, 2]))],
            subjects=[self.limit(subject) for subject in rng.sample(SUBJECTS, rng.choice([0, 1, 2]))],
            allowance=self.amount(),
            recurrence=recurrence,
            anchor_ms=anchor,
            period=period(recurrence, anchor, self.now - rng.choice([0, 0, 3 * DAY, 50 * DAY, 800 * DAY])),
            overage=rng.choice([0, 0, self.amount()]),
            held=rng.choice([0, 0, self.amount()]),
            sequence=rng.randrange(2**40),
        )
        made.epoch = rng.randrange(1, 2**31)
        if rng.random() < 0.3:
            until = self.now - rng.randrange(1, 600) * HOUR
            made.config = msgspec.structs.replace(
                made.config, earlier=((until - 100 * HOUR, "oldest"), (until, "other"))
            )
        made.meters = {
            feature: rng.choice([rng.randrange(100), 10**12, MAX_CUMULATIVE - 40]) for feature in FEATURES[:2]
        }
        return made

    def prices(self) -> dict[str, Price]:
        rng = self.rng
        kinds = ["U {} {}"] * 12 + ["P {} {}"] * 2 + TIERED * 4 + ["-", "!"]
        return {
            feature: Price(
                feature if rng.random() < 0.8 else f"{feature},model=m1",
                rng.choice(kinds).format(
                    rng.choice([0, 1, 3, 999, 10**6, 10**12]), rng.choice([1, 1, 2, 7, 1_000, 10**9])
                ),
                rng.random() < 0.1,
            )
            for feature in FEATURES
        }

    def plan(self) -> str:
        return self.rng.choices([PLAN, "other", "oldest"], [90, 8, 2])[0]

    def event_ms(self) -> int:
        rng = self.rng
        if rng.random() < 0.7:
            return 0
        hours = rng.choice([rng.randrange(1, 48), rng.randrange(1, 24 * 36)])
        return rng.choice(
            [self.now - hours * HOUR - MINUTES_17, self.now - 34 * DAY, self.now + 120_000, self.now + HOUR]
        )

    def quantity(self) -> int:
        return self.rng.choice([0, 1, 1, 7, self.rng.randrange(100), self.rng.randrange(10**6), MAX_QUANTITY])

    def call(self, number: int) -> Consume:
        rng = self.rng
        usage = [(rng.choice(FEATURES), self.quantity()) for _ in range(rng.choice([1, 1, 1, 2, 3, 16]))]
        mode = rng.choice(list(Mode))
        if mode is not Mode.CHECK_ONLY and not any(quantity for _, quantity in usage):
            usage[0] = (usage[0][0], 1)
        subject = rng.choice(["", "", *SUBJECTS])
        return request(f"k{rng.randrange(number + 1)}", *usage, mode=mode, event_ms=self.event_ms(), subject=subject)


TIERED = [f"{letter} {{1}} 5,{{0}},7 40,1,0 0,0,{{1}}" for letter in "GV"]


def timeless(outcome: Outcome) -> Outcome:
    return msgspec.structs.replace(outcome, now_ms=0) if isinstance(outcome, Stale | OutOfTime) else outcome


def timeless_record(entry: bytes) -> Record:
    record = journal.decode(entry)
    assert journal.encode(record) == entry
    event = {"event_ms": 0} if isinstance(record, Consumed) and record.event_ms == record.recorded_ms else {}
    return msgspec.structs.replace(record, recorded_ms=0, **event)


def at(found: Account | None, now: int) -> Account:
    """With every limit in its current window: Redis turns those that a call asks for, the twin all of them."""
    assert found is not None
    quotas = {feature: quota.at(now) for feature, quota in found.quotas.items()}
    subjects = {subject: limit.at(now) for subject, limit in found.subjects.items()}
    return msgspec.structs.replace(found, quotas=quotas, subjects=subjects)


async def compare(twin: MemoryBench, live: RedisBench, draw: Draw, name: str) -> dict[str, int]:
    whole, prices, seen = draw.account(), draw.prices(), dict[str, int]()
    for bench in (twin, live):
        bench.put(whole)
    for number in range(CALLS):
        call = draw.call(number)
        price = charge(call, prices, plan=draw.plan())
        expected, answer = await asyncio.gather(twin.store.consume(call, price), live.store.consume(call, price))
        assert timeless(answer) == timeless(expected), (name, number, call, price)
        kind = answer.reason.name if isinstance(answer, Decision) else type(answer).__name__
        seen[kind] = seen.get(kind, 0) + 1
    expected_records = [timeless_record(entry) for entry in twin.entries()]
    assert [timeless_record(entry) for entry in live.entries()] == expected_records, name
    mine, other = await live.store.read(TENANT, "bob"), await twin.store.read(TENANT, "bob")
    assert at(mine.account, draw.now) == at(other.account, draw.now), name
    return seen


async def test_the_same_calls_get_the_same_answers_and_records_from_both_stores(valkey_url: str, seed: int) -> None:
    rng, total = random.Random(seed), dict[str, int]()
    async with redis_bench(valkey_url) as live:
        for number in range(ACCOUNTS):
            live.client.flushdb()
            now = live.now()
            seen = await compare(MemoryBench(now), live, Draw(rng, now), f"seed {seed}, account {number}")
            total |= {kind: total.get(kind, 0) + count for kind, count in seen.items()}
    print(total)
    assert total["NONE"] > ACCOUNTS  # The drawing reaches every kind of answer.
    kinds = {
        "INSUFFICIENT_CREDITS",
        "ARREARS_GATE",
        "USAGE_LIMIT_REACHED",
        "SUBJECT_LIMIT_REACHED",
        "NO_ENTITLEMENT",
        "PRICE_UNKNOWN",
        "Mismatch",
    }
    kinds |= {"FEATURE_NOT_FOUND", "CUSTOMER_SUSPENDED", "ACCOUNT_FROZEN", "Stale", "OutOfTime", "OutOfRange"}
    assert kinds <= total.keys()
