"""Callers who ask, insist for a while, and keep a record of every key: what was sent and what came back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Final

import grpc
import msgspec

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.faults.customers import CALLS, Customer
from tests.stacks import CHANNEL

if TYPE_CHECKING:
    from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayAsyncStub

ATTEMPT_S: Final = 2.0
INSIST_S: Final = 4.0  # then the outcome is unknown
PAUSE_S: Final = 0.02  # before it is tried again: this, jittered, and longer each time
LONGEST_PAUSE_S: Final = 0.3
MOST_KEYS: Final = 200_000  # of one load
RETRIED: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,  # Not by us: a gRPC server that ends resets calls that it never took; our client knows.
)


class Outcome(StrEnum):
    OK = "ok"
    DENIED = "denied"
    UNKNOWN = "unknown"


class Answer(msgspec.Struct, frozen=True):
    amount: int
    epoch: int
    sequence: int
    reason: int
    replayed: bool
    degraded: bool


class Record(msgspec.Struct):
    """One key's story."""

    key: str
    customer: str
    feature: str
    units: int
    gateway: int  # its callers stay with one
    outcome: Outcome = Outcome.UNKNOWN
    answer: Answer | None = None
    attempts: int = 0
    given_up: bool = False  # at first nobody knew
    answered_at: float = 0.0
    took_s: float = 0.0  # of the attempt that was answered

    @property
    def amount(self) -> int:
        return self.answer.amount if self.answer and self.outcome is Outcome.OK else 0


class Load:
    """What `callers` callers at each gateway are answered. `pace_s`: the mean pause of a caller between two keys."""

    def __init__(
        self,
        stubs: Sequence[EntitlementGatewayAsyncStub],
        customers: Sequence[Customer],
        random: Random,
        *,
        callers: int = 16,
        pace_s: float = 0.01,
        insist_s: float = INSIST_S,
    ) -> None:
        self._stubs = stubs
        self.customers = list(customers)
        self._random = random
        self._callers = callers
        self._pace_s = pace_s
        self._insist_s = insist_s
        self._name = f"{random.getrandbits(64):016x}"
        self._stopping = False
        self._news = asyncio.Condition()
        self.records: dict[str, Record] = {}
        self.answered = 0
        self.failures = Counter[str]()  # attempts without an answer, by status
        self.details = Counter[str]()  # and by what was said
        self.surprises: list[str] = []  # answers that no caller should get

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for gateway in range(len(self._stubs)):
                for _ in range(self._callers):
                    group.create_task(self._caller(gateway))

    def stop(self) -> None:
        self._stopping = True

    async def more(self, count: int, within_s: float = 60.0) -> None:
        """Returns when so many more keys have been answered."""
        goal = self.answered + count
        async with asyncio.timeout(within_s), self._news:
            await self._news.wait_for(lambda: self.answered >= goal)

    def of(self, outcome: Outcome) -> list[Record]:
        return [record for record in self.records.values() if record.outcome is outcome]

    def percentile_ms(self, percent: int, since: float = 0.0, customers: Sequence[str] = ()) -> float:
        """Of the attempts answered since then, how long the slowest took but for the last few percent."""
        took = sorted(
            record.took_s * 1000
            for record in self.records.values()
            if record.answered_at > since and (not customers or record.customer in customers)
        )
        return took[min(len(took) - 1, len(took) * percent // 100)] if took else 0.0

    async def ask_again(self, records: Iterable[Record], within_s: float) -> None:
        """What is not known, with the same key, until it is."""
        limit = asyncio.Semaphore(self._callers)

        async def again(record: Record) -> None:
            async with limit:
                await self._insist(record, within_s)

        async with asyncio.TaskGroup() as group:
            for record in records:
                group.create_task(again(record))

    async def once(
        self, record: Record, timeout_s: float = ATTEMPT_S, stub: EntitlementGatewayAsyncStub | None = None
    ) -> pb.CheckAndConsumeResponse:
        """One attempt, at the record's gateway or another way to it."""
        usage = [pb.Usage(feature=record.feature, quantity=record.units)]
        request = pb.CheckAndConsumeRequest(idempotency_key=record.key, customer=record.customer, usage=usage)
        record.attempts += 1
        return await (stub or self._stubs[record.gateway]).CheckAndConsume(request, timeout=timeout_s)

    async def many(self, count: int) -> None:
        """So many more keys at once, each in one attempt."""
        await asyncio.gather(*[self.tell(self.draw()) for _ in range(count)])

    async def tell(self, record: Record, timeout_s: float = 10.0) -> grpc.StatusCode:
        """One attempt, and the status that came of it."""
        try:
            answer = await self.once(record, timeout_s)
        except grpc.aio.AioRpcError as error:
            record.given_up = True
            return error.code()
        await self._keep(record, answer)
        return grpc.StatusCode.OK

    def draw(self, gateway: int = 0, customer: Customer | None = None) -> Record:
        """The next key."""
        if customer is None:
            (customer,) = self._random.choices(self.customers, [customer.weight for customer in self.customers])
        units = self._random.randint(1, 3 if customer.feature == CALLS else 900)
        key = f"{self._name}-{len(self.records)}"
        record = self.records[key] = Record(key, customer.id, customer.feature, units, gateway)
        return record

    async def _caller(self, gateway: int) -> None:
        while not self._stopping:
            if len(self.records) >= MOST_KEYS:
                raise RuntimeError(f"the load has come to {MOST_KEYS} keys, its bound: play it slower")
            await self._insist(self.draw(gateway), self._insist_s)
            await asyncio.sleep(self._random.uniform(0, 2 * self._pace_s))

    async def _insist(self, record: Record, within_s: float) -> None:
        deadline, pause_s = monotonic() + within_s, PAUSE_S
        while True:
            began = monotonic()
            try:
                answer = await self.once(record)
            except grpc.aio.AioRpcError as error:
                self.failures[error.code().name] += 1
                self.details[error.details() or ""] += 1
                if error.code() not in RETRIED:
                    self.surprises.append(f"{record.key}: {error.code().name} {error.details()}")
                if error.code() not in RETRIED or monotonic() > deadline:
                    record.given_up = True
                    return
            else:
                record.took_s = monotonic() - began
                await self._keep(record, answer)
                return
            await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _keep(self, record: Record, answer: pb.CheckAndConsumeResponse) -> None:
        if answer.idempotency_key != record.key:
            self.surprises.append(f"{record.key}: the answer of {answer.idempotency_key}")
        allowed = answer.verdict == pb.VERDICT_ALLOW
        amount = sum(line.amount_nanos for line in answer.consumed)
        record.answer = Answer(amount, answer.epoch, answer.sequence, answer.reason, answer.replayed, answer.degraded)
        record.outcome = Outcome.OK if allowed else Outcome.DENIED
        record.answered_at = monotonic()
        async with self._news:
            self.answered += 1
            self._news.notify_all()


@asynccontextmanager
async def stubs(addresses: Sequence[str]) -> AsyncIterator[list[EntitlementGatewayAsyncStub]]:
    """A channel to each gateway."""
    async with AsyncExitStack() as exits:
        made: list[EntitlementGatewayAsyncStub] = []
        for address in addresses:
            channel = await exits.enter_async_context(grpc.aio.insecure_channel(address, options=CHANNEL))
            made.append(EntitlementGatewayStub(channel))
        yield made


@asynccontextmanager
async def flowing(load: Load) -> AsyncIterator[Load]:
    """Load while the block runs; afterwards every caller has its answer, or has given up."""
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        try:
            yield load
        finally:
            load.stop()
