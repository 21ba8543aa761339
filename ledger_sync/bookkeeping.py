"""Writes a settlement: reads what the ledger knows, under the locks of the accounts concerned, then copies the new rows
and moves the projections, one statement each. All in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from entitlement.journal import OVERAGE, Adjusted, Consumed, Rolled
from entitlement.periods import HOUR
from ledger_sync import books, hot_deltas, quarantine, resumed
from ledger_sync.announcements import queue_webhooks
from ledger_sync.books import Position, Who
from ledger_sync.hold_books import HoldName, HoldRow, Moved, State, moved, name_of
from ledger_sync.posting import Expired, Posted, close_key, delta_key
from ledger_sync.rated import RATED
from ledger_sync.settlement import Earlier, Known, Outcome, Settlement, merged

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

MAX_GRANTS_REMEMBERED: Final = 200_000
AHEAD_MS: Final = HOUR  # the ledger's clock, by which grants are booked as expired, may be ahead of the hot store's

# Plans are made while tables are small and kept when they are large: they shall go by the index from the start.
_PLAN: Final = "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"

_LOCK: Final = """
SELECT a.tenant, a.customer, a.credit_type, a.epoch, a.sequence, a.applied, a.overage, a.period_start, a.period_end,
       a.allowance, a.crossed, a.crossings, a.gaps, a.held
FROM accounts a JOIN unnest($1::text[], $2::text[]) AS w (tenant, customer) USING (tenant, customer)
ORDER BY a.tenant, a.customer FOR UPDATE OF a"""

_EVENTS: Final = """
SELECT idempotency_key, customer, epoch, sequence, fingerprint FROM usage_events
WHERE tenant = $1 AND idempotency_key = ANY($2::text[])"""

_TRANSACTIONS: Final = """
SELECT idempotency_key, kind FROM transactions
WHERE tenant = $1 AND idempotency_key = ANY($2::text[]) AND kind <> 'consume'"""

_GRANTS: Final = "SELECT no, tenant, customer, id, expires_ms FROM grants WHERE no = ANY($1::bigint[])"

_EXPIRED: Final = """
SELECT grant_no, remaining, broken FROM grant_balances WHERE grant_no = ANY($1::bigint[]) AND broken > 0"""

_IDS: Final = "SELECT ARRAY(SELECT nextval('transactions_id_seq') FROM generate_series(1, $1))"

_POSITIONS: Final = """
UPDATE accounts a
SET epoch = n.epoch, sequence = n.sequence, applied = greatest(a.applied, n.applied), overage = n.overage,
    period_start = n.period_start, period_end = n.period_end, allowance = n.allowance, crossed = n.crossed,
    crossings = n.crossings, gaps = n.gaps, held = n.held
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[],
            $9::bigint[], $10::text[], $11::integer[], $12::integer[], $13::bigint[])
    AS n (tenant, customer, epoch, sequence, applied, overage, period_start, period_end, allowance, crossed, crossings,
          gaps, held)
WHERE a.tenant = n.tenant AND a.customer = n.customer"""

_REMAINING: Final = """
UPDATE grant_balances b SET remaining = b.remaining + n.nanos
FROM unnest($1::bigint[], $2::bigint[]) AS n (no, nanos) WHERE b.grant_no = n.no"""

_BROKEN: Final = """
UPDATE grant_balances b SET broken = b.broken + n.nanos
FROM unnest($1::bigint[], $2::bigint[]) AS n (no, nanos) WHERE b.grant_no = n.no"""

_SETTLED: Final = """
INSERT INTO account_periods AS p (tenant, customer, period_start, settled)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
ON CONFLICT (tenant, customer, period_start) DO UPDATE SET settled = p.settled + excluded.settled"""

_HOLDS: Final = """
SELECT h.tenant, h.customer, h.id, h.state, h.amount, h.remaining, h.expires_ms, h.changed_ms, h.epoch,
       h.sequence
FROM holds h JOIN unnest($1::text[], $2::text[], $3::text[]) AS n (tenant, customer, id) USING (tenant, customer, id)"""

_MOVES: Final = """
SELECT m.tenant, m.customer, m.epoch, m.sequence
FROM hold_moves m
     JOIN unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) AS n (tenant, customer, epoch, sequence)
     USING (tenant, customer, epoch, sequence)"""

_STANDING: Final = """
INSERT INTO holds AS h (tenant, customer, id, state, amount, remaining, expires_ms, changed_ms, epoch, sequence)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::smallint[], $5::bigint[], $6::bigint[], $7::bigint[],
                     $8::bigint[], $9::bigint[], $10::bigint[])
