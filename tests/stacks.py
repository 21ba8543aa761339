"""A whole development stack as a test sees it from outside: both services, the hot store, the ledger's tables, the
published events and the conservation proof.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis

from entitlement import keys
from entitlement.rating import Rate, Tier, cost
from entitlement.v1 import gateway_pb2, ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli.stack import DevStack, Name
from gateway.transport import envoy
from ledger_sync.publisher.redis_stream import STREAM
from tests.servers import initialised

if TYPE_CHECKING:
    from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayAsyncStub
    from entitlement.v1.ledger_pb2_grpc import LedgerAdminAsyncStub

TENANT: Final = "default"
DEADLINE_S: Final = 20.0  # of a call, and of everything that is waited for
LOOK_AGAIN_S: Final = 0.02
TRANSPORTS: Final = ("grpcio", "envoy")

PLAN: Final = "list"
CALLS: Final = Rate("calls", 1_000_003)  # a little more than a thousandth
INPUT: Final = Rate("tokens", 3_000_000_001, 1_000_000, (("token_type", "input"),))
OUTPUT: Final = Rate("tokens", 15_000_000_000, 999_983, (("token_type", "output"),))

ALLOW, DENY = gateway_pb2.VERDICT_ALLOW, gateway_pb2.VERDICT_DENY

CUSTOMERS: Final = 30  # of `opened`
POOR: Final = 5  # of them: these run out

OF_USAGE: Final = ("rated", "threshold.crossed", "threshold.recovered")  # types of events

Answer = TypeVar("Answer")
Line = tuple[str, int, str]  # feature, quantity, token_type or none
Entry = tuple[bytes, dict[bytes, bytes]]  # of a stream
Event = dict[str, Any]  # a CloudEvent, as JSON has it
Env = Mapping[Name, Mapping[str, str]]

# No proxy of the environment; and a gateway that comes back is noticed at once.
CHANNEL: Final = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)


def environment(transport: str, more: Env | None = None) -> dict[Name, dict[str, str]]:
    """Settings of a stack whose gateway is served by `transport`, with more of each child's own."""
    if transport == "envoy" and (missing := envoy.available()):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    settings: dict[Name, dict[str, str]] = {name: dict(values) for name, values in (more or {}).items()}
    settings.setdefault("gateway", {})["ENTITLEMENT_GATEWAY_TRANSPORT"] = transport
    return settings


def on_sockets(folder: Path, transport: str, durability: str = "receipt") -> DevStack:
    """A stack on Unix sockets: nobody else takes such an address while a process is down."""
    gateway, admin = f"unix:{folder}/gateway.sock", f"unix:{folder}/admin.sock"
    env = environment(transport, {"gateway": {"ENTITLEMENT_GATEWAY_DURABILITY": durability}})
    return DevStack(prepared(folder / "data"), gateway=gateway, admin=admin, env=env)


