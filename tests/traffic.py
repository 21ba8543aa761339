"""Callers who do not give up, and the audit of what they were answered.

Each caller asks for one key after the other, and for the same key again while its outcome is unknown: in the end every
key has exactly one answer, and the ledger must have exactly the allowed ones, each once, with what was answered.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from time import monotonic
from typing import Final

import grpc
import msgspec

from entitlement.v1 import gateway_pb2
from gateway.client import Client, EntitlementCallError
from ledger_sync.publisher.redis_stream import STREAM
from tests.stacks import ALLOW, DENY, Site, amount_of, consume_request, persist

CALLERS: Final = 12
ATTEMPT_S: Final = 5.0
KEY_S: Final = 45.0  # for one key, with all its attempts: longer than anything is ever down
PAUSE_S: Final = 0.01
MOST_CALLS: Final = 3  # in one request

# The outcome is unknown: the same key again tells it.
UNKNOWN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Answer(msgspec.Struct, frozen=True):
    """The one answer to a key."""

    key: str
    customer: str
    allowed: bool
    amount: int
    epoch: int
    sequence: int
    replayed: bool


Send = Callable[[gateway_pb2.CheckAndConsumeRequest], Awaitable[Answer]]


class Traffic:
    """What `CALLERS` callers are answered. `send` tries once."""

    def __init__(self, send: Send, customers: Sequence[str], random: Random) -> None:
        self._send = send
        self._customers = customers
        self._random = random
        self._stopping = False
        self._goal, self._reached = 0, asyncio.Event()
        self.answers: dict[str, Answer] = {}
        self.unknown = Counter[str]()  # attempts without an outcome, by status

    async def run(self) -> None:
        """Until `stop`. Fails on any answer that is neither a decision nor a reason to ask again."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._caller())

    def stop(self) -> None:
        """No more keys: each caller still gets the answer it waits for."""
        self._stopping = True

    async def more(self, count: int) -> None:
        """Returns when so many more keys have been answered."""
        self._goal = len(self.answers) + count
        self._reached.clear()
        async with asyncio.timeout(KEY_S):
            await self._reached.wait()

    async def _caller(self) -> None:
        while not self._stopping:
            customer = self._random.choice(self._customers)
            request = consume_request(customer, ("calls", self._random.randint(1, MOST_CALLS), ""))
            answer = await self._ask(request)
            assert answer.key not in self.answers and answer.customer == customer
            self.answers[answer.key] = answer
            if len(self.answers) >= self._goal:
                self._reached.set()

    async def _ask(self, request: gateway_pb2.CheckAndConsumeRequest) -> Answer:
        deadline = monotonic() + KEY_S
        while True:
            try:
                return await self._send(request)
            except (grpc.aio.AioRpcError, EntitlementCallError) as error:
                code = error.code if isinstance(error, EntitlementCallError) else error.code()
                assert code in UNKNOWN, f"{request.idempotency_key}: {error}"
                assert monotonic() < deadline, f"{request.idempotency_key} got no answer in {KEY_S:.0f} s: {error}"
                self.unknown[code.name] += 1
            await asyncio.sleep(PAUSE_S)


@asynccontextmanager
async def flowing(traffic: Traffic) -> AsyncIterator[Traffic]:
    """Traffic while the block runs; afterwards every key that was sent has its answer."""
    async with asyncio.TaskGroup() as group:
        group.create_task(traffic.run())
        try:
            yield traffic
        finally:
            traffic.stop()


def by_stub(at: Site) -> Send:
    """One attempt of a plain gRPC client."""

    async def send(request: gateway_pb2.CheckAndConsumeRequest) -> Answer:
        answer = await at.gateway.CheckAndConsume(request, timeout=ATTEMPT_S)
        assert answer.verdict in (ALLOW, DENY)
        return Answer(
            key=answer.idempotency_key,
            customer=request.customer,
            allowed=answer.verdict == ALLOW,
            amount=amount_of(answer),
            epoch=answer.epoch,
            sequence=answer.sequence,
            replayed=answer.replayed,
        )

    return send


