"""Recurring grants: each issues one allotment for every period, a little before it begins, until it ends or is voided.

A contract's seats are one of them. Periods are those of entitlement.periods, anchored at the recurring grant's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.errors import InvalidArgument
from entitlement.grants import Category
from entitlement.periods import DAY, HOUR, Recurrence, period
from ledger_sync import changes, hot_deltas
from ledger_sync.changes import Locked
from ledger_sync.expiry import allotment_id
from ledger_sync.hot_store import Name
from ledger_sync.issuing import RESERVED, NewGrant, issue, write_off
from ledger_sync.refusals import Refusal

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

BATCH: Final = 200  # recurring grants in one round
AHEAD_MS: Final = {Recurrence.HOUR: HOUR // 2}  # of its period an allotment is issued so long before; else a day
NO_MORE: Final = 2**62  # `issue_ms` of one that has ended
SEATS_PRIORITY: Final = 0

log = structlog.get_logger(__name__)


class Recurring(msgspec.Struct, frozen=True, kw_only=True):
    """What issues allotments. `contract`: whose seats it is for."""

    id: str
    customer: str
    amount: int
    category: Category
    recurrence: Recurrence
    anchor_ms: int
    priority: int = 0
    features: tuple[str, ...] = ()
    rollover_max: int = 0
    ends_ms: int = 0  # no allotment begins at or after it; 0: open
    note: str = ""
    created_ms: int = 0
    voided_ms: int = 0
    next_ms: int = 0
    contract: str = ""

    def period(self, at_ms: int) -> tuple[int, int]:
        return period(self.recurrence, self.anchor_ms, max(at_ms, self.anchor_ms))

    def issue_ms(self, start_ms: int) -> int:
        """When the allotment of the period that begins then is issued."""
        if self.ends_ms and start_ms >= self.ends_ms:
            return NO_MORE
        return start_ms - AHEAD_MS.get(self.recurrence, DAY)

    def allotment(self, start_ms: int, amount: int, *, suffix: str = "") -> NewGrant:
        _, end_ms = self.period(start_ms)
        return NewGrant(
            id=allotment_id(self.id, start_ms) + suffix,
            amount=amount,
            category=self.category,
            effective_ms=start_ms,
            priority=self.priority,
            expires_ms=end_ms,
            features=self.features,
            note=self.note,
            source=self.id,
        )


_COLUMNS: Final = """id, customer, amount, category, priority, features, recurrence, rollover_max, anchor_ms, ends_ms,
    note, created_ms, voided_ms, next_ms, contract"""
_ISSUED: Final = "UPDATE grants SET voided_ms = $3 WHERE tenant = $1 AND source = $2 AND voided_ms = 0"
_VOIDED: Final = f"{_ISSUED} AND expires_ms > $3 RETURNING no"
_NOT_BEGUN: Final = f"{_ISSUED} AND effective_ms > $3 RETURNING no"


class Allotments:
    """The chore that issues what is due."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def tend(self, now_ms: int) -> bool:
        async with self._ledger.transaction(readonly=True) as connection:
            due = await connection.fetch(
                """SELECT tenant, customer, id FROM recurring_grants WHERE voided_ms = 0 AND issue_ms <= $1
                   ORDER BY issue_ms LIMIT $2""",
                *(now_ms, BATCH),
            )
        for row in due:
            await self._issue((row["tenant"], row["customer"]), row["id"])
        return bool(due)

    async def _issue(self, name: Name, recurring: str) -> None:
        try:
            async with self._ledger.transaction() as connection:
                account = await changes.lock(connection, *name)
                found = await read(connection, account.tenant, recurring)
                if found and not found.voided_ms:
                    await issue_due(connection, account, found, at_most=1)
        except (Refusal, InvalidArgument) as error:  # A full account: that period has no allotment.
            log.error("allotment_not_issued", customer=name[1], grant=recurring, error=str(error))
            await self._skip(name, recurring, str(error))

    async def _skip(self, name: Name, recurring: str, why: str) -> None:
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, *name)
            found = await read(connection, account.tenant, recurring)
            if found:
                await _advance(connection, account.tenant, found, found.period(found.next_ms)[1])
            await changes.audit(connection, account.tenant, "ledger_sync", "SkipAllotment", account.customer, why)


