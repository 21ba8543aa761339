"""Both hot stores behind one bench: put an account, ask, look at everything that was written.

The suite in tests/contract/hot_store, the twin comparison and the state machine use it. The clock of Redis is the
server's: accounts are built relative to `now`, and only the memory store's clock can be moved.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Protocol

import msgspec
import redis

from entitlement import keys
from entitlement.account import Account, Billing, Config, HotGrant, Quota, Status, SubjectLimit
from entitlement.decision import Charge, Consume, Decision, Limits, Mode, Outcome, Price
from entitlement.journal import Consumed, Record, decode
from entitlement.lua import script
from entitlement.periods import Recurrence
from entitlement.quantity import MAX_QUANTITY
from entitlement.redis_address import Endpoint
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2 as pb
from gateway.store.memory import MemoryStore
from gateway.store.protocol import HotStore
from gateway.store.redis_store import RedisStore

TENANT, CUSTOMER, PLAN, VERSION = "acme", "bob", "standard", 3
TOKENS, IMAGES = "tokens", "images"
PRICES = {
    TOKENS: Price(TOKENS, "U 1 1"),  # a nano a token
    IMAGES: Price(IMAGES, "U 1000 1"),
    "half": Price("half", "U 1 2"),
    "free": Price("free", "U 0 1"),
    "dear": Price("dear", "U 1000000000000 1"),
    "trial": Price("trial", "U 1 1", shadow=True),
    "unpriced": Price("unpriced", "-"),
    "unknown": Price("unknown", "!"),
}

Usage = tuple[str, int]


def request(
    key: str, *usage: Usage, mode: Mode = Mode.NORMAL, event_ms: int = 0, customer: str = CUSTOMER, subject: str = ""
) -> Consume:
    """A checked request, as the gateway makes it from the wire."""
    asked = Mode.ADJUST_ONLY if mode is Mode.SETTLE else mode  # No caller's mode.
    wire = pb.CheckAndConsumeRequest(idempotency_key=key, customer=customer, subject=subject, mode=int(asked))  # type: ignore[arg-type]
    for feature, quantity in usage:
        assert 0 <= quantity <= MAX_QUANTITY
        wire.usage.add(feature=feature, quantity=quantity)
    if event_ms:
        wire.event_time.FromMilliseconds(event_ms)
    return msgspec.structs.replace(parse_consume(TENANT, wire), mode=mode)


def charge(asked: Consume, prices: Mapping[str, Price] = PRICES, *, plan: str = PLAN, version: int = VERSION) -> Charge:
    """The prices of a request, in force for ever."""
    return Charge(plan, version, 0, 0, tuple(prices[line.feature] for line in asked.lines))


def account(
    *grants: HotGrant,
    billing: Billing = Billing.PREPAID,
    status: Status = Status.ACTIVE,
    gate_percent: int = 100,
    credit_line: int = 0,
    thresholds: tuple[int, ...] = (80, 90, 100, 150),
    entitled: tuple[str, ...] = (),
    quotas: Iterable[Quota] = (),
    subjects: Iterable[SubjectLimit] = (),
    allowance: int | None = None,
    recurrence: Recurrence = Recurrence.NEVER,
    anchor_ms: int = 0,
    period: tuple[int, int] = (0, 0),
    settled: int = 0,
    overage: int = 0,
    held: int = 0,
    meters: Mapping[str, int] | None = None,
    sequence: int = 0,
) -> Account:
    """An account as an install writes it; the allowance is what is there unless it is given."""
    config = Config(
        PLAN, "USD", status, billing, recurrence, anchor_ms, credit_line, gate_percent, thresholds, entitled
    )
    whole = credit_line + sum(grant.remaining for grant in grants) - overage
    return Account(
        config,
        epoch=1,
        sequence=sequence,
        version=0,
        period_start=period[0],
        period_end=period[1],
        settled=settled,
        held=held,
        overage=overage,
        allowance=max(0, whole) if allowance is None else allowance,
        grants=list(grants),
        meters=dict(meters or {}),
        quotas={quota.feature: quota for quota in quotas},
        subjects={limit.subject: limit for limit in subjects},
    )


class Bench(Protocol):
    """What a test may do to a store besides asking it."""

    store: HotStore

    def now(self) -> int: ...

    def put(self, account: Account, customer: str = CUSTOMER) -> None: ...

    def put_missing(self, customer: str = CUSTOMER) -> None: ...

    def entries(self, customer: str = CUSTOMER) -> list[bytes]:
        """The journal of the customer's partition, oldest first."""

    def asked(self) -> list[tuple[str, str]]:
        """Accounts that somebody asked to be installed, oldest first; they are taken."""

    def everything(self) -> object:
        """All that is stored, for comparison."""

    def forget_keys(self) -> None:
        """The interval for which keys are remembered has passed."""


