"""The control plane on real servers: LedgerAdmin behind a real channel, the journal drained into a real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry

from entitlement.account import Account
from entitlement.decision import Charge, Consume, Decision, Limits, Mode, Outcome, Stale, parse_outcome
from entitlement.errors import Unavailable
from entitlement.keys import PARTITIONS
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2, ledger_pb2
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub, add_LedgerAdminServicer_to_server
from ledger_sync.admin import LedgerAdmin
from ledger_sync.control import ControlPlane
from ledger_sync.drain import Drain
from ledger_sync.hot_store import HotStore
from ledger_sync.install import ensure
from ledger_sync.journal_reader import JournalReader
from ledger_sync.ledger import Ledger, Row
from ledger_sync.pricing import PriceList
from ledger_sync.telemetry import Figures

if TYPE_CHECKING:
    from entitlement.v1.ledger_pb2_grpc import LedgerAdminAsyncStub

TENANT = "acme"
DEADLINE_S = 20.0
USD = 1_000_000_000


class Rig:
    """Everything a test of the control plane touches."""

    def __init__(self, ledger: Ledger, hot: HotStore, drain: Drain, control: ControlPlane) -> None:
        self.ledger = ledger
        self.hot = hot
        self.drain = drain
        self.control = control
        self.stub: LedgerAdminAsyncStub
        self._draining: asyncio.Task[None] | None = None
        self._keys = count(1)

    def start_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """As a worker does: a drain that finds another hot store than it was told of begins anew."""
        while True:
            with suppress(Unavailable, ExceptionGroup):
                # In a task of its own: a TaskGroup that failed leaves its task marked as cancelled on Python 3.11.
                await asyncio.create_task(self.drain.run())
            await asyncio.sleep(0.05)

    async def stop_drain(self) -> None:
        """Records stay in the journal until it starts again."""
        if self._draining:
            await end(self._draining)
            self._draining = None

    async def rows(self, query: str, *arguments: object) -> list[Row]:
        async with self.ledger.transaction(readonly=True) as connection:
            return await connection.fetch(query, *arguments)

    async def value(self, query: str, *arguments: object) -> object:
        (row,) = await self.rows(query, *arguments)
        return row[0]

    async def execute(self, query: str, *arguments: object) -> None:
        async with self.ledger.transaction() as connection:
            await connection.execute(query, *arguments)

    async def account(self, customer: str) -> Account:
        """The hot account, installed if need be."""
        async with asyncio.timeout(DEADLINE_S):
            await ensure(self.hot, [(TENANT, customer)])
        (account,) = await self.hot.snapshots([(TENANT, customer)])
        assert account is not None, f"{customer} is not hot"
        return account

    async def account_when(self, customer: str, holds: Callable[[Account], bool]) -> Account:
        """The hot account once something holds of it."""
        deadline = monotonic() + DEADLINE_S
        while not holds(account := await self.account(customer)):
            assert monotonic() < deadline, f"it never held: {account}"
            await asyncio.sleep(0.01)
        return account

    async def settled(self, customer: str) -> None:
        """Returns when the ledger has all that the customer's journal holds."""
        partition = self.hot.partition((TENANT, customer))
        ids = await self.hot.last_ids([partition])
        async with asyncio.timeout(DEADLINE_S):
            await self.drain.settled(partition, ids[partition])

    async def consume(
        self, customer: str, feature: str, quantity: int, *, key: str = "", event_ms: int = 0, mode: Mode = Mode.NORMAL
    ) -> Decision:
        """A decision as the gateway makes it."""
        key = key or f"k-{next(self._keys)}"
        message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=key, customer=customer)
        message.usage.add(feature=feature, quantity=quantity)
        message.mode = int(mode)  # type: ignore[assignment]
        if event_ms:
            message.event_time.FromMilliseconds(event_ms)
        request = parse_consume(TENANT, message)
        await self.account(customer)
        while isinstance(outcome := await self.ask(request), Stale):
            pass  # Its plan changed between the look and the call: as a gateway does, it looks again.
        assert isinstance(outcome, Decision), outcome
        return outcome

    async def ask(self, request: Consume) -> Outcome:
        prices = PriceList((await self.control.catalogs.snapshot()).tenants[0])
        account = await self.account(request.customer)
        at_ms = request.event_ms or await self.hot.now_ms()
        charge: Charge = prices.charge(request, account.config.plan_at(at_ms), at_ms)
        (reply,) = await self.hot.consume([(request, charge)], Limits())
        return parse_outcome(reply, request)

    async def catalogue(self) -> None:
        """Two metered features, and a card that prices them in USD: 3 a million input tokens, 15 a million output."""
        for key in ("input.tokens", "output.tokens"):
            await self.stub.PutFeature(ledger_pb2.Feature(key=key, kind=ledger_pb2.Feature.METERED, unit="token"))
        await self.stub.PutRateCard(card("llm", {"input.tokens": 3 * USD, "output.tokens": 15 * USD}))

    async def customer(self, customer: str, *grants: int, **contract: object) -> None:
        """A customer on the card, with paid grants '<customer>-1', ... of these amounts."""
        await self.stub.PutCustomer(ledger_pb2.Customer(id=customer, name=customer.title()))
        terms = {"id": f"contract-{customer}", "customer": customer, "rate_card": "llm"} | contract
        await self.stub.PutContract(ledger_pb2.Contract(**terms))  # type: ignore[arg-type]
        for number, amount in enumerate(grants, 1):
            await self.stub.CreateGrant(
                ledger_pb2.Grant(id=f"{customer}-{number}", customer=customer, amount_nanos=amount)
            )


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Returns once it holds."""
    deadline = monotonic() + DEADLINE_S
    while not await holds():
        assert monotonic() < deadline, "it never held"
        await asyncio.sleep(0.01)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=DEADLINE_S)
    assert done, f"{task} does not end"


def card(name: str, prices: dict[str, int], *, per: int = 1_000_000) -> ledger_pb2.RateCard:
    message = ledger_pb2.RateCard(id=name, credit_type="USD")
    for feature, nanos in prices.items():
        message.rates.add(feature=feature, per=per, tiers=[ledger_pb2.Tier(price_nanos=nanos)])
    return message


@asynccontextmanager
async def rig(valkey_url: str, dsn: str, partitions: int = PARTITIONS) -> AsyncIterator[Rig]:
    """A whole control plane, serving on a loopback port of its own."""
    ledger = await Ledger.open(dsn)
    hot = HotStore.connect(valkey_url, partitions)
    # Without socket_timeout, which may swallow the cancellation that ends the drain (asyncio.wait_for on Python 3.11).
    reader = JournalReader.connect(valkey_url, range(partitions), "test")
    drain = Drain(ledger, [reader], figures=Figures(CollectorRegistry()), on_commit=lambda _: None, linger_ms=1)
    control = ControlPlane(ledger, hot, drain.settled, TENANT)
    made = Rig(ledger, hot, drain, control)
    server = grpc.aio.server()
    add_LedgerAdminServicer_to_server(LedgerAdmin(control), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made.start_drain()
    loops = asyncio.create_task(control.run())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            made.stub = LedgerAdminStub(channel)
            yield made
    finally:
        await server.stop(None)
        await made.stop_drain()
        await end(loops)
        await reader.close()
        await hot.close()
        await ledger.close()


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """The status and text of a call that fails."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call was answered")


def total(entries: Iterable[ledger_pb2.Entry]) -> int:
    return sum(entry.amount_nanos for entry in entries)
