"""Corrections: a usage event is booked anew, by another price or as nothing, and its history is kept.

What was booked is reversed, what is right is rebooked, and the hot account gets the difference: one ledger change for
each customer and cycle. All of a chunk is one transaction under the account's lock. What is given back unwinds the
recorded burn order, not today's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.journal import Consumed, encode
from ledger_sync import changes, hot_deltas
from ledger_sync.changes import Locked
from ledger_sync.posting import (
    BREAKAGE,
    EXPIRED,
    Arrival,
    Entry,
    Expired,
    Posted,
    consume_entries,
    read,
    restored,
    timestamp,
)
from ledger_sync.rated import RATED, rated_event
from ledger_sync.rebooking import Booked, Correction, Cycle, Purse

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

CHUNK: Final = 1_000  # events in one transaction: the account is locked for some hundred milliseconds
LEASE: Final = "corrections"  # of whoever corrects: two at once would count on each other's quantities

# Usage events as they are booked now. $1 tenant, $2 cause: whether an event has been corrected for it.
BOOKED: Final = """
SELECT u.record, u.transaction_id, c.no, c.record AS corrected, c.rebooking, d.no AS done
FROM usage_events u
     LEFT JOIN LATERAL (SELECT no, record, rebooking FROM corrections c
                        WHERE c.tenant = u.tenant AND c.idempotency_key = u.idempotency_key
                        ORDER BY no DESC LIMIT 1) c ON true
     LEFT JOIN corrections d ON d.tenant = u.tenant AND d.cause = $2 AND d.idempotency_key = u.idempotency_key"""

# Plans are made while tables are small and kept when they are large: they shall go by the index from the start.
PLAN: Final = "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"

_CREDITS: Final = """
SELECT g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms, g.created_ms, g.features,
       g.voided_ms, g.swept, b.remaining, b.broken