async def read(connection: Connection, tenant: str, recurring: str) -> Recurring | None:
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM recurring_grants WHERE tenant = $1 AND id = $2",  # noqa: S608
        *(tenant, recurring),
    )
    return recurring_of(row) if row else None


async def listed(connection: Connection, tenant: str, customer: str, after: str, limit: int) -> list[Recurring]:
    """By id, without those that stand for a contract's seats."""
    rows = await connection.fetch(
        f"""SELECT {_COLUMNS} FROM recurring_grants
            WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND id > $3 AND contract = '' ORDER BY id LIMIT $4""",  # noqa: S608
        *(tenant, customer, after, limit),
    )
    return [recurring_of(row) for row in rows]


def recurring_of(row: Row) -> Recurring:
    return Recurring(
        id=row["id"],
        customer=row["customer"],
        amount=row["amount"],
        category=Category(row["category"]),
        recurrence=Recurrence(row["recurrence"]),
        anchor_ms=row["anchor_ms"],
        priority=row["priority"],
        features=tuple(row["features"]),
        rollover_max=row["rollover_max"],
        ends_ms=row["ends_ms"],
        note=row["note"],
        created_ms=row["created_ms"],
        voided_ms=row["voided_ms"],
        next_ms=row["next_ms"],
        contract=row["contract"],
    )


async def begin(connection: Connection, account: Locked, new: Recurring) -> None:
    """Puts a recurring grant in force: the allotment of the period that runs is issued at once."""
    start_ms, _ = new.period(account.now_ms)
    started = msgspec.structs.replace(new, next_ms=start_ms, created_ms=account.now_ms)
    await connection.execute(
        """INSERT INTO recurring_grants (tenant, id, customer, amount, category, priority, features, recurrence,
                                         rollover_max, anchor_ms, ends_ms, note, created_ms, next_ms, issue_ms,
                                         contract)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)""",
        *(account.tenant, new.id, new.customer, new.amount, int(new.category), new.priority, new.features),
        *(int(new.recurrence), new.rollover_max, new.anchor_ms, new.ends_ms, new.note, account.now_ms),
        *(start_ms, new.issue_ms(start_ms), new.contract),
    )
    await issue_due(connection, account, started, at_most=2)


async def issue_due(connection: Connection, account: Locked, recurring: Recurring, *, at_most: int) -> None:
    """The next allotments whose time has come."""
    start_ms = recurring.next_ms
    for _ in range(at_most):
        if recurring.issue_ms(start_ms) > account.now_ms:
            break
        await _issue_missing(connection, account, recurring, start_ms)
        start_ms = recurring.period(start_ms)[1]
    await _advance(connection, account.tenant, recurring, start_ms)


async def _issue_missing(connection: Connection, account: Locked, recurring: Recurring, start_ms: int) -> None:
    """What has not been issued for that period. Of seats, whose number changes, that may be a part."""
    row = await connection.fetchrow(
        """SELECT count(*) AS count, coalesce(sum(amount) FILTER (WHERE voided_ms = 0), 0)::bigint AS amount FROM grants
           WHERE tenant = $1 AND source = $2 AND effective_ms = $3""",
        *(account.tenant, recurring.id, start_ms),
    )
    assert row is not None, "it is a sum"
    missing = recurring.amount - (row["amount"] if recurring.contract else 0)
    if missing > 0:
        suffix = f"+{row['count']}" if recurring.contract and row["count"] else ""
        await issue(connection, account, recurring.allotment(start_ms, missing, suffix=suffix))


