"""Puts a grant into the ledger: its row, its balance, the change for the hot account and the transaction that books it.

All in the caller's transaction, under the lock on the account's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import MAX_GRANTS
from entitlement.errors import InvalidArgument
from entitlement.grants import Category, Grant
from entitlement.periods import period
from entitlement.quantity import MAX_NANOS
from ledger_sync import changes, hot_deltas
from ledger_sync.changes import Entry, Locked, Transaction
from ledger_sync.posting import BREAKAGE, EXPIRED
from ledger_sync.refusals import AlreadyExists, FailedPrecondition

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

RESERVED: Final = "="  # how the ids begin that the ledger gives


class NewGrant(msgspec.Struct, frozen=True, kw_only=True):
    """A grant to be. `source`: the recurring grant that issues it."""

    id: str
    amount: int
    category: Category
    effective_ms: int
    priority: int = 0
    expires_ms: int = 0
    features: tuple[str, ...] = ()
    note: str = ""
    source: str = ""


async def issue(connection: Connection, account: Locked, new: NewGrant) -> Grant:
    """Credit that comes from outside, booked against 'issued:<category>'. AlreadyExists: another grant has the id."""
    await check_room(connection, account, new.amount)
    grant = await _insert(connection, account, new)
    version = await hot_deltas.decide(connection, account.tenant, account.customer, hot_deltas.Change(new=(grant.no,)))
    entries = (Entry(f"grant:{grant.id}", grant.amount, grant.no), Entry(_issued(grant), -grant.amount))
    await changes.book(connection, _booking(account, "grant", grant, version, entries))
    return grant


async def carry_over(
    connection: Connection, account: Locked, new: NewGrant, taken: Sequence[tuple[Grant, int]]
) -> Grant:
    """Credit that comes out of other grants: (grant, nanos), which sum to the new one's amount. It joins the cycle's
    allowance only when the cycle begins with it: else what it comes from is in it already.
    """
    assert sum(nanos for _, nanos in taken) == new.amount, "what is carried over is what is taken"
    grant = await _insert(connection, account, new)
    begins = period(account.config.recurrence, account.config.anchor_ms, new.effective_ms)[0] == new.effective_ms
    moved = [(old.no, -nanos) for old, nanos in taken]
    if begins:
        change = hot_deltas.Change(new=(grant.no,), grants=tuple(moved))
    else:
        change = hot_deltas.Change(grants=(*moved, (grant.no, grant.amount)))
    version = await hot_deltas.decide(connection, account.tenant, account.customer, change)
    entries = (
        Entry(f"grant:{grant.id}", grant.amount, grant.no),
        *(Entry(f"grant:{old.id}", -nanos, old.no) for old, nanos in taken),
    )
    await changes.book(connection, _booking(account, "rollover", grant, version, entries))
    await connection.execute(
        """UPDATE grant_balances b SET remaining = b.remaining - t.nanos
           FROM unnest($1::bigint[], $2::bigint[]) AS t (no, nanos) WHERE b.grant_no = t.no""",
        *([old.no for old, _ in taken], [nanos for _, nanos in taken]),
    )
    return grant


async def write_off(connection: Connection, account: Locked, numbers: Sequence[int]) -> None:
    """Takes what is left of these grants to breakage, but for what is there already. For accounts that were never hot:
    the ledger's figures are exact, and nobody else will book it.
    """
    rows = await connection.fetch(
        """SELECT g.id, g.no, b.remaining, b.broken FROM grants g JOIN grant_balances b ON b.grant_no = g.no
           WHERE g.no = ANY($1::bigint[]) AND b.remaining > 0""",
        list(numbers),
    )
    for row in rows:
        entries = (
            Entry(f"grant:{row['id']}", -row["remaining"], row["no"]),
            Entry(f"{EXPIRED}{row['id']}", row["broken"]),
            Entry(BREAKAGE, row["remaining"] - row["broken"]),
        )
        transaction = Transaction(
            tenant=account.tenant,
            customer=account.customer,
            kind="void",
            key=row["id"],
            credit_type=account.config.credit_type,
            version=account.version + 1,
            entries=entries,
        )
        await changes.book(connection, transaction)
        await connection.execute("UPDATE grant_balances SET remaining = 0, broken = 0 WHERE grant_no = $1", row["no"])


async def check_room(connection: Connection, account: Locked, amount: int) -> None:
    """The account's total stays an int64, and its grants a number that one decision can look at."""
    row = await connection.fetchrow(
        """SELECT count(*) FILTER (WHERE g.swept = 0) AS count, coalesce(sum(b.remaining), 0)::text AS total
           FROM grants g JOIN grant_balances b ON b.grant_no = g.no
           WHERE g.tenant = $1 AND g.customer = $2 AND g.voided_ms = 0 AND g.swept < 2 AND b.remaining > 0""",
        *(account.tenant, account.customer),
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


async def _insert(connection: Connection, account: Locked, new: NewGrant) -> Grant:
    no: int | None = await connection.fetchval(
        """INSERT INTO grants (tenant, id, customer, amount, category, priority, effective_ms, expires_ms, features,
                               note, created_ms, source)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
           ON CONFLICT (tenant, id) DO NOTHING RETURNING no""",
        *(account.tenant, new.id, account.customer, new.amount, int(new.category), new.priority),
        *(new.effective_ms, new.expires_ms, new.features, new.note, account.now_ms, new.source),
    )
    if no is None:
        raise taken(new.id)  # By another customer's grant.
    await connection.execute("INSERT INTO grant_balances (grant_no, remaining) VALUES ($1, $2)", no, new.amount)
    return Grant(
        *(no, new.id, account.customer, new.amount, new.category, new.priority),
        *(new.effective_ms, new.expires_ms, account.now_ms, new.features, 0, new.note),
    )


def taken(grant: str) -> AlreadyExists:
    return AlreadyExists("id", f"{grant!r} is a grant with other content; nothing was changed")


def _issued(grant: Grant) -> str:
    return f"issued:{grant.category.name.lower()}"


def _booking(account: Locked, kind: str, grant: Grant, version: int, entries: Sequence[Entry]) -> Transaction:
    return Transaction(
        tenant=account.tenant,
        customer=account.customer,
        kind=kind,
        key=grant.id,
        credit_type=account.config.credit_type,
        version=version,
        entries=entries,
        event_ms=grant.effective_ms,
    )
