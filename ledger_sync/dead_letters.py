"""Webhooks that were given up: looked at by whoever asks, and sent anew when someone says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from entitlement.errors import InvalidArgument
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes
from ledger_sync.refusals import NotFound
from ledger_sync.translate import Page, page_token

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_IDS: Final = 1_000  # named in one call

_RETRY: Final = """
UPDATE webhook_deliveries SET attempts = 0, next_at = clock_timestamp(), failed_at = NULL
WHERE tenant = $1 AND failed_at IS NOT NULL AND ($2::bigint[] IS NULL OR id = ANY($2))
RETURNING id"""


class DeadLetterStore:
    """The dead letters of one tenant."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def list(self, page: Page) -> pb.ListDeadLettersResponse:
        """In the order in which their events happened; of one customer when the page names it."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT id, event_id, type, customer, attempts, error, failed_at FROM webhook_deliveries
                   WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND failed_at IS NOT NULL AND id > $3
                   ORDER BY id LIMIT $4""",
                *(self._tenant, page.customer, page.after[0] if page.after else 0, page.size + 1),
            )
        response = pb.ListDeadLettersResponse(dead_letters=map(_message, rows[: page.size]))
        if len(rows) > page.size:
            response.next_page_token = page_token(response.dead_letters[-1].id)
        return response

    async def retry(self, request: pb.RetryDeadLettersRequest, actor: str) -> pb.RetryDeadLettersResponse:
        """Makes these dead letters (all, when none is named) due at once, on the schedule's first step, in one
        transaction. NotFound: one of them is no dead letter.
        """
        if len(request.ids) > MAX_IDS:
            raise InvalidArgument("ids", f"has {len(request.ids)} ids; expected at most {MAX_IDS} (none: all)")
        async with self._ledger.transaction() as connection:
            retried = await self._revive(connection, request.ids)
            if retried:
                named = " ".join(map(str, request.ids)) or "all"
                await changes.audit(
                    connection, self._tenant, actor, "RetryDeadLetters", "webhooks", f"retried={retried} ids={named}"
                )
        return pb.RetryDeadLettersResponse(retried=retried)

    async def _revive(self, connection: Connection, ids: Sequence[int]) -> int:
        rows = await connection.fetch(_RETRY, self._tenant, list(ids) or None)
        found = {row["id"] for row in rows}
        for index, number in enumerate(ids):
            if number not in found:
                raise NotFound(f"ids[{index}]", f"there is no dead letter {number}")
        return len(rows)


def _message(row: Row) -> pb.DeadLetter:
    letter = pb.DeadLetter(
        id=row["id"],
        event_id=row["event_id"],
        type=row["type"],
        customer=row["customer"],
        attempts=row["attempts"],
        error=row["error"],
    )
    letter.failed_at.FromDatetime(row["failed_at"])
    return letter
