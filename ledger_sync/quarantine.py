"""Keeps what cannot be booked, whole and with its reason: a bad record is never lost and never stalls others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ledger_sync.posting import Posted, Reason, Rejected

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

MAX_REASON: Final = 500  # characters

_INSERT: Final = """
INSERT INTO quarantine (stream, entry_id, reason, record)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[]) ON CONFLICT (stream, entry_id) DO NOTHING"""

_MISMATCH: Final = """
INSERT INTO audit (tenant, actor, action, subject, outcome, detail)
VALUES ($1, 'journal', 'consume', $2, 'IDEMPOTENCY_MISMATCH', $3)"""


async def keep(connection: Connection, rejected: Sequence[Rejected]) -> None:
    """Once each, however often they come. In the caller's transaction."""
    if rejected:
        await connection.execute(
            _INSERT,
            [item.arrival.stream for item in rejected],
            [item.arrival.entry_id.decode() for item in rejected],
            [_plain(f"{item.reason}: {item.detail}") for item in rejected],
            [item.arrival.data for item in rejected],
        )


async def audit_mismatches(connection: Connection, batch: Sequence[Posted], rejected: Sequence[Rejected]) -> None:
    """One audit line for each key that came again with another payload."""
    mismatched = {item.arrival: item for item in rejected if item.reason is Reason.KEY_MISMATCH}
    if not mismatched:
        return
    for posted in batch:
        if found := mismatched.get(posted.arrival):
            await connection.execute(_MISMATCH, posted.record.tenant, posted.record.customer, _plain(found.detail))


def _plain(text: str) -> str:
    """What any text may hold that the database's may not is written as an escape."""
    return text[:MAX_REASON].replace("\0", "\\0").encode("ascii", "backslashreplace").decode()
