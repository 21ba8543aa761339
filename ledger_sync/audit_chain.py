"""The audit log as a chain of hashes: a line that was changed, taken out or moved since it was sealed is found.

    hash = SHA-256(the hash before it, of the same tenant || the line)
    the line = [id, at in µs since 1970, tenant, actor, action, subject, outcome, detail, source], compact JSON in UTF-8

The first line's hash before it is 32 zero bytes. Whoever may write to the tables as a superuser can build the whole
chain anew: against that, keep a head of it elsewhere.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import groupby
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ledger_sync.ledger import Connection, Ledger, Row

FIRST: Final = bytes(32)
ROUND: Final = 1_000  # lines sealed in one transaction

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

# One at a time; whoever comes second finds nothing left to do.
_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtext('audit_seals'))"

_WAITING: Final = """
SELECT a.* FROM audit_unsealed u JOIN audit a ON a.id = u.audit_id ORDER BY a.tenant, a.id LIMIT $1"""

_HEAD: Final = "SELECT no, hash FROM audit_seals WHERE tenant = $1 ORDER BY no DESC LIMIT 1"

_SEAL: Final = """
INSERT INTO audit_seals (tenant, no, audit_id, hash)
SELECT $1, $2 + place, audit_id, hash
FROM unnest($3::bigint[], $4::bytea[]) WITH ORDINALITY AS s (audit_id, hash, place)"""


class Head(msgspec.Struct, frozen=True):
    """Where a tenant's chain ends."""

    no: int = 0
    hash: bytes = FIRST


def line_of(row: Row) -> bytes:
    """What is sealed of a line of the audit log."""
    at_us = (row["at"] - _EPOCH) // _MICROSECOND
    texts = (row[name] for name in ("tenant", "actor", "action", "subject", "outcome", "detail", "source"))
    return msgspec.json.encode([row["id"], at_us, *texts])


def seal_of(before: bytes, row: Row) -> bytes:
    return sha256(before + line_of(row)).digest()


class AuditSealer:
    """A chore: seals what has been committed since, in the order of the lines' ids as far as they are there."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def tend(self, now_ms: int) -> bool:
        """Whether there may be more."""
        async with self._ledger.transaction() as connection:
            await connection.execute(_LOCK)
            rows = await connection.fetch(_WAITING, ROUND)
            for tenant, lines in groupby(rows, key=lambda row: str(row["tenant"])):
                await _seal(connection, tenant, lines)
        return len(rows) == ROUND


async def head_of(connection: Connection, tenant: str) -> Head:
    row = await connection.fetchrow(_HEAD, tenant)
    return Head(*row) if row else Head()


async def _seal(connection: Connection, tenant: str, lines: Iterable[Row]) -> None:
    head = await head_of(connection, tenant)
    before, sealed, hashes = head.hash, [], []
    for row in lines:
        before = seal_of(before, row)
        sealed.append(row["id"])
        hashes.append(before)
    await connection.execute(_SEAL, tenant, head.no, sealed, hashes)
    await connection.execute("DELETE FROM audit_unsealed WHERE audit_id = ANY($1::bigint[])", sealed)
