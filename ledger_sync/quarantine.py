"""Keeps what cannot be booked, whole and with its reason: a bad record is never lost and never stalls others.

What is kept is read as far as it can be. (What becomes of it is decided in ledger_sync.redrive.)
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

import msgspec
from google.protobuf.message import DecodeError

from entitlement.errors import CorruptRecord
from entitlement.identity import is_id
from entitlement.journal import Consumed, decode
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.gateway_pb2 import CheckAndConsumeRequest
from ledger_sync.posting import Arrival, Posted, Reason, Rejected, asked

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row

MAX_REASON: Final = 500  # characters
NAMES_AT: Final = 34  # of 'tenant customer' in a record (entitlement.journal): after two bytes and four doubles
MAX_NAMES: Final = 300  # bytes in which they end, or there are none

_INSERT: Final = """
INSERT INTO quarantine (stream, entry_id, reason, record)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[]) ON CONFLICT (stream, entry_id) DO NOTHING
RETURNING stream, entry_id"""

_MISMATCH: Final = """
INSERT INTO audit (tenant, actor, action, subject, outcome, detail)
VALUES ($1, 'journal', 'consume', $2, 'IDEMPOTENCY_MISMATCH', $3)"""

# $1 '': of everybody.
_PAGE: Final = """
SELECT id, stream, entry_id, reason, record, created_at FROM quarantine
WHERE resolved_at IS NULL AND id > $1 AND ($2::bytea = '' OR substr(record, 35, octet_length($2)) = $2)
ORDER BY id LIMIT $3"""

_COUNT: Final = """
SELECT count(*) FROM quarantine
WHERE resolved_at IS NULL AND ($1::bytea = '' OR substr(record, 35, octet_length($1)) = $1)"""


class Kept(msgspec.Struct, frozen=True):
    """A record in quarantine that nothing has become of yet."""

    id: int
    arrival: Arrival
    reason: str
    created_at: datetime

    @property
    def word(self) -> str:
        """The Reason that it was kept for."""
        return self.reason.partition(":")[0]


async def keep(connection: Connection, rejected: Sequence[Rejected]) -> list[Rejected]:
    """Once each, however often they come; those that had not come before. In the caller's transaction."""
    if not rejected:
        return []
    rows = await connection.fetch(
        _INSERT,
        [item.arrival.stream for item in rejected],
        [item.arrival.entry_id.decode() for item in rejected],
        [plain(f"{item.reason}: {item.detail}") for item in rejected],
        [item.arrival.data for item in rejected],
    )
    fresh = {(row["stream"], row["entry_id"].encode()) for row in rows}
    return [item for item in rejected if (item.arrival.stream, item.arrival.entry_id) in fresh]


async def audit_mismatches(connection: Connection, batch: Sequence[Posted], rejected: Sequence[Rejected]) -> None:
    """One audit line for each key that came again with another payload."""
    mismatched = {item.arrival: item for item in rejected if item.reason is Reason.KEY_MISMATCH}
    if not mismatched:
        return
    for posted in batch:
        if found := mismatched.get(posted.arrival):
            await connection.execute(_MISMATCH, posted.record.tenant, posted.record.customer, plain(found.detail))


async def page(connection: Connection, tenant: str, customer: str, after: int, size: int) -> list[Kept]:
    """What is unresolved, by id; of all ('') what nobody can read, too."""
    rows = await connection.fetch(_PAGE, after, _names(tenant, customer), size)
    return [kept(row) for row in rows]


async def count(connection: Connection, tenant: str, customer: str) -> int:
    """How many are unresolved; of all ('') also those of which nobody can read whose they are."""
    found: int = await connection.fetchval(_COUNT, _names(tenant, customer))
    return found


def kept(row: Row) -> Kept:
    arrival = Arrival(row["stream"], row["entry_id"].encode(), row["record"])
    return Kept(row["id"], arrival, row["reason"], row["created_at"])


def who_of(data: bytes) -> tuple[str, str] | None:
    """Tenant and customer, if they can be read; the rest of the record need not be readable."""
    names, end, _ = data[NAMES_AT : NAMES_AT + MAX_NAMES].partition(b"\0")
    tenant, _, customer = names.decode("ascii", "replace").partition(" ")
    return (tenant, customer) if end and is_id(tenant) and is_id(customer) else None


def message(item: Kept) -> pb.QuarantinedRecord:
    """As much as can be read of it."""
    data = item.arrival.data
    names = who_of(data)
    found = pb.QuarantinedRecord(
        id=item.id,
        stream=item.arrival.stream,
        entry_id=item.arrival.entry_id.decode(),
        reason=item.reason,
        customer=names[1] if names else "",
    )
    found.created_at.FromDatetime(item.created_at)
    try:
        record = decode(data)
    except CorruptRecord:
        return found
    if isinstance(record, Consumed):
        found.amount_nanos = max(-MAX_NANOS, min(sum(line.amount for line in record.lines), MAX_NANOS))
        found.idempotency_key = request_of(record).idempotency_key
    return found


def request_of(record: Consumed) -> CheckAndConsumeRequest:
    """The request that a consumption answers; empty, if it cannot be read."""
    try:
        request = asked(record)
    except DecodeError:
        return CheckAndConsumeRequest()
    return request if is_id(request.idempotency_key) else CheckAndConsumeRequest()


def plain(text: str) -> str:
    """What any text may hold that the database's may not is written as an escape."""
    return text[:MAX_REASON].replace("\0", "\\0").encode("ascii", "backslashreplace").decode()


def _names(tenant: str, customer: str) -> bytes:
    """What stands in each record of a customer; nothing for all."""
    return f"{tenant} {customer}\0".encode() if customer else b""