def by_client(client: Client) -> Send:
    """The product's own client, which retries by itself, in batches."""

    async def send(request: gateway_pb2.CheckAndConsumeRequest) -> Answer:
        (line,) = request.usage
        decision = await client.check_and_consume(
            request.customer, line.feature, line.quantity, key=request.idempotency_key
        )
        return Answer(
            key=decision.key,
            customer=request.customer,
            allowed=decision.allowed,
            amount=sum(consumed.amount_nanos for consumed in decision.consumed),
            epoch=decision.epoch,
            sequence=decision.sequence,
            replayed=decision.replayed,
        )

    return send


class Audit(msgspec.Struct):
    """How the ledger differs from the answers, and what was published."""

    allowed: int = 0
    denied: int = 0
    replayed: int = 0  # answers that were decided before, by an attempt whose outcome was unknown
    lost: list[str] = []  # allowed and not in the ledger
    unasked: list[str] = []  # in the ledger and never allowed
    doubled: list[str] = []  # in more than one transaction
    different: list[str] = []  # in the ledger with another amount or place than answered
    unpublished: list[str] = []
    unknown_events: list[str] = []
    changed_events: list[str] = []  # published again with another body
    republished: int = 0  # published again as it was: at least once is promised

    @property
    def clean(self) -> bool:
        faults = (self.lost, self.unasked, self.doubled, self.different)
        return not any((*faults, self.unpublished, self.unknown_events, self.changed_events))


async def audit(at: Site, answers: dict[str, Answer]) -> Audit:
    """Compares answers with the ledger and the events, once both have come to rest."""
    allowed = {key: answer for key, answer in answers.items() if answer.allowed}
    found = Audit(
        allowed=len(allowed),
        denied=len(answers) - len(allowed),
        replayed=sum(answer.replayed for answer in answers.values()),
    )
    rows = await at.rows("SELECT idempotency_key, customer, amount, epoch, sequence FROM usage_events")
    booked = {row["idempotency_key"]: tuple(row) for row in rows}
    found.lost = sorted(allowed.keys() - booked.keys())
    found.unasked = sorted(booked.keys() - allowed.keys())
    found.different = [
        key
        for key, answer in allowed.items()
        if key in booked and booked[key] != (key, answer.customer, answer.amount, answer.epoch, answer.sequence)
    ]
    doubled = await at.rows(
        """SELECT idempotency_key FROM transactions WHERE kind = 'consume'
           GROUP BY idempotency_key HAVING count(*) > 1"""
    )
    found.doubled = [row["idempotency_key"] for row in doubled]
    await _audit_events(at, allowed, found)
    return found


async def _audit_events(at: Site, allowed: dict[str, Answer], found: Audit) -> None:
    bodies: dict[str, bytes] = {}
    for _, fields in await at.entries(STREAM):
        event = json.loads(fields[b"body"])
        if event["type"] != "entitlement.rated.v1":
            continue
        if event["id"] in bodies:
            found.republished += 1
            if bodies[event["id"]] != fields[b"body"]:
                found.changed_events.append(event["id"])
        bodies[event["id"]] = fields[b"body"]
    found.unpublished = sorted(allowed.keys() - bodies.keys())
    found.unknown_events = sorted(bodies.keys() - allowed.keys())


async def balances_add_up(at: Site, answers: dict[str, Answer]) -> None:
    """What each customer was granted is what it was charged and what it has left."""
    charged = Counter[str]()
    for answer in answers.values():
        charged[answer.customer] += answer.amount
    granted = await at.rows("SELECT customer, sum(amount) AS amount FROM grants GROUP BY customer")
    for row in granted:
        balance = await persist(partial(at.balance, row["customer"]))
        assert balance.available_nanos == row["amount"] - charged[row["customer"]], row["customer"]