class Hot:
    """A bench with the words that the tests are written in."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.store = bench, bench.store
        self.now, self.put, self.put_missing = bench.now, bench.put, bench.put_missing
        self.everything, self.forget_keys, self.asked = bench.everything, bench.forget_keys, bench.asked

    async def ask(
        self,
        key: str,
        *usage: Usage,
        mode: Mode = Mode.NORMAL,
        event_ms: int = 0,
        customer: str = CUSTOMER,
        prices: Mapping[str, Price] = PRICES,
        plan: str = PLAN,
        subject: str = "",
    ) -> Outcome:
        asked = request(key, *usage, mode=mode, event_ms=event_ms, customer=customer, subject=subject)
        return await self.store.consume(asked, charge(asked, prices, plan=plan))

    async def decide(
        self, key: str, *usage: Usage, mode: Mode = Mode.NORMAL, event_ms: int = 0, subject: str = ""
    ) -> Decision:
        outcome = await self.ask(key, *usage, mode=mode, event_ms=event_ms, subject=subject)
        assert isinstance(outcome, Decision), outcome
        return outcome

    async def account(self, customer: str = CUSTOMER) -> Account:
        found = (await self.store.read(TENANT, customer)).account
        assert found is not None
        return found

    def journal(self, customer: str = CUSTOMER) -> list[Record]:
        return [decode(entry) for entry in self.bench.entries(customer)]

    def consumed(self) -> Consumed:
        """The last record, which is that of a granted decision."""
        record = self.journal()[-1]
        assert isinstance(record, Consumed)
        return record


class MemoryBench:
    def __init__(self, now_ms: int, limits: Limits | None = None) -> None:
        self.now_ms = now_ms
        self.memory = MemoryStore(self.now, limits)
        self.store: HotStore = self.memory

    def now(self) -> int:
        return self.now_ms

    def put(self, account: Account, customer: str = CUSTOMER) -> None:
        self.memory.put(TENANT, customer, deepcopy(account))

    def put_missing(self, customer: str = CUSTOMER) -> None:
        self.memory.missing.add((TENANT, customer))

    def entries(self, customer: str = CUSTOMER) -> list[bytes]:
        return list(self.memory.journal)

    def asked(self) -> list[tuple[str, str]]:
        found, self.memory.asked = self.memory.asked, []
        return found

    def forget_keys(self) -> None:
        self.now_ms += Limits().remember_ms

    def everything(self) -> object:
        return repr((self.memory.accounts, self.memory.journal, self.memory._remembered))


class RedisBench:
    def __init__(self, url: str, store: RedisStore, client: redis.Redis) -> None:
        self.url, self.client = url, client
        self.store: HotStore = store
        self._install = client.register_script(script("install"))

    def now(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _key(self, customer: str) -> str:
        return keys.account(keys.partition_of(TENANT, customer), TENANT, customer)

    def put(self, account: Account, customer: str = CUSTOMER) -> None:
        fields = [part for field in account.encode().items() for part in field]
        self.client.delete(self._key(customer))
        assert self._install(keys=[self._key(customer)], args=fields) == 1

    def put_missing(self, customer: str = CUSTOMER) -> None:
        assert self._install(keys=[self._key(customer)], args=["missing", 60_000]) == 1

    def entries(self, customer: str = CUSTOMER) -> list[bytes]:
        found = self.client.xrange(keys.journal(keys.partition_of(TENANT, customer)))
        return [fields[b"r"] for _, fields in found]

    def asked(self) -> list[tuple[str, str]]:
        """By partition; of one partition, oldest first."""
        found = []
        for partition in range(keys.PARTITIONS):
            while (entry := self.client.lpop(keys.install_requests(partition))) is not None:
                tenant, customer = entry.decode().split(" ")
                found.append((tenant, customer))
        return found

    def forget_keys(self) -> None:
        for key in self.client.keys("i:*"):
            assert self.client.pexpire(key, 0)

    def everything(self) -> object:
        """By content: the order of a hash's fields is the server's business."""
        contents = {
            b"hash": self.client.hgetall,
            b"string": self.client.get,
            b"stream": self.client.xrange,
            b"list": lambda key: self.client.lrange(key, 0, -1),
        }
        return {key: contents[self.client.type(key)](key) for key in self.client.scan_iter()}


@asynccontextmanager
async def redis_bench(url: str, limits: Limits | None = None, timeout_ms: int = 10_000) -> AsyncIterator[RedisBench]:
    store = RedisStore(Endpoint.parse(url), limits=limits or Limits(), timeout_ms=timeout_ms)
    await store.start()
    with redis.Redis.from_url(url) as client:
        try:
            yield RedisBench(url, store, client)
        finally:
            await store.stop()
