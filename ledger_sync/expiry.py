"""What becomes of a grant when its time is over.

At its expiry what is left goes to breakage, but for what its recurring grant rolls over. The hot account keeps it as it
is: events of its own time may be 35 days late, and what they burn comes back from breakage. After that it leaves the
hot account.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.errors import InvalidArgument, Unavailable
from entitlement.grants import LATE_MS, Category, Grant, burn_key
from entitlement.periods import Recurrence, period
from ledger_sync import changes, hot_deltas
from ledger_sync.changes import Entry, Locked, Transaction
from ledger_sync.hot_store import HotStore, Name
from ledger_sync.install import Settled
from ledger_sync.issuing import NewGrant, carry_over, write_off
from ledger_sync.ledger import LedgerRefused
from ledger_sync.posting import BREAKAGE, EXPIRED
from ledger_sync.refusals import Refusal

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

BATCH: Final = 200  # customers in one round
KEEP_EXPIRED: Final = 100  # grants of one account that late events may still burn; older ones go before their time
SETTLED_S: Final = 5.0  # how long the journal may take to be in the ledger; then it is tried again later

log = structlog.get_logger(__name__)

_EXPIRING: Final = """
SELECT DISTINCT tenant, customer FROM (
    SELECT tenant, customer FROM grants WHERE swept = 0 AND expires_ms > 0 AND expires_ms <= $1
    ORDER BY expires_ms LIMIT $2) due"""

_EXPIRED: Final = """
SELECT DISTINCT tenant, customer FROM (
    SELECT tenant, customer FROM grants WHERE swept = 1 AND expires_ms > 0 AND expires_ms <= $1
    ORDER BY expires_ms LIMIT $2) due"""

_GRANTS: Final = """
SELECT g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms, g.created_ms, g.features,
       g.voided_ms, g.swept, g.source, b.remaining, b.broken
FROM grants g JOIN grant_balances b ON b.grant_no = g.no
WHERE g.tenant = $1 AND g.customer = $2 AND g.expires_ms > 0 AND g.expires_ms <= $3 AND g.swept = $4
ORDER BY g.expires_ms, g.source, g.no"""

# Expired ones with something left, but for the last so many.
_BEYOND: Final = """
SELECT g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms, g.created_ms, g.features,
       g.voided_ms, g.swept, g.source, b.remaining, b.broken
