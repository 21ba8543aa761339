"""What must hold inside the ledger: every transaction sums to zero, every projection is the sum of what it follows
from, and the usage charged is the revenue booked. The entries and events are authoritative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ledger_sync import changes, quarantine

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

# $1 tenant, $2 customer ('' = all). Columns: customer, part, what the projection says, what it follows from.
_GRANTS: Final = """
SELECT g.customer, 'grant:' || g.no AS part, b.remaining AS projected, coalesce(s.amount, 0)::bigint AS entries
FROM grants g JOIN grant_balances b ON b.grant_no = g.no
     LEFT JOIN (SELECT grant_no, sum(amount) AS amount FROM entries WHERE grant_no IS NOT NULL GROUP BY grant_no) s
     ON s.grant_no = g.no
WHERE g.tenant = $1 AND ($2 = '' OR g.customer = $2) AND b.remaining <> coalesce(s.amount, 0)"""

_BROKEN: Final = """
SELECT g.customer, 'broken:' || g.no AS part, b.broken AS projected, coalesce(s.amount, 0)::bigint AS entries
FROM grants g JOIN grant_balances b ON b.grant_no = g.no
     LEFT JOIN (SELECT e.account, -sum(e.amount) AS amount FROM entries e JOIN transactions t ON t.id = e.transaction_id
                WHERE t.tenant = $1 AND ($2 = '' OR t.customer = $2) AND e.account LIKE 'expired:%'
                GROUP BY e.account) s
     ON s.account = 'expired:' || g.id
WHERE g.tenant = $1 AND ($2 = '' OR g.customer = $2) AND b.broken <> coalesce(s.amount, 0)"""

_OVERAGE: Final = """
SELECT a.customer, 'overage' AS part, a.overage AS projected, (-coalesce(s.amount, 0))::bigint AS entries
FROM accounts a LEFT JOIN (
    SELECT t.customer, sum(e.amount) AS amount FROM entries e JOIN transactions t ON t.id = e.transaction_id
    WHERE t.tenant = $1 AND ($2 = '' OR t.customer = $2) AND e.account = 'overage:' || t.customer GROUP BY t.customer
) s ON s.customer = a.customer
WHERE a.tenant = $1 AND ($2 = '' OR a.customer = $2) AND a.overage <> -coalesce(s.amount, 0)"""

# What is set aside is what holds have moved, and what the open ones have left.
_HELD: Final = """
SELECT a.customer, 'held' AS part, a.held AS projected, coalesce(m.amount, 0)::bigint AS entries
FROM accounts a LEFT JOIN (SELECT customer, sum(amount) AS amount FROM hold_moves
                           WHERE tenant = $1 AND ($2 = '' OR customer = $2) GROUP BY customer) m USING (customer)
WHERE a.tenant = $1 AND ($2 = '' OR a.customer = $2) AND a.held <> coalesce(m.amount, 0)
UNION ALL
SELECT a.customer, 'holds' AS part, coalesce(h.remaining, 0)::bigint AS projected, a.held AS entries
FROM accounts a LEFT JOIN (SELECT customer, sum(remaining) AS remaining FROM holds
                           WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND state = 1 GROUP BY customer) h
     USING (customer)
WHERE a.tenant = $1 AND ($2 = '' OR a.customer = $2) AND a.held <> coalesce(h.remaining, 0)"""

_SETTLED: Final = """
SELECT customer, 'settled:' || period_start AS part, coalesce(p.settled, 0) AS projected,
       coalesce(s.amount, 0)::bigint AS entries
FROM (SELECT customer, period_start, settled FROM account_periods
      WHERE tenant = $1 AND ($2 = '' OR customer = $2)) p
     FULL JOIN (SELECT customer, period_start, sum(amount) AS amount FROM (
                    SELECT customer, period_start, amount FROM usage_events
                    WHERE tenant = $1 AND ($2 = '' OR customer = $2)
                    UNION ALL SELECT customer, period_start, difference FROM corrections
                    WHERE tenant = $1 AND ($2 = '' OR customer = $2)) booked GROUP BY 1, 2) s
                USING (customer, period_start)
WHERE coalesce(p.settled, 0) <> coalesce(s.amount, 0)"""

_REVENUE: Final = """
SELECT customer, 'revenue' AS part, coalesce(u.amount, 0)::bigint AS projected, coalesce(r.amount, 0)::bigint AS entries
FROM (SELECT customer, sum(amount) AS amount FROM (
          SELECT customer, amount FROM usage_events WHERE tenant = $1 AND ($2 = '' OR customer = $2)
          UNION ALL SELECT customer, difference FROM corrections
          WHERE tenant = $1 AND ($2 = '' OR customer = $2)) booked GROUP BY customer) u
     FULL JOIN (SELECT t.customer, sum(e.amount) AS amount FROM entries e JOIN transactions t ON t.id = e.transaction_id
                WHERE t.tenant = $1 AND ($2 = '' OR t.customer = $2) AND e.account LIKE 'revenue:%'
                      AND e.account <> 'revenue:=commit'
                GROUP BY t.customer) r USING (customer)
