"""The audit log, for whoever asks: its lines, and whether they are what was sealed (ledger_sync/audit_chain.py)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from entitlement.errors import InvalidArgument
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import audit_chain
from ledger_sync.posting import timestamp
from ledger_sync.translate import Page, page_token

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

PREFETCH: Final = 1_000
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)

_LIST: Final = """
SELECT a.*, s.hash FROM audit a LEFT JOIN audit_seals s ON s.audit_id = a.id
WHERE a.tenant = $1 AND a.id > $2 AND a.at >= $3 AND ($4::timestamptz IS NULL OR a.at < $4) ORDER BY a.id LIMIT $5"""

_CHAIN: Final = """
SELECT s.no, s.audit_id, s.hash, a.* FROM audit_seals s LEFT JOIN audit a ON a.id = s.audit_id AND a.tenant = s.tenant
WHERE s.tenant = $1 ORDER BY s.no"""

# A line that nobody seals was put in behind the trigger's back; one that waits for its seal and is gone, taken out.
_UNSEALED: Final = """
SELECT count(*) FROM audit a
WHERE a.tenant = $1 AND NOT EXISTS (SELECT 1 FROM audit_seals s WHERE s.audit_id = a.id)"""

_GONE: Final = """
SELECT u.audit_id FROM audit_unsealed u
WHERE u.tenant = $1 AND NOT EXISTS (SELECT 1 FROM audit a WHERE a.id = u.audit_id) ORDER BY u.audit_id"""


class AuditLog:
    """Reads only."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def list(self, page: Page) -> pb.ListAuditResponse:
        """By id; `from` and `to` go by when a line was written."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                _LIST,
                *(self._tenant, page.after[0] if page.after else 0, timestamp(page.from_ms)),
                *(timestamp(page.until_ms) if page.until_ms else None, page.size + 1),
            )
        response = pb.ListAuditResponse(lines=map(_message, rows[: page.size]))
        if len(rows) > page.size:
            response.next_page_token = page_token(response.lines[-1].id)
        return response

    async def verify(self, request: pb.VerifyAuditRequest) -> pb.AuditReport:
        """The whole chain, computed anew from the lines, at one moment."""
        if request.expect_head and not _HASH.fullmatch(request.expect_head):
            raise InvalidArgument("expect_head", "is not a hash: 64 hexadecimal digits in lower case")
        chain = _Chain(request.expect_head)
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            async for row in connection.cursor(_CHAIN, self._tenant, prefetch=PREFETCH):
                chain.add(row)
            for row in await connection.fetch(_GONE, self._tenant):
                chain.breaks(row["audit_id"], "is gone, and was not sealed yet")
            return chain.report(await self._unsealed(connection))

    async def _unsealed(self, connection: Connection) -> int:
        count: int = await connection.fetchval(_UNSEALED, self._tenant)
        return count


class _Chain:
    """Each line is held against the seal before it as it is stored, so that one that is wrong is one."""

    def __init__(self, expected: str) -> None:
        self._expected = expected
        self._found = expected in ("", audit_chain.FIRST.hex())
        self._head = audit_chain.Head()
        self._report = pb.AuditReport()

    def add(self, row: Row) -> None:
        before, self._head = self._head, audit_chain.Head(row["no"], row["hash"])
        self._report.sealed += 1
        if row["no"] != before.no + 1:
            self.breaks(row["audit_id"], "does not follow the one before: seals between them are gone")
        elif row["id"] is None:
            self.breaks(row["audit_id"], "is gone")
        elif audit_chain.seal_of(before.hash, row) != row["hash"]:
            self.breaks(row["audit_id"], "is not what was sealed, or not where")
        self._found = self._found or row["hash"].hex() == self._expected

    def breaks(self, line: int, problem: str) -> None:
        self._report.broken += 1
        if self._report.broken == 1:
            self._report.first_broken = line
            self._report.problem = f"line {line} {problem}"

    def report(self, unsealed: int) -> pb.AuditReport:
        self._report.unsealed = unsealed
        self._report.head = self._head.hash.hex()
        self._report.head_missing = not self._found
        return self._report


def _message(row: Row) -> pb.AuditLine:
    line = pb.AuditLine(
        id=row["id"],
        actor=row["actor"],
        action=row["action"],
        subject=row["subject"],
        outcome=row["outcome"],
        detail=row["detail"],
        source=row["source"],
        hash=row["hash"].hex() if row["hash"] else "",
    )
    line.at.FromDatetime(row["at"])
    return line
