"""What every administrative change writes beside its own rows: a transaction that sums to zero, and an audit line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Config
from entitlement.errors import InvalidArgument
from ledger_sync import callers
from ledger_sync.posting import timestamp
from ledger_sync.refusals import NotFound

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

MAX_DETAIL: Final = 2_000  # characters of an audit line's detail


class Entry(msgspec.Struct, frozen=True):
    """One line of a transaction: signed nanos on a ledger account (names: see the schema)."""

    account: str
    amount: int
    grant_no: int | None = None


class Transaction(msgspec.Struct, frozen=True, kw_only=True):
    """A transaction decided in the ledger: no journal record books it. `version`: the ledger change it belongs to."""

    tenant: str
    customer: str
    kind: str
    key: str
    credit_type: str
    version: int
    entries: Sequence[Entry]
    event_ms: int = 0  # 0: now
    epoch: int = 0
    note: str = ""


class Locked(msgspec.Struct, frozen=True):
    """An account whose row is locked until the transaction ends."""

    tenant: str
    customer: str
    partition: int
    config: Config
    epoch: int
    version: int
    overage: int
    now_ms: int  # the database's clock


_LOCK = """
SELECT partition, config, epoch, version, overage, ledger_now_ms() AS now_ms
FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE"""


async def lock(connection: Connection, tenant: str, customer: str) -> Locked:
    """Locks an account. Read what belongs to it afterwards, in statements of their own. NotFound: there is none."""
    row = await connection.fetchrow(_LOCK, tenant, customer)
    if row is None:
        raise NotFound("customer", f"{customer!r} is unknown or has no contract yet: put the customer, then a contract")
    return Locked(
        *(tenant, customer, row["partition"], Config.decode(row["config"])),
        *(row["epoch"], row["version"], row["overage"], row["now_ms"]),
    )


async def now_ms(connection: Connection) -> int:
    """The database's clock: what an administrative change that names no time is dated by."""
    now: int = await connection.fetchval("SELECT ledger_now_ms()")
    return now


def stamp(ms: int) -> str:
    """A moment as a part of an id: '20261101T000000Z', with milliseconds when it has any."""
    second, millis = divmod(ms, 1000)
    text = timestamp(second * 1000).strftime("%Y%m%dT%H%M%S")
    return f"{text}.{millis:03d}Z" if millis else f"{text}Z"


async def book(connection: Connection, transaction: Transaction) -> int:
    """Writes a transaction and returns its id. Its key and kind must be new; entries of 0 are left out."""
    assert sum(entry.amount for entry in transaction.entries) == 0, "a transaction sums to zero"
    number: int = await connection.fetchval(
        """INSERT INTO transactions (tenant, customer, kind, idempotency_key, event_time, recorded_at, epoch, sequence,
                                     version, note)
           VALUES ($1, $2, $3, $4, coalesce($5::timestamptz, to_timestamp(ledger_now_ms() / 1000.0)),
                   to_timestamp(ledger_now_ms() / 1000.0), $6, 0, $7, $8)
           RETURNING id""",
        *(transaction.tenant, transaction.customer, transaction.kind, transaction.key),
        timestamp(transaction.event_ms) if transaction.event_ms else None,
        *(transaction.epoch, transaction.version, transaction.note),
    )
    entries = [entry for entry in transaction.entries if entry.amount]
    await connection.execute(  # One statement: the database checks that it sums to zero.
        """INSERT INTO entries (transaction_id, line, account, grant_no, amount, credit_type)
           SELECT $1, line - 1, account, grant_no, amount, $2
           FROM unnest($3::text[], $4::bigint[], $5::bigint[])
                WITH ORDINALITY AS e (account, grant_no, amount, line)""",
        number,
        transaction.credit_type,
        [entry.account for entry in entries],
        [entry.grant_no for entry in entries],
        [entry.amount for entry in entries],
    )
    return number


async def audit(connection: Connection, tenant: str, actor: str, action: str, subject: str, detail: str = "") -> None:
    """One line for each administrative change, in the change's own transaction."""
    await connection.execute(
        """INSERT INTO audit (tenant, actor, action, subject, outcome, detail, source)
           VALUES ($1, $2, $3, $4, 'done', $5, $6)""",
        *(tenant, actor, action, subject, detail[:MAX_DETAIL], callers.source()),
    )


async def check_features(connection: Connection, tenant: str, named: Sequence[tuple[str, str]]) -> None:
    """Refuses a feature that the catalogue does not have; `named` is (field, feature)."""
    rows = await connection.fetch(
        "SELECT key FROM features WHERE tenant = $1 AND key = ANY($2::text[])",
        tenant,
        [feature for _, feature in named],
    )
    known = {row["key"] for row in rows}
    for field, feature in named:
        if feature not in known:
            raise InvalidArgument(field, f"feature {feature!r} does not exist: put it first")
