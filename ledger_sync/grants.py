"""Grants in the ledger: creating one books it, voiding one takes what is left of it to breakage. A grant that recurs is
a rule that issues them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from entitlement.errors import InvalidArgument
from entitlement.grants import Category
from entitlement.identity import check_id
from entitlement.periods import Recurrence
from entitlement.quantity import MAX_NANOS, within
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import allotments, changes, hot_deltas
from ledger_sync.allotments import Recurring
from ledger_sync.changes import Locked
from ledger_sync.issuing import RESERVED, NewGrant, issue, taken, write_off
from ledger_sync.refusals import NotFound
from ledger_sync.translate import (
    Page,
    check_features,
    check_known,
    check_text,
    page_token,
    recurrence,
    to_ms,
    to_timestamp,
)

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_GRANT_FEATURES: Final = 64
MAX_RECURRING_ID: Final = 100  # characters: the ids of its allotments are longer

_ISSUED: Final = re.compile(r"/\d{8}T\d{6}(\.\d{3})?Z(\+\d*)?\Z", re.ASCII)  # how the ids of allotments end

_COLUMNS: Final = """g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms,
    g.created_ms, g.features, g.voided_ms, g.swept, g.note, g.source, b.remaining,
    b.broken"""


class GrantStore:
    """Every change is one transaction, under the lock on the account's row."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def create(self, message: pb.Grant, actor: str) -> pb.Grant:
        """Books a grant, or puts a recurring one in force, once: the same content again gives the same grant, other
        content AlreadyExists.

        Category PAID when left out, of a recurring one ALLOTMENT; effective_at now; expires_at never.
        """
        check_grant(message)
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, self._tenant, message.customer)
            if earlier := await self._earlier(connection, message):
                return earlier
            named = [(f"features[{index}]", feature) for index, feature in enumerate(message.features)]
            await changes.check_features(connection, self._tenant, named)
            if message.id.startswith(RESERVED):
                await self._check_requested(connection, message)
            if message.recurrence > pb.NEVER:
                await allotments.begin(connection, account, _recurring(message, account.now_ms))
            else:
                await issue(connection, account, _new_grant(message, account.now_ms))
            created = await self._stored(connection, message.id)
            assert created is not None, "it has just been written"
            category = pb.Grant.Category.Name(created.category)
            detail = f"grant={message.id} amount_nanos={message.amount_nanos} category={category}"
            await changes.audit(connection, self._tenant, actor, "CreateGrant", message.customer, detail)
        return created

    async def _earlier(self, connection: Connection, message: pb.Grant) -> pb.Grant | None:
        """A repeated id is compared, not just recognised."""
        stored = await self._stored(connection, message.id)
        if stored is None:
            return None
        if not _same(message, stored, await self._created_ms(connection, message.id)):
            raise taken(message.id)
        return stored

    async def _check_requested(self, connection: Connection, message: pb.Grant) -> None:
        """An id that the ledger gives is accepted from outside as the answer to a top-up that asked for it."""
        amount = await connection.fetchval(
            "SELECT amount FROM top_ups WHERE tenant = $1 AND customer = $2 AND grant_id = $3",
            *(self._tenant, message.customer, message.id),
        )
        if amount is None:
            raise InvalidArgument("id", f"{message.id[:40]!r} begins with {RESERVED!r}, which is the ledger's own")
        if message.recurrence > pb.NEVER:
            raise InvalidArgument("recurrence", "the top-up asked for one grant")
        if amount != message.amount_nanos:
            raise InvalidArgument("amount_nanos", f"is {message.amount_nanos}; the top-up asked for {amount}")

    async def _stored(self, connection: Connection, grant: str) -> pb.Grant | None:
        if row := await self._row(connection, grant):
            return _message(row)
        found = await allotments.read(connection, self._tenant, grant)
        return _recurring_message(found) if found else None

    async def _created_ms(self, connection: Connection, grant: str) -> int:
        created: int = await connection.fetchval(
            """SELECT created_ms FROM grants WHERE tenant = $1 AND id = $2
               UNION ALL SELECT created_ms FROM recurring_grants WHERE tenant = $1 AND id = $2""",
            *(self._tenant, grant),
        )
        return created

    async def void(self, request: pb.VoidGrantRequest, actor: str) -> pb.Grant:
        """Ends a grant: nothing burns it any more, and what is left goes to breakage. Of a recurring one nothing is
        issued any more, and what it has issued ends too. Voiding twice changes nothing.

        What a hot account has left of it is known when the change arrives there; the ledger books it then.
        """
        check_id("id", request.id)
        check_text("reason", request.reason)
        async with self._ledger.transaction() as connection:
            customer = await connection.fetchval(
                """SELECT customer FROM grants WHERE tenant = $1 AND id = $2
                   UNION ALL SELECT customer FROM recurring_grants WHERE tenant = $1 AND id = $2 AND contract = ''""",
                *(self._tenant, request.id),
            )
            if customer is None:
                raise NotFound("id", f"there is no grant {request.id!r}")
            account = await changes.lock(connection, self._tenant, customer)
            if await self._end(connection, account, request.id):
                detail = f"grant={request.id} reason={request.reason}"
                await changes.audit(connection, self._tenant, actor, "VoidGrant", customer, detail)
            stored = await self._stored(connection, request.id)
        assert stored is not None, "grants are never deleted"
        return stored

    async def _end(self, connection: Connection, account: Locked, grant: str) -> bool:
        """Whether there was something to end."""
        row = await self._row(connection, grant)
        if row is None:
            found = await allotments.read(connection, self._tenant, grant)
            if found is None or found.voided_ms:
                return False
            await allotments.end(connection, account, grant, void=True)
            return True
        if row["voided_ms"]:
            return False
        await connection.execute("UPDATE grants SET voided_ms = $2 WHERE no = $1", row["no"], account.now_ms)
        await hot_deltas.decide(connection, self._tenant, account.customer)
        if account.epoch == 0:
            await write_off(connection, account, [row["no"]])
        return True

    async def list(self, page: Page) -> pb.ListGrantsResponse:
        """In the order they were created, each with what is left of it."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                f"""SELECT {_COLUMNS} FROM grants g JOIN grant_balances b ON b.grant_no = g.no
                    WHERE g.tenant = $1 AND ($2 = '' OR g.customer = $2) AND g.no > $3 ORDER BY g.no LIMIT $4""",  # noqa: S608
                *(self._tenant, page.customer, page.after[0] if page.after else 0, page.size + 1),
            )
        response = pb.ListGrantsResponse(grants=[_message(row) for row in rows[: page.size]])
        if len(rows) > page.size:
            response.next_page_token = page_token(rows[page.size - 1]["no"])
        return response

    async def list_recurring(self, page: Page) -> pb.ListGrantsResponse:
        """What issues allotments, by id; of one customer when the page names it."""
        async with self._ledger.transaction(readonly=True) as connection:
            after = str(page.after[0]) if page.after else ""
            found = await allotments.listed(connection, self._tenant, page.customer, after, page.size + 1)
        response = pb.ListGrantsResponse(grants=[_recurring_message(item) for item in found[: page.size]])
        if len(found) > page.size:
            response.next_page_token = page_token(found[page.size - 1].id)
        return response

    async def _row(self, connection: Connection, grant: str) -> Row | None:
        return await connection.fetchrow(
            f"""SELECT {_COLUMNS} FROM grants g JOIN grant_balances b ON b.grant_no = g.no
                WHERE g.tenant = $1 AND g.id = $2""",  # noqa: S608
            *(self._tenant, grant),
        )


def check_grant(message: pb.Grant) -> None:
    """Everything about a grant that can be checked without the ledger."""
    check_id("id", message.id)
    check_id("customer", message.customer)
    if _ISSUED.search(message.id):
        raise InvalidArgument("id", f"{message.id[:40]!r} reads like an allotment's, which the ledger gives")
    within("amount_nanos", message.amount_nanos, 1, MAX_NANOS)
    check_known("category", message.category, (0, *map(int, Category)))
    check_features("features", message.features, MAX_GRANT_FEATURES)
    check_text("note", message.note)
    recurrence("recurrence", message.recurrence, Recurrence.NEVER)
    within("rollover_max_nanos", message.rollover_max_nanos, 0, MAX_NANOS)
    if message.recurrence > pb.NEVER:
        if len(message.id) > MAX_RECURRING_ID:
            raise InvalidArgument(
                "id", f"of a recurring grant has {len(message.id)} characters; expected at most {MAX_RECURRING_ID}"
            )
    elif message.rollover_max_nanos:
        raise InvalidArgument("rollover_max_nanos", "is for recurring grants: nothing follows one that does not recur")
    for field, is_set in (
        ("remaining_nanos", message.remaining_nanos),
        ("source", message.source),
        ("voided_at", message.HasField("voided_at")),
    ):
        if is_set:
            raise InvalidArgument(field, "is set by the server; leave the field out")


def _times(message: pb.Grant, now_ms: int) -> tuple[int, int]:
    effective_ms = to_ms("effective_at", message.effective_at) if message.HasField("effective_at") else now_ms
    expires_ms = to_ms("expires_at", message.expires_at) if message.HasField("expires_at") else 0
    if 0 < expires_ms <= effective_ms:
        raise InvalidArgument("expires_at", "is not later than effective_at")
    return effective_ms, expires_ms


def _new_grant(message: pb.Grant, now_ms: int) -> NewGrant:
    effective_ms, expires_ms = _times(message, now_ms)
    return NewGrant(
        id=message.id,
        amount=message.amount_nanos,
        category=Category(message.category or Category.PAID),
        effective_ms=effective_ms,
        priority=message.priority,
        expires_ms=expires_ms,
        features=tuple(sorted(message.features)),
        note=message.note,
    )


def _recurring(message: pb.Grant, now_ms: int) -> Recurring:
    effective_ms, expires_ms = _times(message, now_ms)
    if 0 < expires_ms <= now_ms:
        raise InvalidArgument("expires_at", "is over: a recurring grant would issue nothing")
    return Recurring(
        id=message.id,
        customer=message.customer,
        amount=message.amount_nanos,
        category=Category(message.category or Category.ALLOTMENT),
        recurrence=Recurrence(message.recurrence),
        anchor_ms=effective_ms,
        priority=message.priority,
        features=tuple(sorted(message.features)),
        rollover_max=message.rollover_max_nanos,
        ends_ms=expires_ms,
        note=message.note,
    )


def _same(asked: pb.Grant, stored: pb.Grant, created_ms: int) -> bool:
    """A time that was left out may be what the server chose then."""
    usual = Category.ALLOTMENT if asked.recurrence > pb.NEVER else Category.PAID
    full = pb.Grant()
    full.CopyFrom(asked)
    full.category = int(asked.category or usual)  # type: ignore[assignment]
    full.recurrence = asked.recurrence or pb.NEVER
    full.features[:] = sorted(asked.features)
    effective_ms, expires_ms = _times(asked, created_ms)
    full.effective_at.CopyFrom(to_timestamp(effective_ms))
    if expires_ms:
        full.expires_at.CopyFrom(to_timestamp(expires_ms))
    known = pb.Grant()
    known.CopyFrom(stored)
    for field in ("remaining_nanos", "source", "voided_at"):
        known.ClearField(field)
    return full == known


def _message(row: Row) -> pb.Grant:
    grant = hot_deltas.grant_of(row)
    return pb.Grant(
        id=grant.id,
        customer=grant.customer,
        amount_nanos=grant.amount,
        category=int(grant.category),  # type: ignore[arg-type]
        priority=grant.priority,
        effective_at=to_timestamp(grant.effective_ms),
        expires_at=to_timestamp(grant.expires_ms) if grant.expires_ms else None,
        features=grant.features,
        recurrence=pb.NEVER,
        remaining_nanos=0 if grant.voided_ms else row["remaining"] - row["broken"],
        note=row["note"],
        source=row["source"],
        voided_at=to_timestamp(grant.voided_ms) if grant.voided_ms else None,
    )


def _recurring_message(found: Recurring) -> pb.Grant:
    return pb.Grant(
        id=found.id,
        customer=found.customer,
        amount_nanos=found.amount,
        category=int(found.category),  # type: ignore[arg-type]
        priority=found.priority,
        effective_at=to_timestamp(found.anchor_ms),
        expires_at=to_timestamp(found.ends_ms) if found.ends_ms else None,
        features=found.features,
        recurrence=int(found.recurrence),  # type: ignore[arg-type]
        rollover_max_nanos=found.rollover_max,
        note=found.note,
        voided_at=to_timestamp(found.voided_ms) if found.voided_ms else None,
    )