ON CONFLICT (tenant, customer, id) DO UPDATE
SET state = excluded.state, amount = excluded.amount, remaining = excluded.remaining, expires_ms = excluded.expires_ms,
    changed_ms = excluded.changed_ms, epoch = excluded.epoch, sequence = excluded.sequence"""

_UNITS: Final = """
INSERT INTO meters AS m (tenant, customer, period_start, meter, quantity, amount)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::bigint[])
ON CONFLICT (tenant, customer, period_start, meter)
DO UPDATE SET quantity = m.quantity + excluded.quantity, amount = m.amount + excluded.amount"""

_CONFIRMED: Final = """
DELETE FROM hot_deltas d USING unnest($1::text[], $2::text[], $3::bigint[]) AS n (tenant, customer, version)
WHERE d.tenant = n.tenant AND d.customer = n.customer AND d.version <= n.version"""


class Bookkeeper:
    """Books batches. Remembers the names of grants, which never change."""

    def __init__(self) -> None:
        self._grants: dict[int, tuple[Who, str]] = {}
        self._expiring: dict[int, int] = {}  # when, of those that do

    async def book(self, connection: Connection, batch: Sequence[Posted], refused: str = "") -> Outcome:
        """Settles a batch in the caller's transaction. `refused`: see Settlement.settle."""
        known = await self._known(connection, batch)
        ids: list[int] = await connection.fetchval(_IDS, _most_bookings(batch))
        settlement = Settlement(known, iter(ids))
        settlement.settle(batch, refused)
        await _write_rows(connection, settlement.books)
        await _move(connection, settlement)
        await quarantine.keep(connection, settlement.outcome.rejected)
        await quarantine.audit_mismatches(connection, batch, settlement.outcome.rejected)
        for (tenant, customer), changes in sorted(settlement.compensations.items()):
            for change in merged(changes):
                await hot_deltas.decide(connection, tenant, customer, change)
        return settlement.outcome

    async def _known(self, connection: Connection, batch: Sequence[Posted]) -> Known:
        await connection.execute(_PLAN)
        who = sorted({(posted.record.tenant, posted.record.customer) for posted in batch})
        rows = await connection.fetch(_LOCK, [tenant for tenant, _ in who], [customer for _, customer in who])
        positions = {(row[0], row[1]): Position(*row) for row in rows}
        # Only now: a statement after the lock sees everything that was committed under it before.
        return Known(
            positions,
            await _events(connection, batch),
            await _transactions(connection, batch),
            await self._names(connection, batch),
            await self._expired(connection, batch),
            await resumed.read(connection, [p.record for p in batch if isinstance(p.record, Rolled)]),
            *await _holds(connection, [change for p in batch if (change := moved(p.record))]),
        )

    async def _expired(self, connection: Connection, batch: Sequence[Posted]) -> dict[int, Expired]:
        """Of the grants that a batch names: those which have been booked to breakage. Few batches name one."""
        now_ms = max([posted.record.recorded_ms for posted in batch]) + AHEAD_MS
        if not any(at_ms <= now_ms for at_ms in self._expiring.values()):
            return {}
        named = [no for no in _grants_of(batch) if self._expiring.get(no, now_ms + 1) <= now_ms]
        rows = await connection.fetch(_EXPIRED, named) if named else []
        return {row["grant_no"]: Expired(row["remaining"], row["broken"]) for row in rows}

    async def _names(self, connection: Connection, batch: Sequence[Posted]) -> dict[int, tuple[Who, str]]:
        named = _grants_of(batch)
        missing = [no for no in named if no not in self._grants]
        if missing:
            if len(self._grants) + len(missing) > MAX_GRANTS_REMEMBERED:
                self._grants = {no: self._grants[no] for no in named if no in self._grants}
                self._expiring = {no: at for no, at in self._expiring.items() if no in self._grants}
            for no, tenant, customer, grant, expires_ms in await connection.fetch(_GRANTS, missing):
                self._grants[no] = ((tenant, customer), grant)
                if expires_ms:
                    self._expiring[no] = expires_ms
        return {no: self._grants[no] for no in named if no in self._grants}


def _grants_of(batch: Sequence[Posted]) -> set[int]:
    """The numbers of all grants that the records name."""
    named: set[int] = set()
    for posted in batch:
        record = posted.record
        if isinstance(record, Consumed):
            for line in record.lines:
                for burn in line.burns:
                    named.add(burn.grant)
        elif isinstance(record, Adjusted):
            named.update(burn.grant for burn in (*record.removed, *record.reclassed, *record.repaid))
    named.discard(OVERAGE)
    return named