FROM grants g JOIN grant_balances b ON b.grant_no = g.no
WHERE g.tenant = $1 AND g.customer = $2 AND g.swept = 1 AND b.remaining > 0
ORDER BY g.expires_ms DESC, g.no DESC OFFSET $3"""

_RECURRING: Final = """
SELECT amount, category, priority, features, recurrence, rollover_max, anchor_ms, ends_ms FROM recurring_grants
WHERE tenant = $1 AND id = $2 AND voided_ms = 0 AND rollover_max > 0"""


# Allotments of one period may expire one after the other, when nobody swept for longer than a period.
_ROLLED: Final = """
SELECT count(*) AS count, coalesce(sum(amount), 0)::bigint AS amount FROM grants
WHERE tenant = $1 AND source = $2 AND starts_with(id, $3) AND effective_ms = $4"""


class Left(msgspec.Struct):
    """A grant whose time is over, and what is left of it."""

    grant: Grant
    source: str
    remaining: int
    broken: int


class Expiry:
    """The chore. `settled` comes from the journal's drain."""

    def __init__(self, ledger: Ledger, hot: HotStore, settled: Settled) -> None:
        self._ledger = ledger
        self._hot = hot
        self._settled = settled

    async def tend(self, now_ms: int) -> bool:
        due = await self._names(_EXPIRING, now_ms)
        if due:
            await self._wait_for_journal(due)
        done = sum([await self._try(self._expire, name, now_ms) for name in due])
        gone = await self._names(_EXPIRED, now_ms - LATE_MS)
        done += sum([await self._try(self._remove, name, now_ms) for name in gone])
        return done > 0

    async def _try(self, work: Callable[[Name, int], Awaitable[None]], name: Name, now_ms: int) -> bool:
        """Whether it was done. One customer's trouble is not the others'."""
        try:
            await work(name, now_ms)
        except (Refusal, InvalidArgument, LedgerRefused) as error:
            log.error("grants_not_expired", customer=name[1], error=str(error))
            return False
        return True

    async def _names(self, query: str, until_ms: int) -> list[Name]:
        async with self._ledger.transaction(readonly=True) as connection:
            return [(row["tenant"], row["customer"]) for row in await connection.fetch(query, until_ms, BATCH)]

    async def _wait_for_journal(self, names: Iterable[Name]) -> None:
        """What was burned before the expiry is in the ledger: what is left there is what is left."""
        partitions = {self._hot.partition(name) for name in names}
        try:
            async with asyncio.timeout(SETTLED_S):
                for partition, stream_id in (await self._hot.last_ids(partitions)).items():
                    await self._settled(partition, stream_id)
        except TimeoutError:
            raise Unavailable("grants expire when the journal is in the ledger, which takes long") from None

    async def _expire(self, name: Name, now_ms: int) -> None:
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, *name)
            found = [_left(row) for row in await connection.fetch(_GRANTS, *name, now_ms, 0)]
            for (source, _), grants in groupby(found, key=lambda left: (left.source, left.grant.expires_ms)):
                if source:
                    await self._roll_over(connection, account, source, list(grants))
            await _break(connection, account, found)
            await connection.execute(
                "UPDATE grants SET swept = 1 WHERE no = ANY($1::bigint[])", [left.grant.no for left in found]
            )
            await _give_up(connection, account, await connection.fetch(_BEYOND, *name, KEEP_EXPIRED))

    async def _roll_over(self, connection: Connection, account: Locked, source: str, grants: list[Left]) -> None:
        """min(what is left, the most that rolls over) lives on in the next period. It is taken from what would have
        burned last.
        """
        rule = await connection.fetchrow(_RECURRING, account.tenant, source)
        start = grants[0].grant.expires_ms
        if rule is None or (rule["ends_ms"] and start >= rule["ends_ms"]):
            return
        _, end = period(Recurrence(rule["recurrence"]), rule["anchor_ms"], start)
        earlier = await connection.fetchrow(_ROLLED, account.tenant, source, f"{allotment_id(source, start)}+", start)
        assert earlier is not None, "it is a sum"
        room = rule["rollover_max"] - earlier["amount"]
        moved: list[tuple[Grant, int]] = []
        for left in sorted(grants, key=lambda left: burn_key(left.grant), reverse=True):
            if not left.grant.voided_ms and (part := min(room, left.remaining - left.broken)) > 0:
                moved.append((left.grant, part))
                left.remaining -= part
                room -= part
        if not moved:
            return
        new = NewGrant(
            id=f"{allotment_id(source, start)}+{earlier['count'] + 1 if earlier['count'] else ''}",
            amount=sum(part for _, part in moved),
            category=Category(rule["category"]),
            effective_ms=start,
            priority=rule["priority"],
            expires_ms=end,
            features=tuple(rule["features"]),
            note=f"rolled over from {len(moved)} grants of {source}",
            source=source,
        )
        await carry_over(connection, account, new, moved)

    async def _remove(self, name: Name, now_ms: int) -> None:
        """No event can reach these any more: the hot account lets go of them with its next change."""
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, *name)
            await _give_up(connection, account, await connection.fetch(_GRANTS, *name, now_ms - LATE_MS, 1))


async def _give_up(connection: Connection, account: Locked, rows: Sequence[Row]) -> None:
    """No event burns these any more."""
    found = [_left(row) for row in rows]
    await connection.execute(
        "UPDATE grants SET swept = 2 WHERE no = ANY($1::bigint[])", [left.grant.no for left in found]
    )
    left = [item.grant.no for item in found if item.remaining > 0]
    if left and account.epoch:
        await hot_deltas.decide(connection, account.tenant, account.customer)
    elif left:
        await write_off(connection, account, left)


def allotment_id(source: str, start_ms: int) -> str:
    """The id of the grant that a recurring one issues for the period that begins then."""
    return f"{source}/{changes.stamp(start_ms)}"


def _left(row: Row) -> Left:
    return Left(hot_deltas.grant_of(row), row["source"], row["remaining"], row["broken"])


async def _break(connection: Connection, account: Locked, grants: Sequence[Left]) -> None:
    """Books what is left to breakage. The grant keeps it, against 'expired:<grant>', for events that come late."""
    for left in grants:
        if left.grant.voided_ms or (rest := left.remaining - left.broken) <= 0:
            continue
        entries = (Entry(f"{EXPIRED}{left.grant.id}", -rest), Entry(BREAKAGE, rest))
        await changes.book(connection, _booking(account, "expire", left.grant, entries))
        await connection.execute(
            "UPDATE grant_balances SET broken = broken + $2 WHERE grant_no = $1", left.grant.no, rest
        )


def _booking(account: Locked, kind: str, grant: Grant, entries: Sequence[Entry]) -> Transaction:
    return Transaction(
        tenant=account.tenant,
        customer=account.customer,
        kind=kind,
        key=f"{grant.id}@{grant.expires_ms}",
        credit_type=account.config.credit_type,
        version=account.version,
        entries=entries,
        event_ms=grant.expires_ms,
    )
