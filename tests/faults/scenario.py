"""Runs a case in two phases: load with faults, drawn from the seed; then everything is healed and must come to rest.

One line tells the case, its seed and the figures; `make faults CASE=… SEED=…` runs the same again.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from random import Random
from time import monotonic
from typing import Final, TypeVar

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement.v1 import ledger_pb2
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from tests.faults import witnesses
from tests.faults.auditor import Audit, Auditor
from tests.faults.cluster import Cluster
from tests.faults.customers import Customer, put_catalogue, put_customers
from tests.faults.load import INSIST_S, Load, Outcome, flowing, stubs
from tests.stacks import CHANNEL, persist

CONVERGE_S: Final = 30.0
ANSWER_S: Final = 60.0  # for what nobody knew, once all is healed
ANSWERED_S: Final = 120.0  # for the first answer after a fault; how long it may take is for the case to say
LAG_S: Final = 1.0  # I9
LOOK_AGAIN_S: Final = 0.05
MOST_NOTES: Final = 4  # in a line, the last ones
BETWEEN: Final = 120  # answers, at most, before the next fault
PACE_S: Final = 0.01  # between two keys of a caller
MANY: Final = 20  # rounds; beyond them callers go slower, or they come to the load's bound of keys

Result = TypeVar("Result")


def rounds(small: int = 1, most: int = 100) -> int:
    """FAULTS_N of this case, `small` unless it is set."""
    return min(most, int(os.environ.get("FAULTS_N") or 0) or small)


def draw_seed() -> int:
    return int(os.environ.get("FAULTS_SEED") or os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))


async def off(work: Callable[..., Result], *arguments: object) -> Result:
    """What blocks, in a thread."""
    return await asyncio.to_thread(work, *arguments)


class Rest(msgspec.Struct):
    """How it came to rest."""

    took_s: float = 0.0
    lag_s: float = 0.0
    at_rest: bool = False
    drift_nanos: int = 0  # by the product's own proof
    left: str = ""
    refused: int = 0


class Run:
    """One case on one cluster. `wounds`: a loss of the hot store's tail is part of it, so sums may differ by order."""

    def __init__(self, case: str, cluster: Cluster, seed: int, *, wounds: bool = False) -> None:
        self.case = case
        self.cluster = cluster
        self.seed = seed
        self.random = Random(f"{seed} {case}")  # No two cases of a run have the same customers.
        self.wounds = wounds
        self.customers: list[Customer] = []
        self.load: Load
        self.rounds = 0
        self.rest = Rest()
        self.notes: list[str] = []
        self.again_s = 0.0
        self._quarantined = 0

    async def more(self, most: int = BETWEEN, least: int = 1) -> None:
        """Some more answers."""
        await self.load.more(self.random.randrange(least, most + 1))

    def note(self, text: str) -> None:
        """A figure of this case, for its line."""
        self.notes.append(text)

    async def answers_again(self) -> float:
        """Seconds until somebody is answered. The longest of them is told in the line."""
        began = monotonic()
        await self.load.more(1, ANSWERED_S)
        self.again_s = max(self.again_s, monotonic() - began)
        return monotonic() - began

    async def prepare(self) -> None:
        admin = self.cluster.admin_address()
        await off(put_catalogue, admin)
        self.customers = await off(put_customers, admin, self.random)
        books = await witnesses.read_books(self.cluster.database.dsn, [])
        self._quarantined = books.quarantined

    async def grant(self, customer: Customer, amount: int) -> None:
        """More credit, under one id, asked for until it is answered."""
        grant = ledger_pb2.Grant(id=f"{customer.id}-{self.random.getrandbits(64):x}", customer=customer.id)
        grant.amount_nanos = amount
        async with grpc.aio.insecure_channel(self.cluster.admin_address(), options=CHANNEL) as channel:
            await persist(lambda: LedgerAdminStub(channel).CreateGrant(grant, timeout=30))
        place = next(at for at, known in enumerate(self.customers) if known.id == customer.id)
        known = self.customers[place]
        self.customers[place] = msgspec.structs.replace(
            known, granted=known.granted + amount, most_nanos=known.most_nanos + amount
        )

    async def settled(self, within_s: float = CONVERGE_S) -> float:
        """Seconds until the ledger has what has been answered by now."""
        began = monotonic()
        wanted = {record.key for record in self.load.of(Outcome.OK)}
        names = [customer.id for customer in self.customers]
        while wanted - (await witnesses.read_books(self.cluster.database.dsn, names)).booked.keys():
            assert monotonic() < began + within_s, "the ledger does not come to what was answered"
            await asyncio.sleep(LOOK_AGAIN_S)
        return monotonic() - began

    async def warm(self) -> None:
        """Every customer's account is in the hot store when this returns."""
        await self.load.ask_again([self.load.draw(customer=customer) for customer in self.customers], ANSWER_S)

    async def converge(self, *, strict: bool = True) -> None:
        """Phase B: everything is healed, what nobody knew is asked again, and the journal and the outbox run dry."""
        began = monotonic()
        await off(self.cluster.heal)
        await self.load.ask_again([r for r in self.load.records.values() if r.answer is None], ANSWER_S)
        known = monotonic()
        while not self.rest.at_rest and monotonic() < known + CONVERGE_S:
            try:
                await self._look(strict)
            except grpc.aio.AioRpcError as error:  # It is not well again yet.
                self.rest.left = f"Verify: {error.code().name} {error.details()}"
                self.rest.refused += 1
            await asyncio.sleep(LOOK_AGAIN_S)
        self.rest.took_s = monotonic() - began
        if self.rest.refused:
            self.note(f"Verify failed {self.rest.refused} times before it answered")

    async def _look(self, strict: bool) -> None:
        """Whether all is at rest. Verify is asked last: it waits itself."""
        with self.cluster.primary.client() as hot:
            unsettled = await off(witnesses.unsettled, hot)
        pending = await witnesses.pending(self.cluster.database.dsn)
        self.rest.left = f"journal {unsettled}, outbox and changes {pending}"
        if unsettled or (pending and strict):
            return
        report = await self.verified()
        self.rest.drift_nanos = report.drift_nanos
        self.rest.left += f", {report.drifted} drifted, journal lag {report.journal_lag}"
        self.rest.at_rest = not strict or not (report.drifted or report.journal_lag or report.outbox_pending)

    async def verified(self) -> ledger_pb2.VerifyReport:
        """The product's own proof."""
        async with grpc.aio.insecure_channel(self.cluster.admin_address(), options=CHANNEL) as channel:
            return await LedgerAdminStub(channel).Verify(ledger_pb2.VerifyRequest(), timeout=60)

    async def audit(self) -> Audit:
        names = [customer.id for customer in self.customers]
        books = await witnesses.read_books(self.cluster.database.dsn, names)
        with self.cluster.primary.client() as hot:
            accounts = {name: witnesses.account(hot, name) for name in names}
        auditor = Auditor(self.load.records, self.customers)
        auditor.count()
        auditor.audit.again_s = self.again_s
        auditor.surprises(self.load.surprises)
        auditor.books(books)
        auditor.prices(exact=not self.wounds)
        auditor.limits(exact=not self.wounds)
        auditor.hot(books, accounts)
        auditor.events(books, await off(witnesses.read_events, self.cluster.events, names))
        auditor.rest("quarantine", self._quarantined, books.quarantined)
        auditor.rest("at rest", "yes", "yes" if self.rest.at_rest else self.rest.left)
        await self._alive(auditor)
        return auditor.audit

    async def _alive(self, auditor: Auditor) -> None:
        """I9: both say SERVING, and a charge is in the ledger within a second again."""
        for address in (*self.cluster.addresses, self.cluster.admin_address()):
            auditor.rest(f"health of {address.rpartition('/')[2]}", "SERVING", await healthy(address))
        deadline = monotonic() + CONVERGE_S
        self.rest.lag_s = await self._lag()
        while self.rest.lag_s > LAG_S and monotonic() < deadline:
            self.rest.lag_s = await self._lag()
        auditor.rest("lag", f"at most {LAG_S} s", f"at most {LAG_S} s" if self.rest.lag_s <= LAG_S else self.rest.lag_s)

    async def _lag(self) -> float:
        """Seconds from an answer to its entry."""
        record = self.load.draw(customer=self.customers[0])
        await self.load.ask_again([record], ANSWER_S)
        began = monotonic()
        while record.amount and monotonic() < began + CONVERGE_S:
            books = await witnesses.read_books(self.cluster.database.dsn, [record.customer])
            if record.key in books.booked:
                break
            await asyncio.sleep(LOOK_AGAIN_S / 5)
        return monotonic() - began

    def line(self, audit: Audit) -> str:
        again = f"answering again after {self.again_s:.1f} s at most, " if self.again_s else ""
        notes = "".join(f", {note}" for note in self.notes[-MOST_NOTES:])
        return (
            f"faults {self.case}: seed {self.seed}, rounds {self.rounds}, {audit.figures()}, "
            f"{again}at rest after {self.rest.took_s:.1f} s, lag {self.rest.lag_s * 1000:.0f} ms{notes} "
            f"(again: make faults N={self.rounds} CASE={self.case.partition('-')[0]} SEED={self.seed})"
        )