WHERE coalesce(u.amount, 0) <> coalesce(r.amount, 0)"""

# Every period's meters come to what its events have been charged.
_METERS: Final = """
SELECT customer, 'metered:' || period_start AS part, coalesce(m.amount, 0)::bigint AS projected,
       coalesce(s.amount, 0)::bigint AS entries
FROM (SELECT customer, period_start, sum(amount) AS amount FROM meters
      WHERE tenant = $1 AND ($2 = '' OR customer = $2) GROUP BY 1, 2) m
     FULL JOIN (SELECT customer, period_start, sum(amount) AS amount FROM (
                    SELECT customer, period_start, amount FROM usage_events
                    WHERE tenant = $1 AND ($2 = '' OR customer = $2)
                    UNION ALL SELECT customer, period_start, difference FROM corrections
                    WHERE tenant = $1 AND ($2 = '' OR customer = $2)) booked GROUP BY 1, 2) s
                USING (customer, period_start)
WHERE coalesce(m.amount, 0) <> coalesce(s.amount, 0)"""

_UNBALANCED: Final = """
SELECT count(*) FROM (
    SELECT 1 FROM entries e JOIN transactions t ON t.id = e.transaction_id
    WHERE t.tenant = $1 AND ($2 = '' OR t.customer = $2)
    GROUP BY e.transaction_id, e.credit_type HAVING sum(e.amount) <> 0) unbalanced"""

_TOTALS: Final = """
SELECT (SELECT count(*) FROM usage_events WHERE tenant = $1 AND ($2 = '' OR customer = $2)) AS events,
       (SELECT (coalesce(sum(amount), 0) + (SELECT coalesce(sum(difference), 0) FROM corrections
                                            WHERE tenant = $1 AND ($2 = '' OR customer = $2)))::text FROM usage_events
        WHERE tenant = $1 AND ($2 = '' OR customer = $2)) AS total,
       (SELECT count(*) FROM outbox WHERE $2 = '' OR (tenant, customer) = ($1, $2)) AS outbox_pending,
       (SELECT coalesce(sum(gaps), 0)::bigint FROM accounts WHERE tenant = $1 AND ($2 = '' OR customer = $2)) AS gaps"""

# By kind of part; $1 is what the projection should say. Revenue is none: it cannot be repaired, only explained.
_REPAIRS: Final = {
    "grant": "UPDATE grant_balances SET remaining = $1 WHERE grant_no = $2",
    "broken": "UPDATE grant_balances SET broken = $1 WHERE grant_no = $2",
    "overage": "UPDATE accounts SET overage = $1 WHERE tenant = $2 AND customer = $3",
    "held": "UPDATE accounts SET held = $1 WHERE tenant = $2 AND customer = $3",
    "settled": """INSERT INTO account_periods (settled, tenant, customer, period_start) VALUES ($1, $2, $3, $4)
                  ON CONFLICT (tenant, customer, period_start) DO UPDATE SET settled = $1""",
}


class Mismatch(msgspec.Struct, frozen=True):
    """A projection that is not what it follows from. Nanos."""

    customer: str
    part: str
    projected: int
    entries: int


class Totals(msgspec.Struct, frozen=True):
    events: int
    total_nanos: int
    quarantined: int
    outbox_pending: int
    gaps: int
    unbalanced: int


NOTHING: Final = Totals(0, 0, 0, 0, 0, 0)


async def totals(connection: Connection, tenant: str, customer: str) -> Totals:
    row = await connection.fetchrow(_TOTALS, tenant, customer)
    assert row is not None
    unbalanced: int = await connection.fetchval(_UNBALANCED, tenant, customer)
    quarantined = await quarantine.count(connection, tenant, customer)
    return Totals(*(row["events"], int(row["total"]), quarantined, row["outbox_pending"], row["gaps"], unbalanced))


async def mismatches(connection: Connection, tenant: str, customer: str) -> list[Mismatch]:
    """Of one customer, or of all ('')."""
    found = []
    for query in (_GRANTS, _BROKEN, _METERS, _OVERAGE, _HELD, _SETTLED, _REVENUE):
        for row in await connection.fetch(query, tenant, customer):
            found.append(Mismatch(row["customer"], row["part"], row["projected"], row["entries"]))
    return found


async def repair(connection: Connection, tenant: str, actor: str, customer: str) -> None:
    """Makes a customer's projections what they follow from, in the caller's transaction."""
    await changes.lock(connection, tenant, customer)
    found = await mismatches(connection, tenant, customer)
    for mismatch in found:
        kind, _, name = mismatch.part.partition(":")
        if query := _REPAIRS.get(kind):
            key = (int(name),) if kind in ("grant", "broken") else (tenant, customer, *map(int, filter(None, [name])))
            await connection.execute(query, mismatch.entries, *key)
    detail = "; ".join(f"{item.part} projected {item.projected} entries {item.entries}" for item in found)
    await changes.audit(connection, tenant, actor, "RepairProjection", customer, detail)