def prepared(data: Path, *lines: str) -> Path:
    """A stack's data folder in which the database's files lie already, with more lines of postgresql.conf. One that
    has a database is left as it is.
    """
    database = data / "postgres"
    if not database.exists():
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        database.mkdir(mode=0o700)
        initialised(database)
        with (database / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{line}\n" for line in lines)
    return data


def card(plan: str, *rates: Rate) -> ledger_pb2.RateCard:
    message = ledger_pb2.RateCard(id=plan, credit_type="USD")
    for rate in rates:
        tiers = [
            ledger_pb2.Tier(up_to=tier.up_to, price_nanos=tier.price_nanos, flat_nanos=tier.flat_nanos)
            for tier in rate.tiers or (Tier(0, rate.price_nanos),)
        ]
        model: Any = int(rate.model)
        message.rates.add(feature=rate.feature, match=dict(rate.match), model=model, per=rate.per, tiers=tiers)
    return message


def put_catalogue(stack: DevStack) -> None:
    """The features and prices that tests count on."""
    with grpc.insecure_channel(stack.admin, options=CHANNEL) as channel:
        admin = LedgerAdminStub(channel)
        for key in ("calls", "tokens"):
            admin.PutFeature(ledger_pb2.Feature(key=key, kind=ledger_pb2.Feature.METERED), timeout=DEADLINE_S)
        admin.PutRateCard(card(PLAN, CALLS, INPUT, OUTPUT), timeout=DEADLINE_S)


def price_of(count: int, each: int = 1) -> int:
    """Nanos of `count` events of `each` calls by the plan's price."""
    return cost(CALLS, count * each)


def fresh(what: str) -> str:
    """A name that nothing else has."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


def consume_request(
    customer: str,
    *lines: Line,
    mode: gateway_pb2.Mode.ValueType = gateway_pb2.MODE_UNSPECIFIED,
    event_time: Timestamp | None = None,
) -> gateway_pb2.CheckAndConsumeRequest:
    """A request for some usage lines, by default one call, with a key of its own."""
    message = gateway_pb2.CheckAndConsumeRequest(
        idempotency_key=fresh("k"), customer=customer, mode=mode, event_time=event_time
    )
    for feature, quantity, token_type in lines or [("calls", 1, "")]:
        line = message.usage.add(feature=feature, quantity=quantity)
        if token_type:
            line.dimensions["token_type"] = token_type
    return message


def amount_of(answer: gateway_pb2.CheckAndConsumeResponse) -> int:
    return sum(line.amount_nanos for line in answer.consumed)


async def until(look: Callable[[], Awaitable[Answer]], holds: Callable[[Answer], bool], what: str) -> Answer:
    """Looks again and again until it holds; fails when the deadline has passed."""
    deadline = monotonic() + DEADLINE_S
    while not holds(found := await look()):
        assert monotonic() < deadline, f"{what}: {found}"
        await asyncio.sleep(LOOK_AGAIN_S)
    return found


async def persist(call: Callable[[], Awaitable[Answer]], *retried: grpc.StatusCode) -> Answer:
    """An answer, asked for again while a process is away."""
    deadline = monotonic() + DEADLINE_S
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, *retried) or monotonic() > deadline:
                raise
        await asyncio.sleep(LOOK_AGAIN_S)


class Site:
    """One stack, with a channel to each process. Customers are made for each test, so that tests share the stack."""

    def __init__(self, stack: DevStack, gateway: grpc.aio.Channel, admin: grpc.aio.Channel, hot: Redis) -> None:
        self.stack = stack
        self.gateway: EntitlementGatewayAsyncStub = EntitlementGatewayStub(gateway)
        self.admin: LedgerAdminAsyncStub = LedgerAdminStub(admin)
        self.hot = hot
        self._since = b"0"  # where the stream of events stood when the test began

    async def begin(self) -> None:
        if await self.hot.exists(STREAM):
            self._since = cast("dict[str, bytes]", await self.hot.xinfo_stream(STREAM))["last-generated-id"]

    async def customer(
        self, *grants: int | ledger_pb2.Grant, partition: int | None = None, contract: ledger_pb2.Contract | None = None
    ) -> str:
        """A new customer with a grant for each amount, and a contract: on the plan and prepaid unless it says more."""
        customer = fresh("cust")
        while partition is not None and keys.partition_of(TENANT, customer) != partition:
            customer = fresh("cust")
        message = ledger_pb2.Contract(id=f"{customer}-c", customer=customer, rate_card=PLAN)
        message.MergeFrom(contract or ledger_pb2.Contract(billing=ledger_pb2.Contract.PREPAID))
        await self.admin.PutCustomer(ledger_pb2.Customer(id=customer), timeout=DEADLINE_S)
        await self.admin.PutContract(message, timeout=DEADLINE_S)
        for number, grant in enumerate(grants, 1):
            await self.grant(customer, grant, f"{customer}-g{number}")
        return customer

    async def grant(self, customer: str, grant: int | ledger_pb2.Grant, grant_id: str = "") -> ledger_pb2.Grant:
        message = ledger_pb2.Grant(amount_nanos=grant) if isinstance(grant, int) else grant
        message.id, message.customer = message.id or grant_id or fresh("grant"), customer
        return await self.admin.CreateGrant(message, timeout=DEADLINE_S)

    async def ask(self, request: gateway_pb2.CheckAndConsumeRequest) -> gateway_pb2.CheckAndConsumeResponse:
        return await self.gateway.CheckAndConsume(request, timeout=DEADLINE_S)

    async def consume(self, customer: str, *lines: Line) -> gateway_pb2.CheckAndConsumeResponse:
        return await self.ask(consume_request(customer, *lines))

    async def balance(self, customer: str, at_least_sequence: int = 0) -> gateway_pb2.Balance:
        request = gateway_pb2.GetBalanceRequest(customer=customer, at_least_sequence=at_least_sequence)
        return (await self.gateway.GetBalance(request, timeout=DEADLINE_S)).balance

    async def balance_when(self, customer: str, available: int) -> gateway_pb2.Balance:
        """The balance once it is that much, as WatchBalance tells of it."""
        seen: list[int] = []
        request = gateway_pb2.GetBalanceRequest(customer=customer)
        try:
            async for message in self.gateway.WatchBalance(request, timeout=DEADLINE_S):
                seen.append(message.balance.available_nanos)
                if seen[-1] == available:
                    return message.balance
        except grpc.aio.AioRpcError as error:
            raise AssertionError(f"{available} nanos were never available, but {seen}: {error.code()}") from None
        raise AssertionError("the gateway ended the stream")

    async def verified(self, customer: str = "", *, quarantined: int = 0) -> ledger_pb2.VerifyReport:
        """The proof, once everything is settled and published, and clean but for what is meant to be in quarantine."""

        async def look() -> ledger_pb2.VerifyReport:
            request = ledger_pb2.VerifyRequest(customer=customer)
            return await persist(lambda: self.admin.Verify(request, timeout=2 * DEADLINE_S))

        said = f"; see {self.stack.data}/sync.log"
        await until(look, lambda report: not report.journal_lag, f"the journal was not settled{said}")
        report = await until(look, lambda report: not report.outbox_pending, f"events were not published{said}")
        found = {field.name: value for field, value in report.ListFields()}
        faults = {"drifted", "drift_nanos", "unbalanced_transactions", "journal_lag", "drifts", "sequence_gaps"}
        assert not faults & found.keys(), found
        assert report.quarantined == quarantined, await self.rows("SELECT stream, entry_id, reason FROM quarantine")
        return report

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """What the ledger's tables hold."""
        connection = await asyncpg.connect(self.stack.database_url, timeout=DEADLINE_S)
        try:
            return await connection.fetch(query, *arguments, timeout=DEADLINE_S)
        finally:
            await connection.close()

    async def booked(self, customer: str) -> dict[str, int]:
        """The customer's events in the ledger: amount by key."""
        rows = await self.rows("SELECT idempotency_key, amount FROM usage_events WHERE customer = $1", customer)
        return {row["idempotency_key"]: row["amount"] for row in rows}

    async def transactions(self, customer: str, *kinds: str) -> list[ledger_pb2.Transaction]:
        """All of the customer, or those of some kinds, in the order they were booked; each sums to zero."""
        found: list[ledger_pb2.Transaction] = []
        request = ledger_pb2.ListRequest(customer=customer, page_size=1_000)
        while True:
            page = await self.admin.ListTransactions(request, timeout=DEADLINE_S)
            found += page.transactions
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert not [t for t in found if sum(entry.amount_nanos for entry in t.entries)]
        return [transaction for transaction in found if not kinds or transaction.kind in kinds]

    async def events(self, *customers: str, of: Sequence[str] = OF_USAGE) -> list[Event]:
        """What has been published about these customers since the test began, to the default stream: by default what
        usage does, not that a contract was put or a gate has closed. `of` nothing: all.
        """
        entries = await self.entries(STREAM, b"(" + self._since)
        found = [json.loads(fields[b"body"]) for _, fields in entries if fields[b"customer"].decode() in customers]
        return [event for event in found if not of or types_of([event])[0] in of]

    async def entries(self, stream: str, since: bytes = b"-") -> list[Entry]:
        return cast("list[Entry]", await self.hot.xrange(stream, min=since))

    async def resolve_quarantine(self) -> list[asyncpg.Record]:
        """Looks at what is in quarantine, as an operator does, and leaves it empty for the next test."""
        return await self.rows(
            """UPDATE quarantine SET resolved_at = now(), resolution = 'seen by a test' WHERE resolved_at IS NULL
               RETURNING stream, entry_id, reason, record"""
        )

    async def journal(self, partition: int) -> list[bytes]:
        """The records that a partition's stream still holds."""
        return [fields[b"r"] for _, fields in await self.entries(keys.journal(partition)) if b"r" in fields]


@asynccontextmanager
async def site(stack: DevStack) -> AsyncIterator[Site]:
    """A look at a stack that runs."""
    async with AsyncExitStack() as exits:
        gateway = await exits.enter_async_context(grpc.aio.insecure_channel(stack.gateway, options=CHANNEL))
        admin = await exits.enter_async_context(grpc.aio.insecure_channel(stack.admin, options=CHANNEL))
        hot = await exits.enter_async_context(Redis.from_url(stack.redis_url, socket_timeout=DEADLINE_S))
        made = Site(stack, gateway, admin, hot)
        await made.begin()
        yield made


def types_of(events: Iterable[Event]) -> list[str]:
    return [str(event["type"]).removeprefix("entitlement.").removesuffix(".v1") for event in events]


def ids_of(events: Iterable[Event]) -> Sequence[str]:
    return [str(event["id"]) for event in events]


@asynccontextmanager
async def opened(stack: DevStack) -> AsyncIterator[tuple[Site, list[str]]]:
    """A look at a stack, and its customers."""
    async with site(stack) as at:
        rich = [await at.customer(price_of(10**6)) for _ in range(CUSTOMERS - POOR)]
        poor = [await at.customer(price_of(20)) for _ in range(POOR)]
        yield at, rich + poor


async def down_and_up(stack: DevStack, name: Name) -> float:
    """SIGKILL, and a new start through the stack. Seconds until it serves again."""
    began = monotonic()
    await asyncio.to_thread(stack.kill, name)
    await asyncio.to_thread(stack.restart, name)
    return monotonic() - began
