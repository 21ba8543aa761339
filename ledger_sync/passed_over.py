"""Where a record in quarantine belongs in its account's journal, and what of it the ledger and the hot account have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.journal import CODEC, KINDS, UNKNOWN_CODEC, Adjusted, Consumed, Ended, Held, Record, Rolled
from ledger_sync import hot_deltas, quarantine, verify_reads
from ledger_sync.books import Who
from ledger_sync.hold_books import moved
from ledger_sync.hot_deltas import Change
from ledger_sync.posting import Posted, Reason, changes, close_key, delta_key
from ledger_sync.quarantine import Kept

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

_UNRESOLVED: Final = "SELECT id FROM quarantine WHERE resolved_at IS NULL ORDER BY id"

_READABLE: Final = """
SELECT id FROM quarantine
WHERE resolved_at IS NULL AND starts_with(reason, $1) AND get_byte(record, 0) = $2
      AND get_byte(record, 1) = ANY($3::integer[]) ORDER BY id LIMIT $4"""

_KEPT: Final = """
SELECT id, stream, entry_id, reason, record, created_at FROM quarantine
WHERE resolved_at IS NULL AND id = ANY($1::bigint[]) ORDER BY id"""

_KEPT_FOR_UPDATE: Final = """
SELECT id, stream, entry_id, reason, record, created_at FROM quarantine
WHERE resolved_at IS NULL AND id = ANY($1::bigint[]) ORDER BY id FOR UPDATE"""

_ACCOUNTS: Final = """
SELECT a.tenant, a.customer FROM accounts a
     JOIN unnest($1::text[], $2::text[]) AS w (tenant, customer) USING (tenant, customer)
