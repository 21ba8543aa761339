"""Grants in the ledger: creating one books it, voiding one takes what is left of it to breakage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from entitlement.account import MAX_GRANTS
from entitlement.errors import InvalidArgument
from entitlement.grants import Category, Grant
from entitlement.identity import check_id
from entitlement.quantity import MAX_NANOS, within
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, hot_deltas
from ledger_sync.changes import Entry, Locked, Transaction
from ledger_sync.refusals import AlreadyExists, FailedPrecondition, NotFound
from ledger_sync.translate import (
    Page,
    check_features,
    check_known,
    check_text,
    page_token,
    to_ms,
    to_timestamp,
    unsupported,
)

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_GRANT_FEATURES: Final = 64

_COLUMNS: Final = """g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms,
    g.created_ms, g.features, g.voided_ms, g.note, b.remaining"""


class GrantStore:
    """Every change is one transaction, under the lock on the account's row."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def create(self, message: pb.Grant, actor: str) -> pb.Grant:
        """Books a grant, once: the same content again gives the same grant, other content AlreadyExists.

        Category PAID when left out; effective_at now; expires_at never.
        """
        check_grant(message)
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, self._tenant, message.customer)
            row = await self._row(connection, message.id)
            if row:
                _refuse_other(row, message)
                return _message(row)
            named = [(f"features[{index}]", feature) for index, feature in enumerate(message.features)]
            await changes.check_features(connection, self._tenant, named)
            await self._check_room(connection, account, message.amount_nanos)
            grant = await self._insert(connection, message, account.now_ms)
            version = await hot_deltas.decide(
                connection, self._tenant, grant.customer, hot_deltas.Change(new=(grant.no,))
            )
            await self._book(
                connection, account, version, "grant", grant, grant.amount, f"issued:{grant.category.name.lower()}"
            )
            detail = f"grant={grant.id} amount_nanos={grant.amount} category={grant.category.name}"
            await changes.audit(connection, self._tenant, actor, "CreateGrant", grant.customer, detail)
        return _message_of(grant, grant.amount)

    async def void(self, request: pb.VoidGrantRequest, actor: str) -> pb.Grant:
        """Ends a grant: nothing burns it any more, and what is left goes to breakage. Voiding twice changes nothing.

        What a hot account has left of it is known when the change arrives there; the ledger books it then.
        """
        check_id("id", request.id)
        check_text("reason", request.reason)
        async with self._ledger.transaction() as connection:
            customer = await connection.fetchval(
                "SELECT customer FROM grants WHERE tenant = $1 AND id = $2", self._tenant, request.id
            )
            if customer is None:
                raise NotFound("id", f"there is no grant {request.id!r}")
            account = await changes.lock(connection, self._tenant, customer)
            row = await self._row(connection, request.id)
            assert row is not None, "grants are never deleted"
            if not row["voided_ms"]:
                await connection.execute("UPDATE grants SET voided_ms = $2 WHERE no = $1", row["no"], account.now_ms)
                version = await hot_deltas.decide(connection, self._tenant, customer)
                if account.epoch == 0 and row["remaining"]:  # It was never hot: the ledger's figure is exact.
                    grant = hot_deltas.grant_of(row)
                    await self._book(connection, account, version, "void", grant, -row["remaining"], "breakage")
                detail = f"grant={request.id} reason={request.reason}"
                await changes.audit(connection, self._tenant, actor, "VoidGrant", customer, detail)
            row = await self._row(connection, request.id)
            assert row is not None, "grants are never deleted"
        return _message(row)

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

    async def _row(self, connection: Connection, grant: str) -> Row | None:
        return await connection.fetchrow(
            f"""SELECT {_COLUMNS} FROM grants g JOIN grant_balances b ON b.grant_no = g.no
                WHERE g.tenant = $1 AND g.id = $2""",  # noqa: S608
            *(self._tenant, grant),
        )

    async def _check_room(self, connection: Connection, account: Locked, amount: int) -> None:
        """The account's total stays an int64, and its grants a number that one decision can look at."""
        row = await connection.fetchrow(
            """SELECT count(*) AS count, coalesce(sum(b.remaining), 0)::text AS total
               FROM grants g JOIN grant_balances b ON b.grant_no = g.no
               WHERE g.tenant = $1 AND g.customer = $2 AND g.voided_ms = 0 AND b.remaining > 0""",
            *(self._tenant, account.customer),
        )
        assert row is not None
        if row["count"] >= MAX_GRANTS:
            raise FailedPrecondition(
                "customer", f"has {row['count']} grants with something left; expected at most {MAX_GRANTS}"
            )
        room = MAX_NANOS - int(row["total"]) - account.config.credit_line
        if amount > room:
            raise InvalidArgument(
                "amount_nanos", f"{amount} would bring the account's total over {MAX_NANOS}; {room} is left"
            )

    async def _insert(self, connection: Connection, message: pb.Grant, now_ms: int) -> Grant:
        effective_ms = to_ms("effective_at", message.effective_at) if message.HasField("effective_at") else now_ms
        expires_ms = to_ms("expires_at", message.expires_at) if message.HasField("expires_at") else 0
        if 0 < expires_ms <= effective_ms:
            raise InvalidArgument("expires_at", "is not later than effective_at")
        category = Category(message.category or Category.PAID)
        features = tuple(sorted(message.features))
        no: int | None = await connection.fetchval(
            """INSERT INTO grants (tenant, id, customer, amount, category, priority, effective_ms, expires_ms, features,
                                   note, created_ms)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
               ON CONFLICT (tenant, id) DO NOTHING RETURNING no""",
            *(self._tenant, message.id, message.customer, message.amount_nanos, int(category), message.priority),
            *(effective_ms, expires_ms, features, message.note, now_ms),
        )
        if no is None:
            raise _taken(message.id)  # By another customer's grant, just now.
        await connection.execute(
            "INSERT INTO grant_balances (grant_no, remaining) VALUES ($1, $2)", no, message.amount_nanos
        )
        return Grant(
            *(no, message.id, message.customer, message.amount_nanos, category, message.priority),
            *(effective_ms, expires_ms, now_ms, features, 0, message.note),
        )

    async def _book(
        self, connection: Connection, account: Locked, version: int, kind: str, grant: Grant, amount: int, against: str
    ) -> None:
        entries = (Entry(f"grant:{grant.id}", amount, grant.no), Entry(against, -amount))
        transaction = Transaction(
            tenant=self._tenant,
            customer=grant.customer,
            kind=kind,
            key=grant.id,
            credit_type=account.config.credit_type,
            version=version,
            entries=entries,
            event_ms=grant.effective_ms if kind == "grant" else 0,
        )
        await changes.book(connection, transaction)
        if kind == "void":
            await connection.execute(
                "UPDATE grant_balances SET remaining = remaining + $2 WHERE grant_no = $1", grant.no, amount
            )


