"""What Verify reads of the ledger: where accounts stand, and their projections as of a hot account's place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Account
from entitlement.journal import Consumed, decode
from ledger_sync import hot_deltas
from ledger_sync.drift import Books, Place

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row


class Mark(msgspec.Struct, frozen=True):
    """The ledger just before hot accounts are read. What is booked later has a transaction id above `last_id`."""

    last_id: int
    places: dict[str, Place]
    deltas: dict[str, dict[int, hot_deltas.Delta]]  # not confirmed, by customer and version


_LAST_ID: Final = "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('transactions', 'id')::regclass), 0)"

_PLACES: Final = """
SELECT customer, epoch, sequence, applied FROM accounts WHERE tenant = $1 AND customer = ANY($2::text[])"""

_DELTAS: Final = "SELECT customer, body FROM hot_deltas WHERE tenant = $1 AND customer = ANY($2::text[])"

_ACCOUNTS: Final = """
SELECT customer, epoch, sequence, applied, overage, held FROM accounts
WHERE tenant = $1 AND customer = ANY($2::text[])"""

_GRANTS: Final = """
SELECT g.customer, g.no, b.remaining FROM grants g JOIN grant_balances b ON b.grant_no = g.no
WHERE g.tenant = $1 AND g.customer = ANY($2::text[]) AND b.remaining <> 0"""

_SETTLED: Final = """
SELECT customer, p.settled FROM account_periods p
     JOIN unnest($2::text[], $3::bigint[]) AS w (customer, period_start) USING (customer, period_start)
WHERE p.tenant = $1"""

_METERS: Final = """
SELECT customer, m.meter, m.quantity FROM meters m
     JOIN unnest($2::text[], $3::bigint[]) AS w (customer, period_start) USING (customer, period_start)
WHERE m.tenant = $1"""

# Decided in the ledger (sequence 0): late when the hot account's version is lower.
_LATE_ENTRIES: Final = """
SELECT t.customer, t.sequence, t.version, e.account, e.grant_no, e.amount
FROM transactions t JOIN entries e ON e.transaction_id = t.id
     JOIN unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[]) AS w (customer, sequence, version, epoch)
     ON w.customer = t.customer
WHERE t.tenant = $1 AND t.id > $6
      AND (t.sequence > w.sequence AND t.epoch >= w.epoch OR t.sequence = 0 AND t.version > w.version)"""

# Of earlier installs none is late: what of them is settled after the install comes with a ledger change.
_LATE_EVENTS: Final = """
SELECT u.customer, u.period_start, u.amount, u.record
FROM usage_events u JOIN unnest($2::text[], $3::bigint[], $4::bigint[]) AS w (customer, sequence, epoch)
     ON w.customer = u.customer
WHERE u.tenant = $1 AND u.sequence > w.sequence AND u.epoch >= w.epoch"""


_LATE_MOVES: Final = """
SELECT m.customer, sum(m.amount)::bigint AS amount
FROM hold_moves m JOIN unnest($2::text[], $3::bigint[], $4::bigint[]) AS w (customer, sequence, epoch)
     ON w.customer = m.customer
WHERE m.tenant = $1 AND m.sequence > w.sequence AND m.epoch >= w.epoch
GROUP BY m.customer"""


async def places(connection: Connection, tenant: str, customers: Sequence[str]) -> dict[str, Place]:
    """How far each account's journal is settled, and which ledger changes the journal has confirmed."""
    rows = await connection.fetch(_PLACES, tenant, list(customers))
    return {row["customer"]: Place(row["epoch"], row["sequence"], row["applied"]) for row in rows}


async def grants_of(connection: Connection, tenant: str, customer: str) -> set[int]:
    """The number of every grant the customer ever had."""
    rows = await connection.fetch("SELECT no FROM grants WHERE tenant = $1 AND customer = $2", tenant, customer)
    return {row["no"] for row in rows}