FROM grants g JOIN grant_balances b ON b.grant_no = g.no WHERE g.tenant = $1 AND g.customer = $2"""

_IDS: Final = "SELECT ARRAY(SELECT nextval('transactions_id_seq') FROM generate_series(1, $1))"

_BALANCES: Final = """
UPDATE grant_balances b SET remaining = b.remaining + n.nanos, broken = b.broken + n.broken
FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS n (no, nanos, broken) WHERE b.grant_no = n.no"""

_SETTLED: Final = """
INSERT INTO account_periods AS p (tenant, customer, period_start, settled)
SELECT $1, $2, * FROM unnest($3::bigint[], $4::bigint[])
ON CONFLICT (tenant, customer, period_start) DO UPDATE SET settled = p.settled + excluded.settled"""

_METERS: Final = """
INSERT INTO meters AS m (tenant, customer, period_start, meter, quantity, amount)
SELECT $1, $2, * FROM unnest($3::bigint[], $4::text[], $5::bigint[], $6::bigint[])
ON CONFLICT (tenant, customer, period_start, meter)
DO UPDATE SET quantity = m.quantity + excluded.quantity, amount = m.amount + excluded.amount"""

_TRANSACTIONS: Final = (
    *("id", "tenant", "customer", "kind", "idempotency_key", "event_time", "recorded_at", "epoch", "sequence"),
    *("version", "reverses"),
)
_ENTRIES: Final = ("transaction_id", "line", "account", "grant_no", "amount", "credit_type")
_CORRECTIONS: Final = (
    *("tenant", "idempotency_key", "no", "customer", "cause", "period_start", "amount", "difference", "record"),
    *("reversal", "rebooking"),
)
_OUTBOX: Final = ("event_id", "tenant", "customer", "type", "body")


def booked(row: Row) -> Booked:
    """A row of `BOOKED`."""
    posted = read(Arrival("", b"", row["record"] if row["no"] is None else row["corrected"]))
    assert isinstance(posted, Posted) and isinstance(posted.record, Consumed), "what was booked can be read"
    transaction = row["transaction_id"] if row["no"] is None else row["rebooking"]
    return Booked(posted, posted.record, row["no"] or 0, transaction, row["done"] is not None)


class Corrector:
    """Books corrections for one cause, customer after customer, chunk by chunk: each is durable once it is booked. The
    caller holds the lease `LEASE`. `flush` in the end.
    """

    def __init__(self, ledger: Ledger, tenant: str, cause: str) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self._cause = cause
        self._chunk: list[Correction] = []

    async def add(self, correction: Correction) -> None:
        if self._chunk and self._chunk[0].booked.record.customer != correction.booked.record.customer:
            await self.flush()
        self._chunk.append(correction)
        if len(self._chunk) >= CHUNK:
            await self.flush()

    async def flush(self) -> None:
        if not self._chunk:
            return
        async with self._ledger.transaction() as connection:
            await connection.execute(PLAN)
            account = await changes.lock(connection, self._tenant, self._chunk[0].booked.record.customer)
            await _correct(connection, account, self._chunk, self._cause)
        self._chunk = []


async def _correct(connection: Connection, account: Locked, chunk: Sequence[Correction], cause: str) -> None:
    """An event that another has corrected meanwhile refuses the chunk: its number is taken."""
    rows = await connection.fetch(_CREDITS, account.tenant, account.customer)
    purse = Purse([(hot_deltas.grant_of(row), row["remaining"]) for row in rows])
    pages = Pages(account, rows, cause)
    records = []
    cycles: dict[int, Cycle] = {}
    for correction in chunk:
        was = correction.booked.record
        at_ms = min(was.event_ms, was.recorded_ms)
        lines = [purse.reburned(*pair, at_ms) for pair in zip(was.lines, correction.lines, strict=True)]
        record = msgspec.structs.replace(was, lines=tuple(lines), rate_version=correction.rate_version)
        cycles.setdefault(was.period_start, Cycle(was.period_start)).add(was, record, correction.booked.posted.subject)
        records.append(record)
    versions = {
        start: await hot_deltas.decide(connection, account.tenant, account.customer, cycle.change())
        for start, cycle in cycles.items()
    }
    ids: list[int] = await connection.fetchval(_IDS, 2 * len(chunk))
    for correction, record in zip(chunk, records, strict=True):
        pages.write(correction.booked, record, versions[record.period_start], ids)
    await _store(connection, pages)
    await _move(connection, account, list(cycles.values()), pages.broken)


class Pages:
    """The rows that a chunk of corrections writes."""

    def __init__(self, account: Locked, credits: Sequence[Row], cause: str) -> None:
        self._account = account
        self._cause = cause
        self._names: dict[int, str] = {row["no"]: row["id"] for row in credits}
        # Expired, and booked as such: what comes back to them is breakage, what is burned of them comes from it.
        self._lapsed = {row["no"] for row in credits if row["swept"] == 1 and not row["voided_ms"]}
        self._expired = {
            row["no"]: Expired(row["remaining"], row["broken"])
            for row in credits
            if row["broken"] or row["no"] in self._lapsed
        }
        self._broken_before = {no: grant.broken for no, grant in self._expired.items()}
        self.transactions: list[tuple[object, ...]] = []
        self.entries: list[tuple[object, ...]] = []
        self.corrections: list[tuple[object, ...]] = []
        self.outbox: list[tuple[object, ...]] = []

    @property
    def broken(self) -> dict[int, int]:
        """By how much of each grant more is breakage now."""
        return {no: grant.broken - self._broken_before[no] for no, grant in self._expired.items()}

    def write(self, booked: Booked, record: Consumed, version: int, ids: list[int]) -> None:
        posted, was, account = booked.posted, booked.record, self._account
        reversal = rebooking = None
        if entries := consume_entries(posted, was, self._names):
            reversal = self._book("reverse", booked, self._returned(entries), version, ids.pop(0))
        if entries := consume_entries(posted, record, self._names):
            entries = restored(entries, self._expired, self._names)
            rebooking = self._book("rebook", booked, entries, version, ids.pop(0))
        amount, before = (sum([line.amount for line in r.lines]) for r in (record, was))
        no = booked.no + 1
        self.corrections.append(
            (
                *(account.tenant, posted.key, no, account.customer, self._cause, was.period_start, amount),
                *(amount - before, encode(record), reversal, rebooking),
            )
        )
        body = rated_event(posted, record, rebooking, self._names, correction=no)
        self.outbox.append((f"{posted.key}#{no}", account.tenant, account.customer, RATED, body))

    def _returned(self, entries: Sequence[Entry]) -> list[Entry]:
        back: list[Entry] = [(name, no, -amount) for name, no, amount in entries]
        extra: list[Entry] = []
        for _, no, amount in back:
            if no is not None and (grant := self._expired.get(no)):
                grant.remaining += amount
                if no in self._lapsed and (rest := grant.remaining - grant.broken) > 0:
                    grant.broken += rest
                    extra += [(f"{EXPIRED}{self._names[no]}", None, -rest), (BREAKAGE, None, rest)]
        return back + extra

    def _book(self, kind: str, booked: Booked, entries: Sequence[Entry], version: int, number: int) -> int:
        account, posted = self._account, booked.posted
        self.transactions.append(
            (
                *(number, account.tenant, account.customer, kind, f"{self._cause}:{posted.key}", posted.event_at),
                *(timestamp(account.now_ms), account.epoch, 0, version),
                booked.transaction if kind == "reverse" else None,
            )
        )
        told = [entry for entry in entries if entry[2]]
        for line, (name, grant, amount) in enumerate(told):
            self.entries.append((number, line, name, grant, amount, booked.record.credit_type))
        return number


async def _store(connection: Connection, pages: Pages) -> None:
    for table, columns, records in (
        ("transactions", _TRANSACTIONS, pages.transactions),
        ("entries", _ENTRIES, pages.entries),
        ("corrections", _CORRECTIONS, pages.corrections),
        ("outbox", _OUTBOX, pages.outbox),
    ):
        if records:
            await connection.copy_records_to_table(table, records=records, columns=columns)


async def _move(connection: Connection, account: Locked, cycles: Sequence[Cycle], broken: dict[int, int]) -> None:
    """The projections."""
    name = account.tenant, account.customer
    moved: dict[int, int] = {}
    for cycle in cycles:
        for no, nanos in cycle.grants.items():
            moved[no] = moved.get(no, 0) + nanos
    touched = sorted(no for no in moved.keys() | broken.keys() if moved.get(no) or broken.get(no))
    await connection.execute(
        _BALANCES, touched, [moved.get(no, 0) for no in touched], [broken.get(no, 0) for no in touched]
    )
    await connection.execute(
        "UPDATE accounts SET overage = overage + $3 WHERE tenant = $1 AND customer = $2",
        *(*name, sum(cycle.overage for cycle in cycles)),
    )
    starts = [cycle.start for cycle in cycles]
    await connection.execute(_SETTLED, *name, starts, [cycle.settled for cycle in cycles])
    meters = [(cycle.start, meter, *both) for cycle in cycles for meter, both in sorted(cycle.meters.items())]
    await connection.execute(_METERS, *name, *zip(*meters, strict=True))