def check_grant(message: pb.Grant) -> None:
    """Everything about a grant that can be checked without the ledger."""
    check_id("id", message.id)
    check_id("customer", message.customer)
    within("amount_nanos", message.amount_nanos, 1, MAX_NANOS)
    check_known("category", message.category, (0, *map(int, Category)))
    check_features("features", message.features, MAX_GRANT_FEATURES)
    check_text("note", message.note)
    if message.recurrence > pb.NEVER:
        raise unsupported("recurrence", "a recurring grant")
    check_known("recurrence", message.recurrence, (pb.RECURRENCE_UNSPECIFIED, pb.NEVER))
    if message.rollover_max_nanos:
        raise unsupported("rollover_max_nanos", "rollover")
    if message.remaining_nanos:
        raise InvalidArgument("remaining_nanos", "is set by the server; leave the field out")


def _refuse_other(row: Row, message: pb.Grant) -> None:
    """A repeated id is compared, not just recognised. A time that was left out may be what the server chose then."""
    effective_ms = (
        to_ms("effective_at", message.effective_at) if message.HasField("effective_at") else row["created_ms"]
    )
    expires_ms = to_ms("expires_at", message.expires_at) if message.HasField("expires_at") else 0
    asked = (
        *(message.customer, message.amount_nanos, message.category or int(Category.PAID), message.priority),
        *(effective_ms, expires_ms, sorted(message.features), message.note),
    )
    stored = (
        *(row["customer"], row["amount"], row["category"], row["priority"]),
        *(row["effective_ms"], row["expires_ms"], list(row["features"]), row["note"]),
    )
    if asked != stored:
        raise _taken(message.id)


def _taken(grant: str) -> AlreadyExists:
    return AlreadyExists("id", f"{grant!r} is a grant with other content; nothing was changed")


def _message(row: Row) -> pb.Grant:
    return _message_of(hot_deltas.grant_of(row), 0 if row["voided_ms"] else row["remaining"], row["note"])


def _message_of(grant: Grant, remaining: int, note: str = "") -> pb.Grant:
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
        remaining_nanos=remaining,
        note=grant.note or note,
    )