async def play(
    case: str,
    cluster: Cluster,
    fault: Callable[[Run], Awaitable[None]],
    *,
    n: int = 1,
    strict: bool = True,
    wounds: bool = False,
    callers: int = 16,
    pace_s: float = PACE_S,
    insist_s: float = INSIST_S,
) -> Audit:
    """Plays a case: `fault`, `n` times, while the load flows; then phase B and the audit, whose line is printed.

    `strict`: every invariant must hold, or the run fails with what was found and the children's last lines.
    """
    if n > MANY:
        pace_s *= 3
    run = Run(case, cluster, draw_seed(), wounds=wounds)
    print(f"faults {case}: seed {run.seed}")
    try:
        await run.prepare()
        async with stubs(cluster.addresses) as gateways:
            run.load = Load(gateways, run.customers, run.random, callers=callers, pace_s=pace_s, insist_s=insist_s)
            async with flowing(run.load):
                for run.rounds in range(1, n + 1):
                    await fault(run)
            await run.converge(strict=strict)
            audit = await run.audit()
    except BaseException:
        print(cluster.report())
        raise
    print(run.line(audit))
    if strict and audit.findings:
        pytest.fail(f"{run.line(audit)}\n{audit.shown()}\n{cluster.report()}", pytrace=False)
    cluster.clean = not audit.findings
    return audit


async def healthy(address: str) -> str:
    """What it says of itself: at the latest after the time in which it has to be well again."""
    deadline = monotonic() + CONVERGE_S
    while (said := await health(address)) != "SERVING" and monotonic() < deadline:  # noqa: ASYNC110  It is elsewhere.
        await asyncio.sleep(LOOK_AGAIN_S)
    return said


async def health(address: str) -> str:
    async with grpc.aio.insecure_channel(address, options=CHANNEL) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