async def repaired(connection: Connection, tenant: str, customer: str, version: int) -> bool:
    """Whether a repair was decided that a hot account of this version does not show yet."""
    found: bool = await connection.fetchval(
        """SELECT EXISTS (SELECT 1 FROM transactions WHERE tenant = $1 AND customer = $2 AND kind = 'adjust'
                          AND starts_with(idempotency_key, 'repair:') AND version > $3)""",
        *(tenant, customer, version),
    )
    return found


async def mark(connection: Connection, tenant: str, customers: Sequence[str]) -> Mark:
    """Taken before hot accounts are read. The order matters: what is booked after the first line is above the mark."""
    last_id: int = await connection.fetchval(_LAST_ID)
    return Mark(last_id, await places(connection, tenant, customers), await _deltas(connection, tenant, customers))


async def _deltas(
    connection: Connection, tenant: str, customers: Sequence[str]
) -> dict[str, dict[int, hot_deltas.Delta]]:
    found: dict[str, dict[int, hot_deltas.Delta]] = defaultdict(dict)
    for row in await connection.fetch(_DELTAS, tenant, list(customers)):
        delta = hot_deltas.parse(row["body"])
        found[row["customer"]][delta.version] = delta
    return found


async def books(connection: Connection, tenant: str, accounts: Mapping[str, Account], before: Mark) -> dict[str, Books]:
    """The books of each hot account, in a transaction that sees one state of the ledger."""
    names = list(accounts)
    starts = [account.period_start for account in accounts.values()]
    found: dict[str, Books] = {}
    for row in await connection.fetch(_ACCOUNTS, tenant, names):
        place = Place(row["epoch"], row["sequence"], row["applied"])
        found[row["customer"]] = Books(place, row["overage"], row["held"])
    for customer, deltas in (await _deltas(connection, tenant, names)).items():
        found[customer].deltas |= deltas
    for customer in names:
        found[customer].deltas |= before.deltas.get(customer, {})
    for row in await connection.fetch(_GRANTS, tenant, names):
        found[row["customer"]].grants[row["no"]] = row["remaining"]
    for row in await connection.fetch(_SETTLED, tenant, names, starts):
        found[row["customer"]].settled = row["settled"]
    for row in await connection.fetch(_METERS, tenant, names, starts):
        found[row["customer"]].meters[row["meter"]] = row["quantity"]
    await _read_late(connection, tenant, accounts, found, before.last_id)
    return found


async def _read_late(
    connection: Connection, tenant: str, accounts: Mapping[str, Account], found: Mapping[str, Books], last_id: int
) -> None:
    names = list(accounts)
    sequences = [account.sequence for account in accounts.values()]
    versions = [account.version for account in accounts.values()]
    epochs = [account.epoch for account in accounts.values()]
    for row in await connection.fetch(_LATE_ENTRIES, tenant, names, sequences, versions, epochs, last_id):
        _late_entry(found[row["customer"]], row)
    moved = {name: account for name, account in accounts.items() if found[name].place.sequence > account.sequence}
    if not moved:
        return
    since = [account.sequence for account in moved.values()], [account.epoch for account in moved.values()]
    for row in await connection.fetch(_LATE_MOVES, tenant, list(moved), *since):
        found[row["customer"]].late_held = row["amount"]
    events = await connection.fetch(_LATE_EVENTS, tenant, list(moved), *since)
    for row in events:
        if row["period_start"] == moved[row["customer"]].period_start:
            _late_event(found[row["customer"]], row)


def _late_entry(book: Books, row: Row) -> None:
    if row["sequence"] == 0 and row["version"] in book.deltas:
        return  # Its delta, which is known, says the same.
    if row["grant_no"] is not None:
        book.late_grants[row["grant_no"]] = book.late_grants.get(row["grant_no"], 0) + row["amount"]
    elif row["account"].startswith("overage:"):
        book.late_overage -= row["amount"]


def _late_event(book: Books, row: Row) -> None:
    book.late_settled += row["amount"]
    record = decode(row["record"])
    if isinstance(record, Consumed):
        for line in record.lines:
            book.late_meters[line.meter] = book.late_meters.get(line.meter, 0) + line.quantity