ORDER BY a.tenant, a.customer FOR UPDATE OF a"""

_NEVER_HOT: Final = """
SELECT a.tenant, a.customer FROM accounts a
     JOIN unnest($1::text[], $2::text[]) AS w (tenant, customer) USING (tenant, customer) WHERE a.epoch = 0"""

_PLACE: Final = """
SELECT epoch, sequence, period_start, gaps FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE"""

_REPAIRED: Final = """
SELECT EXISTS (SELECT 1 FROM transactions WHERE tenant = $1 AND customer = $2 AND kind = 'adjust'
               AND starts_with(idempotency_key, 'repair:') AND recorded_at >= $3)"""

_EVENT: Final = """
SELECT customer, epoch, sequence, fingerprint FROM usage_events WHERE tenant = $1 AND idempotency_key = $2"""

# The place of a record whose reader could not tell whose it is was not passed: the next one has shown a gap.
_UNREAD: Final = (Reason.UNDECODABLE, Reason.BAD_REQUEST)


class Place(msgspec.Struct, frozen=True):
    """How far the ledger has settled an account."""

    epoch: int
    sequence: int
    period_start: int
    gaps: int

    def paid(self, record: Record) -> bool:
        """Whether it was written by the hot account as it was installed last, which therefore has done what it says."""
        return record.epoch == self.epoch

    def is_next(self, record: Record) -> bool:
        return self.paid(record) and record.sequence == self.sequence + 1

    def refuses(self, record: Record) -> str:
        """Why it cannot be settled now; '' when it can."""
        if self.epoch == 0:
            return "its account has not been installed in the hot store by this ledger yet"
        if record.epoch > self.epoch:
            return f"its epoch {record.epoch} is ahead of the ledger's {self.epoch}"
        if record.epoch == self.epoch and record.sequence > self.sequence + 1:
            return f"its turn comes after record {record.sequence - 1}; the ledger has come to {self.sequence}"
        return ""


async def unresolved(connection: Connection) -> list[int]:
    return [row["id"] for row in await connection.fetch(_UNRESOLVED)]


async def readable(connection: Connection, most: int) -> list[int]:
    """Those that were kept because their codec or kind was not known, and that this program knows."""
    rows = await connection.fetch(_READABLE, f"{Reason.UNDECODABLE}: {UNKNOWN_CODEC}", CODEC, list(KINDS), most)
    return [row["id"] for row in rows]


async def kept(connection: Connection, ids: Sequence[int]) -> list[Kept]:
    """Those of `ids` that are unresolved."""
    return [quarantine.kept(row) for row in await connection.fetch(_KEPT, list(ids))]


async def lock(connection: Connection, ids: Sequence[int]) -> list[Kept]:
    """As `kept`, for changing: the records are locked, then their accounts, in the order in which everyone locks."""
    found = [quarantine.kept(row) for row in await connection.fetch(_KEPT_FOR_UPDATE, list(ids))]
    names = sorted({who for item in found if (who := quarantine.who_of(item.arrival.data))})
    await connection.fetch(_ACCOUNTS, [tenant for tenant, _ in names], [customer for _, customer in names])
    return found


async def never_hot(connection: Connection, names: Sequence[Who]) -> list[Who]:
    """Of these accounts, those that have never been installed."""
    rows = await connection.fetch(_NEVER_HOT, [tenant for tenant, _ in names], [customer for _, customer in names])
    return [(row["tenant"], row["customer"]) for row in rows]


async def place(connection: Connection, tenant: str, customer: str) -> Place | None:
    row = await connection.fetchrow(_PLACE, tenant, customer)
    return Place(*row) if row else None


async def forgotten(connection: Connection, place: Place, item: Kept, record: Record) -> bool:
    """Whether the hot account became what the ledger says, without this record, although its epoch may not show it: by
    a repair since the record was kept; or because the account was unknown then, and has been installed since. (Had the
    hot store kept an account that the ledger had lost, its next record would have shown a gap.)
    """
    if place.epoch == 0 or record.epoch < place.epoch:
        return False
    if item.word == Reason.UNKNOWN_ACCOUNT:
        return place.gaps == 0 or record.epoch > place.epoch
    repaired: bool = await connection.fetchval(_REPAIRED, record.tenant, record.customer, item.created_at)
    return repaired and record.epoch == place.epoch and record.sequence <= place.sequence


async def charged_by_another(connection: Connection, posted: Posted) -> bytes | None:
    """The fingerprint of what was charged for the key, if that was another decision than this one."""
    row = await connection.fetchrow(_EVENT, posted.record.tenant, posted.key)
    if row is None or _is_of(row["customer"], row["epoch"], row["sequence"], posted.record):
        return None
    fingerprint: bytes = row["fingerprint"]
    return fingerprint


async def is_booked(connection: Connection, record: Record) -> bool:
    """Whether the ledger has it: it may have come again after it was kept, and been taken."""
    if isinstance(record, Consumed):
        row = await connection.fetchrow(_EVENT, record.tenant, quarantine.request_of(record).idempotency_key)
        return row is not None and _is_of(row["customer"], row["epoch"], row["sequence"], record)
    if isinstance(record, Held | Ended):
        known: bool = await connection.fetchval(
            "SELECT EXISTS (SELECT 1 FROM hold_moves WHERE (tenant, customer, epoch, sequence) = ($1, $2, $3, $4))",
            *(record.tenant, record.customer, record.epoch, record.sequence),
        )
        return known
    key = delta_key(record) if isinstance(record, Adjusted) else close_key(record)
    found: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM transactions WHERE tenant = $1 AND idempotency_key = $2 AND kind <> 'consume')",
        *(record.tenant, key),
    )
    return found


def _is_of(customer: str, epoch: int, sequence: int, record: Record) -> bool:
    return (customer, epoch, sequence) == (record.customer, record.epoch, record.sequence)


def undone(record: Record, period_start: int) -> Change | None:
    """What takes back from the hot account what the record says it has done; None: no change can."""
    if moved(record):
        return None
    if isinstance(record, Consumed):
        return hot_deltas.compensation(record, period_start, quarantine.request_of(record).subject)
    assert isinstance(record, Rolled | Adjusted), "the others change holds"
    burns = (*record.removed, *record.reclassed, *record.repaid) if isinstance(record, Adjusted) else ()
    grants: dict[int, int] = {}
    overage = 0
    for booking in changes(record, {burn.grant: "" for burn in burns}):
        for account, grant, amount in booking.entries:
            if grant is not None:
                grants[grant] = grants.get(grant, 0) - amount
            elif account.startswith("overage:"):
                overage += amount
    return Change(grants=tuple(sorted(grants.items())), overage=overage)


async def knows_grants(connection: Connection, record: Record, change: Change) -> bool:
    """Whether the ledger has every grant that the change moves: no change can name another one."""
    if not change.grants:
        return True
    known = await verify_reads.grants_of(connection, record.tenant, record.customer)
    return known.issuperset(no for no, _ in change.grants)


async def pass_by(connection: Connection, place: Place, record: Record) -> None:
    """The account's position moves past a record that stands right before it."""
    if place.is_next(record):
        await connection.execute(
            "UPDATE accounts SET sequence = $3 WHERE tenant = $1 AND customer = $2",
            *(record.tenant, record.customer, record.sequence),
        )


async def close_gap(connection: Connection, place: Place, item: Kept, record: Record) -> None:
    """A gap that was counted because nobody could read this record is none any more: here it is."""
    if item.word in _UNREAD and place.paid(record) and record.sequence <= place.sequence:
        await connection.execute(
            "UPDATE accounts SET gaps = gaps - 1 WHERE tenant = $1 AND customer = $2 AND gaps > 0",
            *(record.tenant, record.customer),
        )


async def resolve(connection: Connection, item: Kept, resolution: str) -> None:
    await connection.execute(
        "UPDATE quarantine SET resolved_at = clock_timestamp(), resolution = $2 WHERE id = $1", item.id, resolution
    )


async def set_reason(connection: Connection, item: Kept) -> None:
    await connection.execute("UPDATE quarantine SET reason = $2 WHERE id = $1", item.id, item.reason)