def _most_bookings(batch: Sequence[Posted]) -> int:
    return sum(3 if isinstance(posted.record, Adjusted) else 1 for posted in batch)


async def _events(connection: Connection, batch: Sequence[Posted]) -> dict[tuple[str, str], Earlier]:
    keys: dict[str, list[str]] = {}
    for posted in batch:
        if posted.key:
            keys.setdefault(posted.record.tenant, []).append(posted.key)
    return {
        (tenant, row[0]): Earlier(row[1], row[2], row[3], row[4])
        for tenant, named in keys.items()
        for row in await connection.fetch(_EVENTS, tenant, named)
    }


async def _transactions(connection: Connection, batch: Sequence[Posted]) -> set[tuple[str, str, str]]:
    """What the ledger has of the transactions that rolls and changes would make; they are rare."""
    keys: dict[str, list[str]] = {}
    for posted in batch:
        record = posted.record
        if isinstance(record, Rolled):
            keys.setdefault(record.tenant, []).append(close_key(record))
        elif isinstance(record, Adjusted):
            keys.setdefault(record.tenant, []).append(delta_key(record))
    return {
        (tenant, row[0], row[1])
        for tenant, named in keys.items()
        for row in await connection.fetch(_TRANSACTIONS, tenant, named)
    }


async def _holds(
    connection: Connection, moves: Sequence[Moved]
) -> tuple[dict[HoldName, HoldRow], set[tuple[str, str, int, int]]]:
    """How the holds that a batch names stand, and which of its records are known."""
    if not moves:
        return {}, set()
    names = sorted({name_of(record) for record in moves})
    rows = await connection.fetch(_HOLDS, *_columns(names))
    places = sorted({(record.tenant, record.customer, record.epoch, record.sequence) for record in moves})
    known = await connection.fetch(_MOVES, *_columns(places))
    return {(row[0], row[1], row[2]): HoldRow(State(row[3]), *row[4:]) for row in rows}, {tuple(row) for row in known}


async def _write_rows(connection: Connection, rows: books.Books) -> None:
    for table, columns, records in (
        ("usage_events", books.EVENTS, rows.events),
        ("transactions", books.TRANSACTIONS, rows.transactions),
        ("entries", books.ENTRIES, rows.entries),
        ("outbox", books.OUTBOX, rows.outbox),
        ("ended_periods", books.ENDED, rows.ended),
        ("hold_moves", books.MOVES, rows.moves),
    ):
        if records:
            await connection.copy_records_to_table(table, records=records, columns=columns)
    if any(row[3] != RATED for row in rows.outbox):
        await queue_webhooks(connection, rows.outbox)  # type: ignore[arg-type]


async def _move(connection: Connection, settlement: Settlement) -> None:
    rows = settlement.books
    if rows.remaining:
        await connection.execute(_REMAINING, *_columns(sorted(rows.remaining.items())))
    if rows.broken:
        await connection.execute(_BROKEN, *_columns(sorted(rows.broken.items())))
    if rows.settled:
        await connection.execute(_SETTLED, *_columns((*key, nanos) for key, nanos in sorted(rows.settled.items())))
    if rows.holds:
        await connection.execute(_STANDING, *_columns(_standing(rows.holds)))
    if rows.units:
        await connection.execute(_UNITS, *_columns((*key, *both) for key, both in sorted(rows.units.items())))
    if settlement.confirmed:
        await connection.execute(
            _CONFIRMED, *_columns((*who, version) for who, version in sorted(settlement.confirmed.items()))
        )
    if settlement.touched:
        await connection.execute(_POSITIONS, *_columns(map(_row, settlement.touched)))


def _standing(holds: Mapping[HoldName, HoldRow]) -> list[tuple[object, ...]]:
    return [
        (*name, int(row.state), row.amount, row.remaining, row.expires_ms, row.changed_ms, row.epoch, row.sequence)
        for name, row in sorted(holds.items())
    ]


def _row(p: Position) -> tuple[object, ...]:
    return (
        *(p.tenant, p.customer, p.epoch, p.sequence, p.applied, p.overage, p.period_start, p.period_end, p.allowance),
        *(p.crossed, p.crossings, p.gaps, p.held),
    )


def _columns(rows: Iterable[Sequence[object]]) -> list[tuple[object, ...]]:
    return list(zip(*rows, strict=True))
