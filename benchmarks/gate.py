"""The correctness gate: a figure counts only if every nano that was granted is accounted for, in the same run."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import asyncpg
import grpc
import msgspec

from benchmarks.model import Measure
from entitlement.v1.ledger_pb2 import VerifyReport, VerifyRequest
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub

LOOK_EVERY_S: Final = 0.05
VERIFY_S: Final = 120.0
_NO_PROXY: Final = (("grpc.enable_http_proxy", 0),)

_EVENTS: Final = "SELECT count(*) AS found FROM usage_events"
# At least as many as events. Counting millions of rows over and over would slow down what is waited for.
_RECORDS: Final = "SELECT COALESCE(sum(sequence), 0)::bigint AS found FROM accounts"

# What each customer was granted, has consumed and has left; what is used beyond the grants would be overspent here.
_CONSERVATION: Final = """
SELECT count(*) FILTER (WHERE granted <> consumed + remaining) AS unequal,
       count(*) FILTER (WHERE overage <> 0 OR remaining < 0) AS overspent,
       count(*) AS customers
FROM (SELECT a.customer, a.overage,
             coalesce((SELECT sum(g.amount) FROM grants g WHERE g.customer = a.customer), 0) AS granted,
             coalesce((SELECT sum(b.remaining) FROM grants g JOIN grant_balances b ON b.grant_no = g.no
                       WHERE g.customer = a.customer), 0) AS remaining,
             coalesce(u.amount, 0) AS consumed
      FROM accounts a
      LEFT JOIN (SELECT customer, sum(amount) AS amount FROM usage_events GROUP BY customer) u
      ON u.customer = a.customer) balances"""


class Tally(msgspec.Struct):
    """What the loads of one stack were told, all together."""

    allowed: int = 0
    amount_nanos: int = 0
    unknown: int = 0  # calls that may have been decided, whatever the caller saw
    replays_checked: int = 0
    replays_unequal: int = 0

    def add(self, measure: Measure, replayed: int = 0) -> None:
        self.allowed += measure.allowed - replayed
        self.amount_nanos += measure.amount_nanos
        self.unknown += measure.unknown
        self.replays_checked += measure.replays_checked
        self.replays_unequal += measure.replays_unequal


class Books(msgspec.Struct, frozen=True):
    """What the ledger says once it has settled everything."""

    events: int
    total_nanos: int
    drifted: int
    drift_nanos: int
    unbalanced: int
    lag: int
    quarantined: int
    gaps: int
    customers: int
    unequal: int  # customers for whom granted is not consumed + remaining
    overspent: int


def judge(tally: Tally, books: Books) -> list[str]:
    """Everything that is wrong; empty: the figures count."""
    problems = []
    for name in ("drifted", "drift_nanos", "unbalanced", "lag", "quarantined", "gaps", "unequal", "overspent"):
        if found := getattr(books, name):
            problems.append(f"{name} {found}")
    if not tally.allowed <= books.events <= tally.allowed + tally.unknown:
        unknown = f" (and {tally.unknown} unknown)" if tally.unknown else ""
        problems.append(f"{tally.allowed} decisions were allowed{unknown}, {books.events} are in the ledger")
    if not tally.unknown and books.total_nanos != tally.amount_nanos:
        problems.append(f"{tally.amount_nanos} nanos were charged, {books.total_nanos} are in the ledger")
    if tally.replays_unequal:
        problems.append(f"{tally.replays_unequal} of {tally.replays_checked} replays were not equal")
    return problems


def read_books(admin: str, dsn: str, expected: int, timeout_s: float) -> Books:
    """Waits until the ledger has `expected` events and its proof shows no lag, or the time is over; then reads."""
    deadline = time.monotonic() + timeout_s
    catch_up(dsn, expected, timeout_s)
    with grpc.insecure_channel(admin, options=_NO_PROXY) as channel:
        stub = LedgerAdminStub(channel)
        report = _verify(stub)
        while (report.journal_lag or report.events < expected) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            report = _verify(stub)
    row = query(dsn, _CONSERVATION)[0]
    return Books(
        events=report.events,
        total_nanos=report.total_nanos,
        drifted=report.drifted,
        drift_nanos=report.drift_nanos,
        unbalanced=report.unbalanced_transactions,
        lag=report.journal_lag,
        quarantined=report.quarantined,
        gaps=report.sequence_gaps,
        customers=row["customers"],
        unequal=row["unequal"],
        overspent=row["overspent"],
    )


def _verify(stub: LedgerAdminStub) -> VerifyReport:
    return stub.Verify(VerifyRequest(), timeout=VERIFY_S)


def catch_up(dsn: str, expected: int, timeout_s: float) -> None:
    """Returns when the ledger has `expected` events, or when the time is over: the gate will tell what is missing."""
    deadline = time.monotonic() + timeout_s
    for sql in (_RECORDS, _EVENTS):
        while query(dsn, sql)[0]["found"] < expected and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)


def query(dsn: str, sql: str, *arguments: object) -> list[asyncpg.Record]:
    """The rows of one statement, on a connection of its own."""

    async def ask() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            return await connection.fetch(sql, *arguments, timeout=VERIFY_S)
        finally:
            await connection.close()

    return asyncio.run(ask())