async def _advance(connection: Connection, tenant: str, recurring: Recurring, start_ms: int) -> None:
    await connection.execute(
        "UPDATE recurring_grants SET next_ms = $3, issue_ms = $4 WHERE tenant = $1 AND id = $2",
        *(tenant, recurring.id, start_ms, recurring.issue_ms(start_ms)),
    )


async def end(connection: Connection, account: Locked, recurring: str, *, void: bool) -> None:
    """No allotment begins from now on. `void`: what has been issued and has not expired ends too."""
    tenant, now_ms = account.tenant, account.now_ms
    if void:
        await connection.execute(
            "UPDATE recurring_grants SET voided_ms = $3 WHERE tenant = $1 AND id = $2", tenant, recurring, now_ms
        )
        gone = _VOIDED
    else:
        await connection.execute(
            "UPDATE recurring_grants SET ends_ms = $3, issue_ms = $4 WHERE tenant = $1 AND id = $2",
            *(tenant, recurring, now_ms, NO_MORE),
        )
        gone = _NOT_BEGUN
    rows = await connection.fetch(gone, tenant, recurring, now_ms)
    if rows:
        await hot_deltas.decide(connection, tenant, account.customer)
        if account.epoch == 0:
            await write_off(connection, account, [row["no"] for row in rows])


class Seats(msgspec.Struct, frozen=True):
    """What a contract says about seats."""

    contract: str
    amount: int  # nanos a period: seats * allowance
    recurrence: Recurrence
    anchor_ms: int


async def put_seats(connection: Connection, account: Locked, seats: Seats) -> None:
    """Makes the allotment of a contract's seats what it says now. More seats are worth their whole allowance in the
    period that runs; fewer count from the next one. Another rule of periods begins when the running allotment ends.
    """
    wanted = Recurring(
        id=seats_id(seats.contract),
        customer=account.customer,
        amount=seats.amount,
        category=Category.ALLOTMENT,
        recurrence=seats.recurrence,
        anchor_ms=seats.anchor_ms,
        priority=SEATS_PRIORITY,
        note=f"seats of {seats.contract}",
        contract=seats.contract,
    )
    known = await read(connection, account.tenant, wanted.id)
    if known is None:
        if seats.amount:
            await begin(connection, account, wanted)
        return
    alike = (known.recurrence, known.anchor_ms) == (wanted.recurrence, wanted.anchor_ms)
    if alike and known.amount == wanted.amount and not known.ends_ms:
        return
    await end(connection, account, wanted.id, void=False)  # What was issued ahead is issued anew, as it is now.
    if seats.amount:
        await _go_on(connection, account, wanted, alike=alike)


def seats_id(contract: str) -> str:
    return f"{RESERVED}{contract}/seats"


async def _go_on(connection: Connection, account: Locked, wanted: Recurring, *, alike: bool) -> None:
    start_ms, _ = wanted.period(account.now_ms)
    if not alike and (until_ms := await _runs_until(connection, account, wanted.id)):
        start_ms, end_ms = wanted.period(until_ms)
        start_ms = start_ms if start_ms >= until_ms else end_ms
    await connection.execute(
        """UPDATE recurring_grants SET amount = $3, recurrence = $4, anchor_ms = $5, ends_ms = 0, voided_ms = 0
           WHERE tenant = $1 AND id = $2""",
        *(account.tenant, wanted.id, wanted.amount, int(wanted.recurrence), wanted.anchor_ms),
    )
    await issue_due(connection, account, msgspec.structs.replace(wanted, next_ms=start_ms), at_most=2)


async def _runs_until(connection: Connection, account: Locked, recurring: str) -> int | None:
    """When the allotment that runs now ends."""
    until_ms: int | None = await connection.fetchval(
        """SELECT max(expires_ms) FROM grants
           WHERE tenant = $1 AND source = $2 AND voided_ms = 0 AND effective_ms <= $3 AND expires_ms > $3""",
        *(account.tenant, recurring, account.now_ms),
    )
    return until_ms
